"""Continue texts from a checkpoint: what `cairn generate` calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import documents, read
from cairn.data.text.conversations import special_variables
from cairn.data.text.metadata import Metadata
from cairn.errors import InputError, NotFoundError
from cairn.generation.chat import template_of
from cairn.generation.limits import model_of, tokenizer_of
from cairn.generation.sample import generate_texts


def generate(
    checkpoint: str | Path | read.Checkpoint,
    prompt: str | Sequence[str],
    *,
    new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    metadata: str | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    template: str | Path | None = None,
    device: Any = None,
    dtype: str | None = None,
    told: Callable[[str], object] | None = None,
) -> Any:
    """The text that the model of `checkpoint` writes after `prompt`, or the texts after each of several prompts.

    Parameters
    ----------
    checkpoint
        A checkpoint, a run, or a transformers directory.
    prompt
        A text, or several, which are read together.
    new_tokens, temperature, top_k, top_p, seed
        As in `cairn.generation.sample.generate`; each of several prompts has the seed for itself.
    metadata
        What the text is said to come from (a host, say), in the form in which the model has seen it in training.
    stop
        Strings that end the text, which may be tokens that are no text.
    chat
        The prompt is what a user says, put into the checkpoint's chat template; the text is the answer.
    template
        With `chat`, a file with another template.
    device, dtype
        As `cairn.device.choose`; `float32` or `bfloat16`, by default that of the stored weights.
    told
        Hears the text of a single prompt piece by piece as it comes.

    Raises
    ------
    InputError
        When the checkpoint has no tokenizer, was not trained with metadata, or has no chat template that can be rendered.

    Examples
    --------
    >>> cairn.generate("runs/a", "The stone", new_tokens=20)  # doctest: +SKIP
    ' on the trail marks the way.'
    """
    opened = checkpoint if isinstance(checkpoint, read.Checkpoint) else read.open(checkpoint)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    tokenizer = tokenizer_of(opened)
    ids = _ids(opened, prompts, metadata, chat, template)
    texts = generate_texts(model_of(opened, device, dtype), tokenizer, ids, stop=stop, told=told, **options)
    return texts[0] if isinstance(prompt, str) else texts


def _ids(opened: read.Checkpoint, prompts: Sequence[str], metadata: str | None, chat: bool, template: str | Path | None) -> list[list[int]]:
    """What the model reads."""
    tokenizer: Any = opened.tokenizer
    if template is not None and not chat:
        raise InputError("A chat template belongs to a chat (--chat).")
    if chat:
        if metadata is not None:
            raise InputError("A chat has its own form and no metadata in front; leave one of the two out.")
        made, tokens = template_of(opened, template), special_variables(tokenizer.config)
        return [tokenizer.encode(made.render([{"role": "user", "content": prompt}], tokens)) for prompt in prompts]
    front = _shown(opened, metadata) if metadata is not None else ""
    return [[*tokenizer.prompt(front), *tokenizer.encode(prompt)] if front else tokenizer.prompt(prompt) for prompt in prompts]


def prompts_of(path: str | Path) -> list[str]:
    """The prompts in a file: of JSON lines each `prompt` or `text`, else the file is one prompt. Raises `NotFoundError` or `InputError`."""
    path = Path(path)
    try:
        if path.suffix != ".jsonl":
            return [documents.read_text(path, named=True).removesuffix("\n")]
        lines = [(number, line) for number, line in enumerate(documents.read_text(path, named=True).splitlines(), 1) if line.strip()]
    except FileNotFoundError:
        raise NotFoundError(f"There is no file {path} with prompts.") from None
    found = []
    for number, line in lines:
        row = documents.parse(line, f"{path}, line {number}")
        text = (row.get("prompt") or row.get("text")) if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: there is no text under 'prompt' or 'text'.")
        found.append(text)
    if not found:
        raise InputError(f"{path} holds no prompts.")
    return found


def _shown(checkpoint: read.Checkpoint, value: str) -> str:
    """The text in front of a document that has this metadata."""
    recipe = checkpoint.lineage.options.get("recipe", {}) if checkpoint.lineage is not None else {}
    described = recipe.get("data", {}).get("metadata")
    if described is None:
        raise InputError(f"{checkpoint.path} was not trained with metadata (data.metadata), so it has no form for them; write what you mean into the prompt.")
    return Metadata.parse(described).shown(value)
