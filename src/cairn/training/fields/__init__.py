"""Fields: what a sample is.

`recipe.data` is a method of the catalog kind `field`, by default `text`. A field opens its sources, gives the samples at the
positions of a run's global order, names the preprocessor that travels in every checkpoint, and the unit in which progress,
batches and schedules count. The loop, resume, forks, mixtures, saving and measuring know no more of it than this.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator

from cairn import catalog
from cairn.checkpoint.format import documents
from cairn.errors import CairnError, InputError, NotExplained, suggestion
from cairn.options import Amount, Count, Options

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint
    from cairn.data.order.feed import Feed
    from cairn.models.config import Network
    from cairn.training.objectives import Objective, Setting

KEPT_SCORES = 16
"""Scores of an example that are kept besides the highest."""


class Preprocessor(Protocol):
    """What turns a field's raw data into a model's inputs: a tokenizer, an image processor. It travels in every checkpoint."""

    @property
    def digest(self) -> str:
        """Identity of what it does."""
        ...

    def files(self) -> dict[str, bytes]:
        """The files that a checkpoint carries, by name."""
        ...


class Source(Options):
    """One source in the mixture."""

    weight: float = Field(1.0, ge=0)
    """Share of the samples that come from here, relative to the other sources' weights; 0 leaves it out until `data.mixture` calls it in."""
    subset: Count | None = Field(None, ge=1)
    """Units (tokens of text, samples of anything else) of the part that is read, drawn once and repeated in another order each epoch; None reads all."""


class MixtureChange(Options):
    """Other weights of the sources, from a moment of the run on."""

    at: Amount
    """With the first update that begins here or later."""
    weights: dict[str, float]
    """For every source, relative to each other; 0 leaves one out."""


class DataField(Options, ABC):
    """Base of all fields."""

    catalog_kind: ClassVar[str] = "field"
    unit: ClassVar[Literal["tokens", "samples"]] = "samples"
    """In what progress, batches and schedules count."""
    gives: ClassVar[frozenset[str]]
    """What a sample consists of, in the words of objectives (`needs`), families of models and measurements (`reads`): tokens, images, labels."""
    preprocessor_file: ClassVar[str]
    """The file of a checkpoint by which a field knows its own preprocessor."""
    noun: ClassVar[str] = "samples"
    """What samples are called in messages."""
    source_key: ClassVar[str]
    """The key of a source that says where its data are."""
    measurement: ClassVar[str]
    """What is measured where nothing is named."""

    sources: Mapping[str, Source]
    mixture: list[MixtureChange] = []
    """Weights that replace the sources' own from a moment on: `[{at: 80%, weights: {web: 0.6, maths: 0.4}}]`."""
    held_out: float = Field(0.01, ge=0, lt=1)
    """Share of the samples kept out of training, chosen by their content."""

    @model_validator(mode="after")
    def _mixture_names_sources(self) -> Self:
        if not self.sources:
            raise ValueError("a recipe needs at least one source of data")
        for number, change in enumerate(self.mixture):
            strange = sorted(set(change.weights) ^ set(self.sources))
            if strange:
                raise ValueError(f"mixture.{number}.weights must name every source and nothing else; '{strange[0]}' is {self._fault(strange[0])}")
        for weights in (self.first_weights, *(change.weights for change in self.mixture)):
            if min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
                raise ValueError("weights of sources must not be negative, and at least one must be positive")
        return self

    def _fault(self, name: str) -> str:
        return "missing (0 leaves it out)." if name in self.sources else f"no source.{suggestion(name, self.sources)}"

    @property
    def first_weights(self) -> dict[str, float]:
        """Weights of the sources for the first sample of a run."""
        at_once = [change.weights for change in self.mixture if not change.at.value]
        return at_once[-1] if at_once else {name: source.weight for name, source in self.sources.items()}

    @property
    def sample_units(self) -> int:
        """Units of one sample."""
        return 1

    @property
    def size_key(self) -> str:
        """The key that says how many units a sample has, for messages."""
        return "1"

    def pinned(self, batch: int, total: int) -> Self:
        """A copy with every moment in units, for steps of `batch` units in a run of `total`."""
        return self.model_copy(update={"mixture": [change.model_copy(update={"at": Amount(change.at.units(batch, total), "")}) for change in self.mixture]})

    def counted_on(self, batch: int, units: int, length: int) -> Self:
        """A copy for a run that goes on from `units`, from one that speaks of the part of `length` units that follows alone."""

        def after(change: MixtureChange) -> MixtureChange:
            return change.model_copy(update={"at": Amount(units + change.at.units(batch, length), "")}) if change.at.unit == "%" else change

        return self.model_copy(update={"mixture": [after(change) for change in self.mixture]})

    @abstractmethod
    def open(self, seed: int, preprocessor: Any = None, *, objective: Objective | None = None, progress: Callable[..., Any] | None = None) -> tuple[Any, Feed]:
        """The preprocessor, that of a checkpoint where `preprocessor` is given, and the samples. What has to be prepared is prepared, or taken
        from the cache. Raises `InputError` for data that cannot be read."""

    @abstractmethod
    def fill(self, model: Network, preprocessor: Any) -> dict[str, Any]:
        """What the data decide about a model, by the model's keys, for what its recipe leaves open. Raises `InputError` for a model that cannot
        read these data."""

    @abstractmethod
    def setting(self, model: Network, preprocessor: Any) -> Setting:
        """What an objective is told about a run."""

    @classmethod
    @abstractmethod
    def load_preprocessor(cls, path: Path) -> Any:
        """The preprocessor that lies in a directory."""

    @classmethod
    def preprocessor_of(cls, checkpoint: Checkpoint) -> Any:
        """The preprocessor that a checkpoint carries, or None."""
        return cls.load_preprocessor(checkpoint.path) if (checkpoint.path / cls.preprocessor_file).exists() else None

    @abstractmethod
    def unit_flops(self, model: Network, objective: Objective) -> float:
        """Operations to train on one unit."""

    @abstractmethod
    def training_memory(self, model: Network, units: int, precision: Literal["float32", "bfloat16"]) -> dict[str, int]:
        """Estimated bytes on one device, by use, for micro-batches of `units`."""

    @classmethod
    def sample_recipe(cls, folder: Path) -> dict[str, Any]:
        """For conformance suites: the model, the data and the objective of a recipe that trains in a second, with a checkpoint or two, on data that
        are written into a folder."""
        raise NotImplementedError(f"{cls.__name__} has no sample_recipe, so its conformance cannot be tried")

    @classmethod
    def signature(cls, checkpoint: Checkpoint) -> dict[str, list[dict[str, Any]]]:
        """`inputs` and `outputs` of the model of a checkpoint: name, dtype, shape and the meaning of each axis. Raises `NotExplained`."""
        raise NotExplained(f"{checkpoint.path}: the field that it was trained on does not say what goes into its models.", "model-understanding")

    @classmethod
    def example(cls, checkpoint: Checkpoint, prompt: str | None, device: Any = None) -> dict[str, Any]:
        """What the model says of `prompt`, or of an input that is always the same: the `prompt`, the `input_digest`, `top` (the most probable
        answers) and `scores` by names that stay; `device` as `cairn.device.choose`. Raises `NotExplained`."""
        raise NotExplained(f"{checkpoint.path}: the field that it was trained on has no example.", "model-understanding")

    @property
    def title(self) -> str:
        """The name of the field, for messages."""
        return catalog.name_of(self) or type(self).__name__


def class_names(folder: Path) -> list[str]:
    """The classes that the config.json of a directory names, by number; none where it names none."""
    try:
        named = documents.read_object(folder / "config.json").get("id2label")
    except (CairnError, OSError):
        return []
    if not isinstance(named, Mapping) or not all(isinstance(named.get(str(number)), str) for number in range(len(named))):
        return []
    return [named[str(number)] for number in range(len(named))]


def field_of(checkpoint: Checkpoint) -> type[DataField]:
    """The field whose samples the model of a checkpoint reads: as its family says, or, of a family that is not known here, the one whose
    preprocessor the checkpoint carries; text where nothing says otherwise."""
    fields: list[type[DataField]] = [entry.implementation for entry in catalog.entries("field")]
    family = str(checkpoint.config.get("model_type"))
    if catalog.has("architecture", family):
        reads = catalog.get("architecture", family).implementation.reads
        fields = [field for field in fields if reads in field.gives] or fields
    found = next((field for field in fields if (checkpoint.path / field.preprocessor_file).exists()), None)
    if found is None:
        found = fields[0] if len(fields) == 1 else catalog.get("field", "text").implementation
    return found


def answers(scores: Any, name_of: Callable[[int], str]) -> dict[str, Any]:
    """The five most probable of logits (K,), and some of the scores, by their numbers."""
    import torch

    scores = scores.double().cpu()
    chances = scores.softmax(-1)
    top = torch.topk(chances, min(5, len(chances))).indices.tolist()
    shown = list(range(0, len(scores), max(1, len(scores) // KEPT_SCORES)))[:KEPT_SCORES]
    return {
        "top": [{"id": number, "text": name_of(number), "probability": float(chances[number])} for number in top],
        "scores": {str(number): float(scores[number]) for number in dict.fromkeys([*top, *shown])},
    }


def preprocessor_for(checkpoint: Checkpoint, reads: str | None = None) -> Any:
    """The preprocessor that a checkpoint carries for what its model reads (tokens, images); without `reads` whichever it carries.

    Raises `InputError` where it carries none.
    """
    fields = [entry.implementation for entry in catalog.entries("field") if reads is None or reads in entry.implementation.gives]
    for field in fields:
        if (found := field.preprocessor_of(checkpoint)) is not None:
            return found
    files = " or ".join(field.preprocessor_file for field in fields)
    raise InputError(f"{checkpoint.path} carries no {files}, so {reads or 'data'} cannot be given to its model.")
