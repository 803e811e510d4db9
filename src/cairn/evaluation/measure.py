"""Measurements: checkpoint (and data) to numbers, kept beside what was measured.

A result belongs to the digest of the model and to the digest of the protocol: the measurement, its options and its data.
Asking again for the same pair costs nothing, wherever the checkpoint now lies.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from blake3 import blake3

from cairn import catalog
from cairn.checkpoint.format import descent, read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError, NotFoundError
from cairn.evaluation import results
from cairn.evaluation.compute import Compute
from cairn.evaluation.results import Score
from cairn.options import Options, configure, method_options, override
from cairn.statistics import interval

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed

FORMAT = 2
"""Of the protocol: 2 counts the bytes of the text that was scored, puts in front what the tokenizer says, and takes the first of tied tokens."""
AHEAD_BYTES = 2 * 2**30
"""Largest model that is read while another is measured."""


@dataclass(frozen=True)
class ResultRow:
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
    samples: int | None = None
    """How far a field that counts samples was trained; `tokens` is then None."""

    @property
    def units(self) -> int | None:
        """How far the checkpoint was trained, in what its field counts."""
        return self.tokens if self.tokens is not None else self.samples

    @property
    def unit(self) -> str:
        """What that counts."""
        return "samples" if self.tokens is None and self.samples is not None else "tokens"

    @property
    def interval(self) -> str:
        """The 95 % interval in words: Wilson's for a proportion."""
        return " to ".join(f"{end:.4f}" for end in interval(self.value, self.stderr, self.n))


class Measurement(Options, ABC):
    """Base of all measurements."""

    reads: ClassVar[str] = "tokens"
    """What the models that it measures read, in the words of the fields: tokens, images."""

    catalog_kind: ClassVar[str] = "measurement"
    one_at_a_time: ClassVar[Mapping[str, Any]] = {}
    """Its options under which one sample passes through the model at a time; what the request engine plans needs none (`batch_tokens` of evaluate)."""
    by_block: ClassVar[bool] = False
    """Whether a checkpoint is measured by `of_checkpoint`, which loads no more than a block of the model at a time."""

    @abstractmethod
    def of(self, model: nn.Module, preprocessor: Any, feed: Feed | None = None) -> list[Score]:
        """Measure a model in evaluation mode, given the preprocessor that its checkpoint carries (of text: the tokenizer). `feed` is the data of
        its own run, where they are known."""

    def of_checkpoint(self, checkpoint: Checkpoint, device: str | None = None) -> list[Score]:
        """Measure a checkpoint block by block; of measurements that say `by_block`."""
        raise NotImplementedError(f"{type(self).__name__} measures whole models")

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
    tasks: Iterable[Any] | None = None,
    *,
    store: bool = True,
    device: Any = None,
    dtype: str = "float32",
    batch_tokens: int | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[ResultRow]:
    """Measure a checkpoint, every checkpoint of a run, or several of them; returns the tidy table.

    `tasks` are names of measurements or mappings with `name` and options; None: what the field of the (first) checkpoint is measured by,
    `held-out` for text, `accuracy` for labelled samples. What was measured before under the same
    digests is taken from the results beside the checkpoint, each result is kept as soon as it is there, and the next
    checkpoint is read while one is measured; `store=False` neither looks nor keeps. device, dtype and batch_tokens say how it is
    computed: see `cairn.evaluation.compute.Compute`. A figure that is not finite is nan, is kept as null, and `progress` is told.
    """
    feeds: dict[str, Feed] = {}
    compute = Compute(device, dtype, batch_tokens)
    checkpoints = _checkpoints(source)
    measurements = [configure("measurement", task) for task in ([default_task(checkpoints[0])] if tasks is None and checkpoints else tasks or ())]
    subjects = [_Subject(checkpoint, store, feeds, compute, progress) for checkpoint in checkpoints]
    asked = [subject.missing(measurements) for subject in subjects]
    rows: list[ResultRow] = []
    with ThreadPoolExecutor(1) as reader:
        for number, subject in enumerate(subjects):
            following = next((i for i in range(number + 1, len(subjects)) if asked[i]), None)
            if asked[number] and following is not None and not all(measurement.by_block for measurement in measurements):
                subject.read()
                subjects[following].read_by(reader)
            if asked[number] and progress is not None:
                progress(f"{subject.checkpoint.path.name} ({number + 1} of {len(subjects)}): {', '.join(asked[number])}")
            rows += subject.rows(measurements)
            subject.forget()
    return rows


def default_task(checkpoint: Checkpoint) -> str:
    """The measurement by which a checkpoint is measured where nothing is named: its family's, or else its field's."""
    family = str(checkpoint.config.get("model_type"))
    if catalog.has("architecture", family) and (own := catalog.get("architecture", family).implementation.measurement) is not None:
        return str(own)
    recipe = recipe_behind(checkpoint) or {}
    named = (recipe.get("data") or {}).get("name", "text") if recipe else None
    for entry in catalog.entries("field"):
        if named == entry.name or (named is None and (checkpoint.path / entry.implementation.preprocessor_file).exists()):
            return str(entry.implementation.measurement)
    return "held-out"


def stored_rows(source: str | Path) -> list[ResultRow]:
    """Everything that was measured of a checkpoint or of the checkpoints of a run; nothing is measured now."""
    rows: list[ResultRow] = []
    for checkpoint in _checkpoints(source):
        rows += [_row(checkpoint, score, kept.protocol_digest) for kept in results.of(checkpoint) for score in kept.scores]
    return rows


def with_options(tasks: Iterable[str], settings: Iterable[str]) -> list[dict[str, Any]]:
    """Tasks as mappings, with options written `task.key=value`, or `key=value` where there is one task only.

    A task is the name of a measurement, or a YAML file with `name` and options; files that it names lie beside it.
    """
    chosen: dict[str, Any] = {}
    for task in map(str.strip, tasks):
        chosen[Path(task).stem if _is_file(task) else task] = _from_file(Path(task)) if _is_file(task) else {"name": task}
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


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _from_file(path: Path) -> dict[str, Any]:
    """A task written down in a file; it bears the file's name in the table unless it says another."""
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"There is no task file {path}.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        raise InputError(f"{path}: a task is a mapping with the name of a measurement and its options, for example 'name: multiple-choice'.")
    fields = catalog.get(Measurement, task["name"]).implementation.model_fields
    if "task" in fields:
        task.setdefault("task", path.stem)
    for key in ("path", "include"):
        if key in fields and isinstance(task.get(key), str):
            task[key] = str(path.parent / task[key])
    return task


class _Subject:
    """One checkpoint under measurement: model and data are opened only if some result is not there yet."""

    def __init__(self, checkpoint: Checkpoint, store: bool, feeds: dict[str, Feed], compute: Compute, progress: Callable[[str], object] | None = None) -> None:
        self.checkpoint, self.store, self._feeds, self.compute, self.progress = checkpoint, store, feeds, compute, progress
        self._model: nn.Module | None = None
        self._coming: Future[nn.Module] | None = None

    def missing(self, measurements: Sequence[Measurement]) -> list[str]:
        """Names of the measurements that are still to be made. Raises `InputError` for one that measures what reads something else."""
        for measurement in measurements:
            self.preprocessor(measurement.reads)
        return [str(catalog.name_of(m)) for m in measurements if not self.store or not results.there(self.checkpoint, self._protocol(m)[1])]

    def rows(self, measurements: Sequence[Measurement]) -> list[ResultRow]:
        found = []
        for measurement in measurements:
            protocol, digest = self._protocol(measurement)
            scores = results.stored(self.checkpoint, digest) if self.store else None
            if scores is None:
                preprocessor = self.preprocessor(measurement.reads)
                if measurement.by_block:
                    scores = measurement.of_checkpoint(self.checkpoint, self.compute.device)
                else:
                    scores = measurement.of(self.read(), preprocessor, self._feed_for(measurement))
                if self.store:
                    results.keep(self.checkpoint, protocol, digest, scores)
            self._say(scores)
            found += [_row(self.checkpoint, score, digest) for score in scores]
        return found

    def _say(self, scores: Sequence[Score]) -> None:
        """Tell which figures are not finite."""
        wrong = [f"{score.task} {score.metric}" for score in scores if not math.isfinite(score.value)]
        if wrong and self.progress is not None:
            self.progress(f"{self.checkpoint.path.name}: the model's numbers are not finite, so there is no figure of {', '.join(wrong)}.")

    def read(self) -> nn.Module:
        """The model; its engine remembers answers from one measurement to the next."""
        if self._model is None:
            self._model = self._coming.result() if self._coming is not None else self.compute.model(self.checkpoint)
        return self._model

    def preprocessor(self, reads: str) -> Any:
        """What turns data into inputs of the model. Raises `InputError` where it reads something else, or carries none."""
        from cairn.training.fields import preprocessor_for

        return preprocessor_for(self.checkpoint, reads)

    def read_by(self, reader: ThreadPoolExecutor) -> None:
        """Read the model in the background, unless two models would be too much to hold."""
        if (
            self._model is None
            and self._coming is None
            and (self.checkpoint.base if self.checkpoint.is_adapter else self.checkpoint).tensors.nbytes <= AHEAD_BYTES
        ):
            self._coming = reader.submit(self.compute.model, self.checkpoint)

    def forget(self) -> None:
        """Let go of the model."""
        self._model = self._coming = None

    def _protocol(self, measurement: Measurement) -> tuple[dict[str, Any], str]:
        """The protocol of a measurement here, and its digest."""
        protocol = self.compute.protocol(measurement.protocol(self._feed_for(measurement)))
        return protocol, blake3(json.dumps(protocol, sort_keys=True).encode()).hexdigest()

    def _feed_for(self, measurement: Measurement) -> Feed | None:
        return self._feed() if measurement.needs_feed() else None

    def _feed(self) -> Feed:
        from cairn.training.recipe import Recipe
        from cairn.training.sources import open_recorded

        recipe = recipe_behind(self.checkpoint)
        if recipe is None:
            raise InputError(
                f"{self.checkpoint.path} does not say on which data it was trained, so it has no held-out part of its own; "
                "name a text to measure on: corpus=NAME_OR_PATH."
            )
        parsed = Recipe.parse(recipe, "recipe in lineage")
        preprocessor = parsed.data.preprocessor_of(self.checkpoint)
        key = json.dumps([parsed.data.model_dump(mode="json"), parsed.seed, preprocessor.digest if preprocessor is not None else None])
        if key not in self._feeds:
            self._feeds[key] = open_recorded(parsed.data, parsed.seed, preprocessor)[1]
        return self._feeds[key]


def _row(checkpoint: Checkpoint, score: Score, protocol: str) -> ResultRow:
    folder = checkpoint.path.resolve().parent
    run = folder.parent.name if folder.name == "checkpoints" else folder.name
    scored = asdict(score) | {"protocol": protocol, "digest": checkpoint.model_digest}
    return ResultRow(
        run, checkpoint.path.name, checkpoint.step, checkpoint.tokens, **scored, samples=checkpoint.units if checkpoint.unit == "samples" else None
    )


def recipe_behind(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The recipe with which a checkpoint, or the nearest ancestor of one that came from an operation, was trained."""
    if checkpoint.lineage is not None and "recipe" in checkpoint.lineage.options:
        return checkpoint.lineage.options["recipe"]
    for _, _, ancestor in descent.ancestors(checkpoint):
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
