"""Continue token sequences: greedy or sampled, one prompt or many.

What is drawn for a prompt depends on its seed, its tokens and the options alone: every draw is a number computed from
(seed, index of the new token), so neither torch's global generator nor the other prompts of a batch have a say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cairn.errors import InputError
from cairn.generation import limits
from cairn.generation.bidirectional import Paired, Prefixed
from cairn.generation.prefill import Batching, prefill
from cairn.models import masks
from cairn.models.rope import steady_length
from cairn.randomness import seed_for, uniform


def generate(
    model: nn.Module,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    end_ids: Iterable[int] = (),
    stop: Callable[[list[int], list[int]], bool] | None = None,
    batching: Batching = "prepack",
) -> Any:
    """The tokens that follow `prompt` (ids, or a batch of them): a list of new ids, or one list for each prompt.

    temperature: divides the logits, 0 takes the most probable token each time; top_k: only the k most probable; top_p:
    only the most probable tokens that together reach this probability ("The Curious Case of Neural Text Degeneration",
    section 3.1); seed: one for all prompts or one each; end_ids: each ends a sequence and is left out; stop: is shown a prompt and its
    new ids after each of them and says whether they are enough; batching: how prompts are read (`prefill.plan`), which changes nothing
    but speed. The model may also be a transformers one, which reads its prompts one by one. Raises `InputError` for options out of range,
    an id that the model does not have, no room, a model that is not causal, and where the model's numbers are not finite.
    """
    single = len(prompt) > 0 and isinstance(prompt[0], int)
    prompts: list[list[int]] = [list(p) for p in ([prompt] if single else prompt)]  # type: ignore[arg-type, list-item]
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise InputError(f"{len(seeds)} seeds were given for {len(prompts)} prompts; give one seed, or one for each prompt.")
    options = _Options(max_new_tokens, temperature, top_k, top_p, frozenset(end_ids), stop)
    # Where rope depends on the length of the sequence, prompts of unequal length cannot share a pass.
    steady = steady_length(model.architecture) if hasattr(model, "architecture") else None  # type: ignore[arg-type]
    apart = steady is not None and max(map(len, prompts)) + max_new_tokens > steady
    groups = [[i] for i in range(len(prompts))] if apart else [list(range(len(prompts)))]
    results: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad():
        for group in groups:
            found = _continue(model, [prompts[i] for i in group], [seed_for(seeds[i], "generate") for i in group], batching, options)
            for i, new in zip(group, found, strict=True):
                results[i] = new
    return results[0] if single else results


class _Options(NamedTuple):
    new: int
    temperature: float
    top_k: int | None
    top_p: float | None
    end_ids: frozenset[int]
    stop: Callable[[list[int], list[int]], bool] | None


def _continue(model: nn.Module, prompts: list[list[int]], streams: list[int], batching: str, options: _Options) -> list[list[int]]:
    results: list[list[int]] = [[] for _ in prompts]
    step = _step_of(model, prompts, options.new, batching)
    rows = list(range(len(prompts)))
    logits = step.first()
    for index in range(options.new):
        chosen = choose(logits, [uniform(streams[row], index).item() for row in rows], options.temperature, options.top_k, options.top_p)
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token in options.end_ids:
                continue
            results[row].append(token)
            if options.stop is None or not options.stop(prompts[row], results[row]):
                going.append(place)
        if not going or index == options.new - 1:
            break
        if len(going) < len(rows):
            step.keep(going)
            rows, chosen = [rows[place] for place in going], [chosen[place] for place in going]
        logits = step.following(chosen)
    return results


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    front: str = "",
    stop: Sequence[str] = (),
) -> str:
    """The text that follows `prompt` (without it), up to the end of the document or the first of the `stop` strings.

    What stands in front is what the tokenizer puts there; an empty prompt begins a document. `front` begins a document and stands before
    the prompt, encoded apart from it, as metadata do in training. Options as in `generate`.
    """
    ids = [*tokenizer.prompt(front), *tokenizer.encode(prompt)] if front else tokenizer.prompt(prompt)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    (text,) = generate_texts(model, tokenizer, [ids], stop=stop, max_new_tokens=max_new_tokens, **options)
    return text


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    told: Callable[[str], object] | None = None,
    **options: Any,
) -> list[str]:
    """The text that follows each prompt (ids), up to the end of the document or the first of the `stop` strings. Options as in `generate`.

    A text is what transformers writes: what the new tokens add to the prompt. A stop string may be a token that is no text, or have one in it.
    `told` hears the text of a single prompt piece by piece, as soon as nothing that comes can change it.
    """
    ends, stops = limits.stops_of(tokenizer, stop)
    shown = any(token in text for text in stops for token in tokenizer.special_tokens)

    if told is not None and len(prompts) != 1:
        raise InputError(f"One text can be told as it comes, not {len(prompts)} at once.")
    heard: list[str] = []

    def written(prompt: Sequence[int], new: Sequence[int]) -> str:
        return tokenizer.continuation(prompt, new, special=shown)

    def finished(text: str) -> str:
        text = text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
        for token in tokenizer.special_tokens if shown else ():
            text = text.replace(token, "")
        return text

    def tell(text: str) -> None:
        known = "".join(heard)
        if told is not None and len(text) > len(known) and text.startswith(known):
            heard.append(text[len(known) :])
            told(heard[-1])

    def enough(prompt: Sequence[int], new: Sequence[int]) -> bool:
        text = written(prompt, new)
        if told is not None:
            tell(finished(_settled(text, stops)))
        return any(end in text for end in stops)

    watched = enough if stops or told is not None else None
    found = generate(model, prompts, end_ids=limits.end_ids(model, tokenizer) | ends, stop=watched, **options)
    texts = [finished(written(prompt, new)) for prompt, new in zip(prompts, found, strict=True)]
    tell(texts[0] if texts else "")
    return texts


def _settled(text: str, stops: Sequence[str]) -> str:
    """The beginning of a text that further tokens cannot change: without half a sign, and without what may become a stop string.

    Examples
    --------
    >>> _settled("so it ends.\\nUs", ["\\nUser:"])
    'so it ends.'
    """
    text = text.rstrip("\ufffd")
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held]


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The distribution that is sampled from: logits (..., V) to float64 probabilities (..., V) that sum to 1.

    Raises `InputError` where logits are no numbers, or none is finite.
    """
    wide = logits.double()
    highest = _highest(wide)
    scaled = (wide - highest) / temperature  # the largest is 0: nothing overflows, however low the temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        smallest = scaled.topk(top_k, -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    chances = scaled.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = chances.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses the threshold stays
        chances = chances.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return chances / chances.sum(-1, keepdim=True)


def choose(logits: Tensor, draws: Sequence[float], temperature: float, top_k: int | None, top_p: float | None) -> list[int]:
    """One token for each row of logits (B, V), given a uniform draw in [0, 1) for each; of tied tokens the first, at temperature 0.

    Raises `InputError` where logits are no numbers, or none is finite.
    """
    if temperature == 0:
        _highest(logits)
        return logits.argmax(-1).tolist()
    cumulated = probabilities(logits, temperature, top_k, top_p).cumsum(-1)
    target = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * cumulated[:, -1:]
    # Rounding may lift the target to the sum itself; the last token that has a probability is then meant, not one behind it.
    last = (cumulated < cumulated[:, -1:]).sum(-1)
    return torch.searchsorted(cumulated, target, right=True)[:, 0].minimum(last).tolist()


def _highest(logits: Tensor) -> Tensor:
    """The largest logit of each row (..., 1), which is a finite number only if no logit is nan or plus infinity, and not all are minus infinity."""
    highest = logits.amax(-1, keepdim=True)
    if not bool(highest.isfinite().all()):
        raise InputError(
            "The model's logits are not finite, so there is no next token; its weights are broken, or this precision is too low (try --dtype float32)."
        )
    return highest


def _check(model: nn.Module, prompts: list[list[int]], new: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    refuse: list[tuple[bool, str]] = [
        (not prompts or any(not p for p in prompts), "A prompt has no tokens; give it at least one."),
        (new < 1, f"max_new_tokens is {new}; ask for at least 1."),
        (not 0 <= temperature < float("inf"), f"temperature is {temperature}; it must be 0 (most probable token) or more."),
        (top_k is not None and top_k < 1, f"top_k is {top_k}; it must be at least 1, or left out."),
        (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}; it must lie in (0, 1], or be left out."),
    ]
    for wrong, sentence in refuse:
        if wrong:
            raise InputError(sentence)
    limits.check_ids(model, prompts)
    limits.require_causal(model)
    longest, room = max(len(p) for p in prompts) + new, limits.positions(model)
    if room is not None and longest > room:
        raise InputError(f"Prompt and new tokens make {longest} positions, the model has {room}; ask for at most {max(0, room - longest + new)} new tokens.")


def _step_of(model: Any, prompts: list[list[int]], new: int, batching: str) -> Any:
    """What gives the logits of each next token, by the kind of model."""
    if not hasattr(model, "architecture"):
        return _Foreign(model, prompts)
    if model.architecture.encoder_decoder:
        return Paired(model, prompts, new)
    return Prefixed(model, prompts, new) if model.architecture.reads_both_ways else _Cached(model, prompts, new, batching)


class _Cached:
    """Our decoder with a cache that the prompts have filled. Shorter prompts stand on the right; nobody looks left of them."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], new: int, batching: str) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.cache, held, _, _ = prefill(model, prompts, new, batching)
        self.last = [prompt[-1] for prompt in prompts]
        self.starts = torch.tensor([held + 1 - len(prompt) for prompt in prompts], device=self.device)

    def first(self) -> Tensor:
        return self.following(self.last)

    def following(self, chosen: list[int]) -> Tensor:
        mask = positions = None
        if int(self.starts.max()) > 0:
            mask = masks.padded(torch.arange(self.cache.capacity, device=self.device) >= self.starts[:, None])
            positions = self.cache.length - self.starts[:, None]
        ids = torch.tensor(chosen, device=self.device)[:, None]
        return self.model(ids, mask=mask, positions=positions, cache=self.cache, logits="last").logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=self.device)
        self.cache.keep(kept)
        self.starts = self.starts[kept]


class _Foreign:
    """Any transformers causal language model, one prompt at a time, with the cache that its family keeps, if it keeps one."""

    def __init__(self, model: nn.Module, prompts: list[list[int]]) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.sequences = [list(p) for p in prompts]
        self.pasts: list[Any] = [None] * len(prompts)
        # What transformers calls the cache of its families from version 5.24 on, and before.
        self.memory = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def first(self) -> Tensor:
        return torch.stack([self._read(row, row_ids) for row, row_ids in enumerate(self.sequences)])

    def following(self, chosen: list[int]) -> Tensor:
        for ids, token in zip(self.sequences, chosen, strict=True):
            ids.append(token)
        return torch.stack([self._read(row, ids if self.pasts[row] is None else ids[-1:]) for row, ids in enumerate(self.sequences)])

    def _read(self, row: int, ids: list[int]) -> Tensor:
        known = {} if self.pasts[row] is None else {self.memory: self.pasts[row]}
        output = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=True, **known)
        self.pasts[row] = getattr(output, self.memory, None)
        return output.logits[0, -1]

    def keep(self, rows: list[int]) -> None:
        self.sequences, self.pasts = [self.sequences[row] for row in rows], [self.pasts[row] for row in rows]
