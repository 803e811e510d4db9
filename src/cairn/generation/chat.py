"""Talk with a checkpoint: its own template, all of its end tokens, its answers word by word as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.carried import chat_template
from cairn.data.text.conversations import ChatTemplate, Message, checked, special_variables
from cairn.errors import InputError, NotFoundError
from cairn.generation import limits
from cairn.generation.sample import generate_texts

TEMPERATURE = 0.8
"""Where neither the user nor the checkpoint's generation settings say one."""


class Chat:
    """A conversation with one checkpoint, whose model stays in memory. `messages` is what has been said; `cairn.chat` is one answer.

    Examples
    --------
    >>> talk = Chat("runs/a")  # doctest: +SKIP
    >>> talk.ask("What is the capital of France?")  # doctest: +SKIP
    'The capital of France is Paris.'
    """

    def __init__(
        self,
        checkpoint: str | Path | read.Checkpoint,
        *,
        system: str | None = None,
        template: str | Path | None = None,
        new_tokens: int = 512,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        device: Any = None,
        dtype: str | None = None,
    ) -> None:
        """Options as in `chat`."""
        self.checkpoint = checkpoint if isinstance(checkpoint, read.Checkpoint) else read.open(checkpoint)
        self.tokenizer = limits.tokenizer_of(self.checkpoint)
        self.template = template_of(self.checkpoint, template)
        self._first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._first)
        settings = {key: value for key, value in (self.checkpoint.generation or {}).items() if isinstance(value, int | float) and not isinstance(value, bool)}
        found = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._sampling: dict[str, Any] = {key: settings.get(key) if value is None else value for key, value in found.items()}
        self._sampling["temperature"] = TEMPERATURE if self._sampling["temperature"] is None else self._sampling["temperature"]
        self._sampling["top_k"] = self._sampling["top_k"] or None  # transformers writes 0 for all of them
        self._new, self._seed = new_tokens, seed
        self.model = limits.model_of(self.checkpoint, device, dtype)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model reads before it answers."""
        return self.tokenizer.encode(self.template.render(messages, special_variables(self.tokenizer.config)))

    def answer(self, messages: Sequence[Message], told: Callable[[str], object] | None = None) -> str:
        """What the model says next; `told` hears it piece by piece. Raises `InputError` where the conversation is longer than the model bears."""
        ids, room = self.prompt(messages), limits.positions(self.model)
        if room is not None and len(ids) >= room:
            raise InputError(f"The conversation has {len(ids)} tokens and the model bears {room}; begin a new one (/new).")
        new = self._new if room is None else min(self._new, room - len(ids))
        seed = self._seed + len(messages)
        (text,) = generate_texts(self.model, self.tokenizer, [ids], max_new_tokens=new, seed=seed, told=told, **self._sampling)
        return text.strip()

    def ask(self, text: str, told: Callable[[str], object] | None = None) -> str:
        """Say something and keep the answer. Ctrl-C stops an answer that is told: what there is of it is the answer."""
        said = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []

        def hear(piece: str) -> None:
            pieces.append(piece)
            if told is not None:
                told(piece)

        try:
            answer = self.answer(said, hear)
        except KeyboardInterrupt:
            if told is None:
                raise
            answer = "".join(pieces).strip()
        self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer

    def begin(self) -> None:
        """Forget what has been said, but for the system's message."""
        self.messages = list(self._first)


def chat(
    checkpoint: str | Path | read.Checkpoint,
    messages: str | Sequence[Message],
    *,
    system: str | None = None,
    template: str | Path | None = None,
    new_tokens: int = 512,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: Any = None,
    dtype: str | None = None,
    told: Callable[[str], object] | None = None,
) -> str:
    """The answer of a checkpoint to a conversation, by its own chat template, up to the first of all its end tokens.

    Parameters
    ----------
    checkpoint
        A checkpoint, a run, or a transformers directory.
    messages
        What has been said: a text of the user, or messages with `role` (system, user, assistant, tool) and `content`.
    system
        A message in front that says how to answer.
    template
        A file with a chat template, for a checkpoint that carries none or another one.
    new_tokens
        How many tokens the answer has at most; fewer where the model bears no more.
    temperature, top_k, top_p
        As in `cairn.generate`; by default what generation_config.json says, and a temperature of 0.8 where it says none.
    seed
        The same seed gives the same answer.
    device, dtype
        As in `cairn.generate`.
    told
        Hears the answer piece by piece as it comes.

    Raises
    ------
    InputError
        For a checkpoint without tokenizer or template, a template that cannot be rendered, a conversation that is too long.

    Examples
    --------
    >>> cairn.chat("smollm", "What is the capital of France?", temperature=0)  # doctest: +SKIP
    'The capital of France is Paris.'
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    said: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    checked(said)
    talk = Chat(checkpoint, system=system, template=template, new_tokens=new_tokens, device=device, dtype=dtype, **sampling)
    return talk.answer([*talk.messages, *said], told)


def template_of(checkpoint: read.Checkpoint, file: str | Path | None = None) -> ChatTemplate:
    """The chat template of a checkpoint, or the one in a file. Raises `InputError` where there is none."""
    if file is not None:
        try:
            return ChatTemplate(documents.read_text(Path(file), named=True), file)
        except FileNotFoundError:
            raise NotFoundError(f"There is no chat template at {file}.") from None
    text = chat_template(checkpoint)
    if text is None:
        raise InputError(
            f"{checkpoint.path} carries no chat template, so it is not known how a conversation looks to it; cairn generate continues a text, "
            "--template FILE gives a template."
        )
    return ChatTemplate(text, f"The chat template of {checkpoint.path}")
