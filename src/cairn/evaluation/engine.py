"""The request engine: every score that cairn computes from a model's probabilities comes from here.

Three requests, after the conventions of lm-evaluation-harness: the log-likelihood of a continuation after a context, the rolling
log-likelihood of a whole text, and generation. Requests are sorted, share their common beginnings, are packed into rows
(`generate.prepack`), and only the positions that are asked for meet the vocabulary. What shares a row changes nothing beyond the
order of floating-point additions.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn.errors import InputError
from cairn.evaluation.sharing import gathered, share_of
from cairn.generation import prepack

if TYPE_CHECKING:
    import torch
    from torch import nn

BUDGET_TOKENS = 8192
"""Tokens of one forward pass."""
LOGITS_BYTES = 64 * 2**20
"""Bytes of float32 logits that one forward pass may make."""


class Scored(NamedTuple):
    """The answer to a request: log-probability in nats, whether every token was the most probable one, and how many tokens were scored."""

    logprob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: rows, the positions whose logits are wanted, and for each target its row of logits, its id and its place in the answers."""

    batch: prepack.Batch
    chosen: NDArray[np.int64]
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    places: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """How requests are read. `offsets` (n + 1,) delimit each request's targets in the answers; `processed` counts tokens, padding included."""

    passes: list[Pass]
    offsets: NDArray[np.int64]

    @property
    def processed(self) -> int:
        return sum(p.batch.tokens.size for p in self.passes)


class Engine:
    """Answers requests with one model. `tokenizer` is needed for requests in words; answers are remembered as long as the engine lives."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, budget_tokens: int | None = None, row_tokens: int | None = None) -> None:
        from cairn.evaluation import reading

        self.model, self.tokenizer = model, tokenizer
        self.budget, self.row_tokens = budget_tokens or BUDGET_TOKENS, row_tokens or prepack.ROW_TOKENS
        self.way = reading.way_of(model)
        self.pinned = False
        """Whether the size of a pass was set for all that measure with this engine."""
        self.processed = 0
        """Tokens read so far, padding included."""
        self._known: dict[tuple[int, bytes], Scored] = {}

    @functools.cached_property
    def longest(self) -> int | None:
        """Positions that the model has, if it says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def config(self) -> Any:
        """Sizes of the model, ours or transformers'."""
        model: Any = self.model
        return model.architecture if hasattr(model, "architecture") else model.config.get_text_config()

    def sized(self, *, budget_tokens: int | None = None, row_tokens: int | None = None) -> Engine:
        """This engine, or one with passes of another size that shares its model and its memory."""
        if self.pinned or (budget_tokens in (None, self.budget) and row_tokens in (None, self.row_tokens)):
            return self
        other = copy.copy(self)
        other.budget, other.row_tokens = budget_tokens or self.budget, row_tokens or self.row_tokens
        return other

    # -- in words -----------------------------------------------------------------------------------------------

    def encode(self, pairs: Sequence[tuple[str, str]], *, begin: bool = True) -> tuple[list[list[int]], list[int]]:
        """Ids of context and continuation together, and where the continuation starts.

        Both are encoded as one text and split by the length of the context alone, white space at the end of the context belonging
        to the continuation. `begin` puts in front what the tokenizer puts there, or the id with which texts begin where there would be no
        context at all; at least one token always comes before.
        """
        key = blake3(f"{self.tokenizer.digest} {self.tokenizer.begin_id} {begin}".encode())
        for context, continuation in pairs:
            key.update(f"{len(context)} {len(continuation)} {context}{continuation}".encode())
        return _newest(_encoded, key.digest(), lambda: self._encode(pairs, begin))

    def _encode(self, pairs: Sequence[tuple[str, str]], begin: bool) -> tuple[list[list[int]], list[int]]:
        moved = []
        for context, continuation in pairs:
            bare = context.rstrip()
            moved.append((bare, context[len(bare) :] + continuation))
        front = self.tokenizer.front if begin else []
        alone = front or ([self.tokenizer.begin_id] if begin and self.tokenizer.begin_id is not None else [])
        wholes = self.tokenizer.encode_batch([context + continuation for context, continuation in moved])
        contexts = list(dict.fromkeys(context for context, _ in moved))
        sizes = dict(zip(contexts, map(len, self.tokenizer.encode_batch(contexts)), strict=True))
        fronts = [front if sizes[context] else alone for context, _ in moved]
        sequences = [before + ids for before, ids in zip(fronts, wholes, strict=True)]
        starts = [max(1, min(len(before) + sizes[context], len(ids) - 1)) for (context, _), before, ids in zip(moved, fronts, sequences, strict=True)]
        return sequences, starts

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], *, begin: bool = True) -> list[Scored]:
        """Log-probability of each continuation after its context."""
        return self.score(*self.encode(pairs, begin=begin))

    def rolling(self, texts: Sequence[str], *, begin: bool = True) -> list[Scored]:
        """Log-probability of each whole text. A text longer than the model is read in windows, each with as much context as fits."""
        front = self.tokenizer.prompt("") if begin else []
        return self.score_rolling([front + ids for ids in self.tokenizer.encode_batch(list(texts))])

    def generate(
        self,
        contexts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        begin: bool = True,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """The text that follows each context, up to the first of the `stop` strings or the end of the document.

        Options as in `cairn.generation.sample.generate`. A context that leaves no room for the new tokens is cut on its left.
        """
        front, empty = self.tokenizer.front if begin else [], self.tokenizer.prompt("")
        prompts = [[*front, *ids] or empty for ids in self.tokenizer.encode_batch(list(contexts))]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return self.continued(prompts, max_new_tokens=max_new_tokens, stop=stop, **options)

    def continued(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128, stop: Sequence[str] = (), **options: Any) -> list[str]:
        """The text that follows each prompt of ids; as `generate`."""
        from cairn.generation import sample

        room = max(1, (self.longest or 2**31) - max_new_tokens)
        fitted = [list(prompt[-room:]) for prompt in prompts]
        texts = [""] * len(fitted)
        for group in self._groups(fitted, max_new_tokens):
            found = sample.generate_texts(self.model, self.tokenizer, [fitted[i] for i in group], stop=stop, max_new_tokens=max_new_tokens, **options)
            for i, text in zip(group, found, strict=True):
                texts[i] = text
        return texts

    def _groups(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Prompts of similar length, as many at once as the budget allows."""
        groups: list[list[int]] = []
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            if not groups or (len(groups[-1]) + 1) * (len(prompts[groups[-1][0]]) + new) > self.budget:
                groups.append([])
            groups[-1].append(i)
        return groups

    # -- in ids -------------------------------------------------------------------------------------------------

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[Scored]:
        """Log-probability of the tokens of each sequence from its `starts` on (default: after the first), given those before.

        A context that does not fit the model is cut on its left, as in lm-evaluation-harness; raises `InputError` when the
        continuation alone does not fit or an id is not the model's. What the model says of one sequence never depends on the others: where its
        numbers are not finite, that score alone is nan. Under torch.distributed each process reads a share and all get all answers.
        """
        asked = [self._fitted(sequence, starts[i] if starts is not None else 1) for i, sequence in enumerate(sequences)]
        keys = [(start, np.asarray(ids, np.int32).tobytes()) for ids, start in asked]
        fresh = {key: request for key, request in zip(keys, asked, strict=True) if key not in self._known}
        if fresh:
            values, greedy, offsets = self._answers([ids for ids, _ in fresh.values()], [start for _, start in fresh.values()])
            each = (Scored(float(values[a:b].sum()), bool(greedy[a:b].all()), int(b - a)) for a, b in pairwise(offsets))
            self._known |= zip(fresh, each, strict=True)
        return [self._known[key] for key in keys]

    def token_scores(self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[NDArray[np.float64]]:
        """Log-probability of each token of each sequence from its `starts` on (default: after the first)."""
        return [logs for logs, _ in self.token_answers(sequences, starts)]

    def token_answers(self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """As `token_scores`, and whether each token was the most probable one."""
        asked = [self._fitted(sequence, starts[i] if starts is not None else 1) for i, sequence in enumerate(sequences)]
        values, greedy, offsets = self._answers([ids for ids, _ in asked], [start for _, start in asked])
        return [(values[a:b], greedy[a:b]) for a, b in pairwise(offsets)]

    def score_rolling(self, sequences: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probability of each sequence after its first token, in windows of as many tokens as the model has positions, the last one full too."""
        window = self.longest or max(map(len, sequences), default=1)
        pieces, starts = [], []
        for i, sequence in enumerate(sequences):
            for at in range(1, len(sequence), window):
                end = min(at + window, len(sequence))
                pieces.append((i, list(sequence[max(0, end - window - 1) : end])))
                starts.append(at - max(0, end - window - 1))
        found = self.score([piece for _, piece in pieces], starts)
        totals = [Scored(0.0, True, 0) for _ in sequences]
        for (i, _), part in zip(pieces, found, strict=True):
            totals[i] = Scored(totals[i].logprob + part.logprob, totals[i].greedy and part.greedy, totals[i].tokens + part.tokens)
        return totals

    def _fitted(self, sequence: Sequence[int], start: int) -> tuple[list[int], int]:
        extra = len(sequence) - 1 - (self.longest or len(sequence))
        if extra <= 0 or (self.way.longest is not None and hasattr(self.model, "architecture")):
            return list(sequence), start
        if start - extra < 1:
            raise InputError(
                f"A continuation of {len(sequence) - start} tokens does not fit the model, which has {self.longest} positions; score it as a rolling text."
            )
        return list(sequence[extra:]), start - extra

    def _answers(self, sequences: list[list[int]], starts: list[int]) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
        """Log-probability of every wanted token, whether it is the greedy one, and the offsets of each sequence's own."""
        from cairn.generation import limits

        limits.check_ids(self.model, sequences)
        read = self._wholes if getattr(self.config, "reads_both_ways", False) else self._rows
        values, greedy, offsets = read(sequences, starts, apart=False)
        # Attention gives a masked neighbour weight 0, and 0 times nan is nan: what shared a row with it is asked again, in rows of its own.
        again = [i for i, (a, b) in enumerate(pairwise(offsets)) if np.isnan(values[a:b]).any()] if np.isnan(values).any() else []
        for numbers in _of_one_size(again, sequences, starts):
            found = read([sequences[i] for i in numbers], [starts[i] for i in numbers], apart=True)
            places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in numbers])
            values[places], greedy[places] = found[0], found[1]
        return values, greedy, offsets

    def _rows(self, sequences: list[list[int]], starts: list[int], *, apart: bool) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
        """As `_answers`, read in packed rows; `apart` gives each sequence a row of its own."""
        import torch

        way = self.way
        packs = way.packs and not apart and self.budget > 1  # a pass of one token at most is one text at a time
        bounds = Bounds(self.budget, self.row_tokens, max(1, LOGITS_BYTES // (4 * self.config.vocab_size)), packs, way.batches, way.longest)
        made = plan(sequences, starts, bounds)
        device = next(self.model.parameters()).device
        found = np.zeros((2, int(made.offsets[-1])))
        with torch.inference_mode():
            for number in share_of(len(made.passes), self.model).tolist():
                one = made.passes[number]
                self.processed += one.batch.tokens.size
                arrays = [torch.from_numpy(a).to(device) for a in (one.batch.tokens, one.batch.positions, one.batch.ends, one.chosen)]
                logits = way.read(*arrays)
                values, greedy = picked(logits, torch.from_numpy(one.rows).to(device), torch.from_numpy(one.targets).to(device))
                found[0, one.places], found[1, one.places] = values.double().cpu().numpy(), greedy.cpu().numpy()
        found = gathered(found, self.model)
        return found[0], found[1] > 0, made.offsets

    def _wholes(self, sequences: list[list[int]], starts: list[int], *, apart: bool) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
        """As `_answers`, of a model that reads contexts in both directions; `apart` reads one sequence at a time."""
        import torch

        from cairn.evaluation import bidirectional  # which loads torch, and this module tells of costs without it

        sizes = [max(0, len(tokens) - start) for tokens, start in zip(sequences, starts, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        asked = bidirectional.groups(sequences, starts, 1 if apart else self.budget, max(1, LOGITS_BYTES // (4 * self.config.vocab_size)))
        found = np.zeros((2, int(offsets[-1])))
        with torch.inference_mode():
            for number in share_of(len(asked), self.model).tolist():
                group = asked[number]
                self.processed += bidirectional.processed(group)
                targets = torch.tensor([token for one in group for token in one.tokens[one.start :]])
                logits = bidirectional.logits_of(self.model, group)
                values, greedy = picked(logits, torch.arange(len(targets), device=logits.device), targets.to(logits.device))
                places = np.concatenate([np.arange(offsets[one.number], offsets[one.number + 1]) for one in group])
                found[0, places], found[1, places] = values.double().cpu().numpy(), greedy.cpu().numpy()
        found = gathered(found, self.model)
        return found[0], found[1] > 0, offsets


def picked(logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets` (n,) in rows `rows` (n,) of logits (N, V), in float32 at least, and whether each is what greedy decoding takes:
    the first of the most probable ones. What is not finite is nan and never greedy."""
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    highest = logits.amax(-1)
    chosen = logits[rows, targets]
    greedy = chosen >= highest[rows]
    places = greedy.nonzero()[:, 0]
    greedy[places] = logits[rows[places]].argmax(-1) == targets[places]  # of tied ones the first
    totals = logits.sub_(highest[:, None]).exp_().sum(-1).log_() + highest
    return chosen - totals[rows], greedy & totals[rows].isfinite()


def _of_one_size(numbers: Sequence[int], sequences: list[list[int]], starts: list[int]) -> list[list[int]]:
    """Numbers of sequences, in groups of equal length and start: such rows need no padding, which could be anything too."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        groups.setdefault((len(sequences[number]), starts[number]), []).append(int(number))
    return list(groups.values())


@dataclass(frozen=True)
class Bounds:
    """What passes may be: tokens of a pass, tokens of a row, positions that meet the vocabulary, and what the model bears (`reading.Way`)."""

    budget: int = BUDGET_TOKENS
    row_tokens: int = prepack.ROW_TOKENS
    most_logits: int = 2**62
    packs: bool = True
    batches: bool = True
    longest: int | None = None


def plan(sequences: Sequence[Sequence[int]], starts: Sequence[int], bounds: Bounds = Bounds()) -> BatchPlan:
    """How to read requests: sequences (ids) whose tokens from `starts` on are wanted. The newest plans are kept, for the next checkpoint."""
    key = blake3(repr(bounds).encode())
    for sequence, start in zip(sequences, starts, strict=True):
        key.update(np.array([len(sequence), start, *sequence], np.int32).tobytes())
    return _newest(_plans, key.digest(), lambda: _plan(sequences, starts, bounds))


def _newest(kept: dict[bytes, Any], key: bytes, make: Callable[[], Any]) -> Any:
    """What is kept under a key, or made now; the newest few stay."""
    kept[key] = kept.pop(key) if key in kept else make()
    while len(kept) > KEPT:
        del kept[next(iter(kept))]
    return kept[key]


KEPT = 16
_plans: dict[bytes, BatchPlan] = {}
_encoded: dict[bytes, tuple[list[list[int]], list[int]]] = {}


def _plan(sequences: Sequence[Sequence[int]], starts: Sequence[int], bounds: Bounds) -> BatchPlan:
    sizes = [max(0, len(sequence) - start) for sequence, start in zip(sequences, starts, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    scored = [i for i, size in enumerate(sizes) if size]
    apart = [i for i in scored if not bounds.batches or (bounds.longest is not None and len(sequences[i]) - 1 > bounds.longest)]
    together = sorted(set(scored) - set(apart))
    groups = [(together, bounds.budget), *(([i], 1) for i in apart)]
    passes = []
    for group, budget in groups:
        forest = prepack.trees([sequences[i][:-1] for i in group], [starts[i] - 1 for i in group], share=bounds.packs, most=bounds.longest)
        row_tokens = min(bounds.row_tokens, bounds.longest or bounds.row_tokens)
        made = prepack.batches(forest, budget, row_tokens, most_wanted=bounds.most_logits, pack=bounds.packs and len(group) > 1)
        passes += [_pass(batch, group, sequences, starts, offsets) for batch in made]
    return BatchPlan(passes, offsets)


def _pass(batch: prepack.Batch, group: list[int], sequences: Sequence[Sequence[int]], starts: Sequence[int], offsets: NDArray[np.int64]) -> Pass:
    width = batch.tokens.shape[1]
    chosen, rows = np.unique(np.concatenate([row * width + path for _, row, path in batch.places]), return_inverse=True)
    numbers = [group[text] for text, _, _ in batch.places]
    targets = np.concatenate([np.asarray(sequences[i][starts[i] :], np.int64) for i in numbers])
    places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in numbers])
    return Pass(batch, chosen, rows, targets, places)


def engine_of(model: nn.Module, tokenizer: Any = None, **options: Any) -> Engine:
    """The engine that was shared for a model, or a new one. A model in training must get a new one each time: its answers change."""
    found = _shared.get(model)
    if found is None:
        return Engine(model, tokenizer, **options)
    found.tokenizer = tokenizer or found.tokenizer
    return found.sized(**options)


def share(model: nn.Module, tokenizer: Any = None, *, budget_tokens: int | None = None) -> Engine:
    """Let all that measure a model, which will not change, use one engine and its memory. Lasts as long as the model.

    `budget_tokens` is then the size of every forward pass, whatever a measurement asks for.
    """
    found = _shared.setdefault(model, Engine(model, tokenizer))
    if budget_tokens is not None:
        found.budget, found.pinned = budget_tokens, True
    return found


_shared: weakref.WeakKeyDictionary[Any, Engine] = weakref.WeakKeyDictionary()
