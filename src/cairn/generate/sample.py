"""Continue token sequences: greedy or sampled, one prompt or many.

What is drawn for a prompt depends on its seed, its tokens and the options alone: every draw is a number computed from
(seed, index of the new token), so neither torch's global generator nor the other prompts of a batch have a say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cairn.data.random import seed_for, uniform
from cairn.errors import InputError
from cairn.generate.cache import KeyValueCache
from cairn.models import masks


def generate(
    model: nn.Module,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    eos_id: int | None = None,
) -> Any:
    """The tokens that follow `prompt` (ids, or a batch of them): a list of new ids, or one list for each prompt.

    temperature: divides the logits, 0 takes the most probable token each time; top_k: only the k most probable; top_p:
    only the most probable tokens that together reach this probability ("The Curious Case of Neural Text Degeneration",
    section 3.1); seed: one for all prompts or one each; eos_id: ends a sequence and is left out. The model may also be a
    transformers one, which is then run without a cache. Raises `InputError` for options out of range or no room.
    """
    single = len(prompt) > 0 and isinstance(prompt[0], int)
    prompts: list[list[int]] = [list(p) for p in ([prompt] if single else prompt)]  # type: ignore[arg-type, list-item]
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise InputError(f"{len(seeds)} seeds were given for {len(prompts)} prompts; give one seed, or one for each prompt.")
    streams = [seed_for(s, "generate") for s in seeds]
    results: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    with torch.no_grad():
        step = _Cached(model, prompts, max_new_tokens) if hasattr(model, "architecture") else _Uncached(model, prompts)
        logits = step.first()
        for index in range(max_new_tokens):
            chosen = choose(logits, [uniform(s, index).item() for s in streams], temperature, top_k, top_p)
            for row, token in enumerate(chosen):
                finished[row] = finished[row] or token == eos_id
                if not finished[row]:
                    results[row].append(token)
            if all(finished) or index == max_new_tokens - 1:
                break
            logits = step.following(chosen)
    return results[0] if single else results


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
) -> str:
    """The text that follows `prompt` (without it), up to the end of the document. An empty prompt begins a document."""
    ids = tokenizer.encode(prompt) or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    found = generate(model, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, eos_id=tokenizer.eos_id)
    return tokenizer.decode(found)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The distribution that is sampled from: logits (..., V) to float64 probabilities (..., V) that sum to 1."""
    scaled = logits.double() / temperature
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
    """One token for each row of logits (B, V), given a uniform draw in [0, 1) for each."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    cumulated = probabilities(logits, temperature, top_k, top_p).cumsum(-1)
    target = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].tolist()


def _check(model: nn.Module, prompts: list[list[int]], new: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    refuse: list[tuple[bool, str]] = [
        (not prompts or any(not p for p in prompts), "A prompt has no tokens; give it at least one."),
        (new < 1, f"max_new_tokens is {new}; ask for at least 1."),
        (not temperature >= 0, f"temperature is {temperature}; it must be 0 (most probable token) or more."),
        (top_k is not None and top_k < 1, f"top_k is {top_k}; it must be at least 1, or left out."),
        (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}; it must lie in (0, 1], or be left out."),
    ]
    for wrong, sentence in refuse:
        if wrong:
            raise InputError(sentence)
    architecture = getattr(model, "architecture", None)
    if architecture is None:
        return
    largest = max(max(p) for p in prompts)
    if largest >= architecture.vocab_size or min(min(p) for p in prompts) < 0:
        raise InputError(f"The prompt has token {largest}, the model's vocabulary ends at {architecture.vocab_size - 1}; is it another tokenizer's?")
    longest, room = max(len(p) for p in prompts) + new, architecture.max_position_embeddings
    stretches = (architecture.rope_scaling or {}).get("rope_type") == "dynamic"
    if longest > room and not stretches:
        raise InputError(f"Prompt and new tokens make {longest} positions, the model has {room}; ask for at most {max(0, room - longest + new)} new tokens.")


class _Cached:
    """Our decoder with a cache. Shorter prompts are padded on the left, where nobody looks."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], new: int) -> None:
        self.model, self.device = model, next(model.parameters()).device
        longest = max(len(p) for p in prompts)
        self.ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        self.starts = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        dtype = next(model.parameters()).dtype
        self.cache = KeyValueCache(model.architecture, len(prompts), longest + new, dtype=dtype, device=self.device)  # type: ignore[arg-type]
        self.mask: masks.Mask | None = None
        if int(self.starts.max()) > 0:
            valid = torch.arange(longest + new, device=self.device) >= self.starts[:, None]
            self.mask = masks.padded(valid)

    def first(self) -> Tensor:
        return self._forward(self.ids)

    def following(self, chosen: list[int]) -> Tensor:
        return self._forward(torch.tensor(chosen, device=self.device)[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        positions = None
        if self.mask is not None:
            begin = self.cache.length
            positions = (torch.arange(begin, begin + ids.shape[1], device=self.device) - self.starts[:, None]).clamp(min=0)
        return self.model(ids, mask=self.mask, positions=positions, cache=self.cache, logits="last").logits[:, -1]


class _Uncached:
    """Any transformers causal language model, read again from the start for each token, one prompt at a time."""

    def __init__(self, model: nn.Module, prompts: list[list[int]]) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.sequences = [list(p) for p in prompts]

    def first(self) -> Tensor:
        rows = [torch.tensor([ids], device=self.device) for ids in self.sequences]
        return torch.stack([self.model(input_ids=row, use_cache=False).logits[0, -1] for row in rows])

    def following(self, chosen: list[int]) -> Tensor:
        for ids, token in zip(self.sequences, chosen, strict=True):
            ids.append(token)
        return self.first()
