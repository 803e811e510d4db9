"""What a checkpoint says item by item: looked at once, kept by digest, so that pairs and trajectories of checkpoints cost no model.

Files of items are JSON lines or a JSON list of objects. A measurement of this kind first looks at the model (`look`) and then
computes its scores from what it saw (`scores`), a pure function that comparisons of checkpoints use too.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn import catalog
from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.read import Checkpoint
from cairn.data import files
from cairn.errors import InputError, NotFoundError
from cairn.evaluation import results
from cairn.evaluation.compute import Compute
from cairn.evaluation.engine import engine_of
from cairn.evaluation.measure import Measurement
from cairn.evaluation.results import Score

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

Seen = dict[str, Any]
"""What was seen: plain values, most of them lists with one entry for each item. Where items have right answers, `right` says which were
given, and `said` what was answered (None: nothing that can be read)."""


class ItemMeasurement(Measurement):
    """Base of measurements whose single items are of interest."""

    path: Path
    """The items: JSON lines, or a JSON list."""
    items: int | None = None
    """How many, the first ones; default: all."""

    @abstractmethod
    def look(self, model: nn.Module, tokenizer: Tokenizer) -> Seen:
        """Item by item, as plain values that JSON can hold."""

    @abstractmethod
    def scores(self, seen: Seen) -> list[Score]:
        """The figures, from what was seen."""

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        return self.scores(self.look(model, tokenizer))

    def data_digest(self, feed: Feed | None = None) -> str:
        return blake3(existing(self.path).read_bytes()).hexdigest()

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["path"]  # the digest of its contents says which items, wherever they lie
        return described

    def rows(self, *keys: str) -> list[dict[str, Any]]:
        """The items that are measured. Raises `InputError` for one that lacks a key."""
        return load(self.path, keys)[: self.items]


def observe(
    source: str | Path | Checkpoint,
    measurement: ItemMeasurement,
    *,
    store: bool = True,
    compute: Compute | None = None,
    progress: Callable[[str], object] | None = None,
) -> Seen:
    """What a checkpoint says to a measurement item by item; taken from the results beside the checkpoint where it was looked at before."""
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    compute = compute or Compute()
    protocol = compute.protocol(measurement.protocol())
    digest = blake3(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    name = f"{checkpoint.model_digest[:16]}-{digest[:16]}.items.json"
    place = results.find(checkpoint, name)
    if store and place.is_file():
        return documents.read_object(place)["seen"]
    if checkpoint.tokenizer is None:
        raise InputError(f"{checkpoint.path} carries no tokenizer.json, so texts cannot be scored with it.")
    if progress is not None:
        progress(f"{checkpoint.path.name}: {catalog.name_of(measurement)}")
    seen = measurement.look(compute.model(checkpoint), checkpoint.tokenizer)
    if store:
        results.keep_file(checkpoint, name, {"model_digest": checkpoint.model_digest, "protocol_digest": digest, "protocol": protocol, "seen": seen})
    return seen


def existing(path: Path) -> Path:
    """The file of items, which must be there."""
    if not path.is_file():
        raise NotFoundError(f"There is no file {path} of items.")
    return path


def load(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON lines or JSON file, all of which have these keys. Raises `InputError` that names the item, and as `files.rows`."""
    found = _list(existing(path)) if files.kind_of(path) == ".json" else [row for _, row in files.rows(existing(path))]
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} holds no items.")
    for number, row in enumerate(found, 1):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            known = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{path}, item {number} has no '{missing[0]}' (it has {known}); name the keys of your items in the options.")
    return found


def _list(path: Path) -> Any:
    """The document of a JSON file. Raises `DamagedError` for what is not sound JSON, and as `files.parts`."""
    return documents.parse("".join(files.parts(path)), path)


def encoded_from(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[int]]:
    """Ids of each (before, after) joined, with what the tokenizer puts in front, and the place of the first token that reaches into `after`.

    By the offsets of the joined text: a token across the border counts to `after`, however it is cut. At least one id stands before.
    """
    sequences, starts = [], []
    for encoding, (before, _) in zip(tokenizer.backend.encode_batch([a + b for a, b in texts], add_special_tokens=False), texts, strict=True):
        inside = sum(end <= len(before) for _, end in encoding.offsets)
        begin = tokenizer.front if inside else tokenizer.prompt("")
        sequences.append([*begin, *encoding.ids])
        starts.append(max(1, len(begin) + inside))
    return sequences, starts


def greedy_matches(model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int], batch_tokens: int | None = None) -> list[bool | None]:
    """Whether greedy decoding from `starts` on would write exactly the rest of each sequence; nothing is generated.

    A sequence is what greedy decoding writes if and only if each of its tokens is the first of the most probable ones after those before it.
    None where the model's numbers are not finite.
    """
    engine = engine_of(model, budget_tokens=batch_tokens)
    return [None if math.isnan(scored.logprob) else scored.greedy for scored in engine.score(sequences, starts)]


def right_of(seen: Seen) -> NDArray[np.bool_]:
    """Which items were answered right. Raises `InputError` where the model's numbers were not finite, or the task has no right answers."""
    if "right" not in seen:
        raise InputError("This task has no right and wrong answers item by item.")
    if None in seen["right"]:
        raise InputError(f"{seen['right'].count(None)} of {len(seen['right'])} answers are not known: the model's numbers are not finite; check its weights.")
    return np.array(seen["right"], bool)
