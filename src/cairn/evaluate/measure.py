"""Measurements: checkpoint (and data) to numbers, kept beside what was measured.

A result belongs to the digest of the model and to the digest of the protocol: the measurement, its options and its data.
Asking again for the same pair costs nothing, whoever asks and under whatever path the checkpoint now lies.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from cairn import catalog
from cairn.checkpoint import lineage, read
from cairn.checkpoint.place import is_store
from cairn.checkpoint.read import Checkpoint
from cairn.errors import InputError
from cairn.options import Options, configure, method_options, override

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.feed import Feed
    from cairn.data.tokenizer import Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class Score:
    """One number: what of which task, its standard error, on how many items, and what guessing would give."""

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    chance: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the tidy table: a score and the checkpoint that it belongs to."""

    run: str
    checkpoint: str
    step: int | None
    tokens: int | None
    task: str
    metric: str
    value: float
    stderr: float
    n: int
    chance: float | None
    protocol: str
    digest: str


class Measurement(Options, ABC):
    """Base of all measurements."""

    @abstractmethod
    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        """Measure a model in evaluation mode. `feed` is the data of its own run, where they are known."""

    def data_digest(self, feed: Feed | None = None) -> str:
        """Identity of the data that the numbers depend on besides the model."""
        return ""

    def needs_feed(self) -> bool:
        """Whether the measurement is made on the run's own data."""
        return False

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        """Everything but the model that decides the numbers."""
        return {"format": FORMAT, **method_options(self), "data": self.data_digest(feed)}


def evaluate(
    source: str | Path | Checkpoint | Sequence[str | Path | Checkpoint],
    tasks: Iterable[Any] = ("held-out",),
    *,
    store: bool = True,
    progress: Callable[[str], object] | None = None,
) -> list[Row]:
    """Measure a checkpoint, every checkpoint of a run, or several of them; returns the tidy table.

    `tasks` are names of measurements or mappings with `name` and options. What was measured before under the same
    digests is taken from the results beside the checkpoint; `store=False` neither looks nor keeps.
    """
    measurements = [configure("measurement", task) for task in tasks]
    rows: list[Row] = []
    for checkpoint in _checkpoints(source):
        rows += _Subject(checkpoint, store, progress).rows(measurements)
    return rows


def with_options(tasks: Iterable[str], settings: Iterable[str]) -> list[dict[str, Any]]:
    """Tasks as mappings, with options written `task.key=value`, or `key=value` where there is one task only."""
    chosen: dict[str, Any] = {task.strip(): {"name": task.strip()} for task in tasks}
    only = next(iter(chosen)) if len(chosen) == 1 else None
    for setting in settings:
        task, dot, _ = setting.partition("=")[0].partition(".")
        if dot and task in chosen:
            chosen[task] = override(chosen[task], [setting.removeprefix(f"{task}.")])
        elif only is not None:
            chosen[only] = override(chosen[only], [setting])
        else:
            raise InputError(f"'{setting}' belongs to no task; write it as TASK.KEY=VALUE with one of {', '.join(chosen)}.")
    return list(chosen.values())


class _Subject:
    """One checkpoint under measurement: model and data are opened only if some result is not there yet."""

    def __init__(self, checkpoint: Checkpoint, store: bool, progress: Callable[[str], object] | None) -> None:
        self.checkpoint, self.store, self.progress = checkpoint, store, progress
        self._model: nn.Module | None = None
        self._feeds: dict[str, Feed] = {}

    def rows(self, measurements: Sequence[Measurement]) -> list[Row]:
        found = []
        for measurement in measurements:
            feed = self._feed() if measurement.needs_feed() else None
            protocol = measurement.protocol(feed)
            digest = blake3(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
            place = results_folder(self.checkpoint) / f"{self.checkpoint.model_digest[:16]}-{digest[:16]}.json"
            scores = _stored(place) if self.store else None
            if scores is None:
                scores = self._measure(measurement, feed)
                if self.store:
                    _keep(place, self.checkpoint, protocol, digest, scores)
            found += [self._row(score, digest) for score in scores]
        return found

    def _measure(self, measurement: Measurement, feed: Feed | None) -> list[Score]:
        if self.progress is not None:
            self.progress(f"{self.checkpoint.path.name}: {catalog.name_of(measurement)}")
        if self.checkpoint.tokenizer is None:
            raise InputError(f"{self.checkpoint.path} carries no tokenizer.json, so texts can not be scored with it.")
        if self._model is None:
            self._model = self.checkpoint.model()
        return measurement.of(self._model, self.checkpoint.tokenizer, feed)

    def _feed(self) -> Feed:
        from cairn.train.recipe import Recipe
        from cairn.train.sources import open_data

        recipe = recipe_behind(self.checkpoint)
        if recipe is None:
            raise InputError(
                f"{self.checkpoint.path} does not say on which data it was trained, so it has no held-out part of its own; "
                "name a text to measure on: held-out corpus=NAME_OR_PATH."
            )
        parsed = Recipe.parse(recipe, "recipe in lineage")
        key = json.dumps(parsed.data.model_dump(mode="json"))
        if key not in self._feeds:
            self._feeds[key] = open_data(parsed.data, parsed.seed, self.checkpoint.tokenizer)[1]
        return self._feeds[key]

    def _row(self, score: Score, protocol: str) -> Row:
        c = self.checkpoint
        folder = c.path.resolve().parent
        run = folder.parent.name if folder.name == "checkpoints" else folder.name
        return Row(run, c.path.name, c.step, c.tokens, **asdict(score), protocol=protocol, digest=c.model_digest)


def results_folder(checkpoint: Checkpoint) -> Path:
    """Where results of a checkpoint are kept: `results/` of its run, or beside it."""
    folder = checkpoint.path.resolve().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "results"


def recipe_behind(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The recipe with which a checkpoint, or the nearest ancestor of one that came from an operation, was trained."""
    if checkpoint.lineage is not None and "recipe" in checkpoint.lineage.options:
        return checkpoint.lineage.options["recipe"]
    for _, _, ancestor in lineage.ancestors(checkpoint):
        if ancestor is not None and ancestor.lineage is not None and "recipe" in ancestor.lineage.options:
            return ancestor.lineage.options["recipe"]
    return None


def _checkpoints(source: str | Path | Checkpoint | Sequence[str | Path | Checkpoint]) -> list[Checkpoint]:
    if isinstance(source, Checkpoint):
        return [source]
    if isinstance(source, (str, Path)):
        inside = read.list_checkpoints(source)
        return [read.open(path) for path in inside] if inside else [read.open(source)]
    return [checkpoint for item in source for checkpoint in _checkpoints(item)]


def _stored(place: Path) -> list[Score] | None:
    try:
        kept = json.loads(place.read_text())["scores"]
        return [Score(**score | {"stderr": math.nan if score["stderr"] is None else score["stderr"]}) for score in kept]
    except FileNotFoundError:
        return None


def _keep(kept: Path, checkpoint: Checkpoint, protocol: dict[str, Any], digest: str, scores: list[Score]) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    document = {
        "model_digest": checkpoint.model_digest,
        "protocol_digest": digest,
        "protocol": protocol,
        "versions": lineage.versions(),
        "scores": [asdict(score) | {"stderr": score.stderr if math.isfinite(score.stderr) else None} for score in scores],
    }
    text = json.dumps(document, indent=1) + "\n"
    if is_store(kept):
        kept.write_text(text)  # an object appears whole
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text)
    os.replace(beside, kept)
