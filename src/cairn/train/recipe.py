"""The recipe: everything that decides what a run computes, as one strict, serialisable object.

A recipe is YAML read into pydantic models. An unknown key is an error that names the nearest key; dotted
overrides (`optimizer.lr=3e-4`) are applied before validation. `Recipe.pinned` turns whatever depends on the
machine or on other keys into plain values, so that the recipe stored in a checkpoint says exactly what ran:
schedules in absolute tokens (a resume can not stretch them) and `compile` as a decision.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from cairn.data.metadata import Metadata
from cairn.errors import InputError, NotFoundError, suggestion
from cairn.options import Amount, Bytes, Count, Method, Options, override
from cairn.train.fault_tolerance import FaultTolerance


class Source(Options):
    """One source of documents in the mixture."""

    corpus: Any
    """A corpus: a catalog name (`python-docs`), a path (`books/*.jsonl`), or a mapping with `name` and its options."""
    weight: float = Field(1.0, gt=0)
    """Share of the sequences that come from here, relative to the other sources' weights."""


class Data(Options):
    """What the model reads, and in what shape."""

    sources: dict[str, Source]
    tokenizer: Any = "byte"
    """`byte`, `{bpe: 4096}` (trained on the sources), or the path of a tokenizer or checkpoint."""
    sequence_length: int = Field(256, ge=1)
    packing: Literal["joined", "whole", "complete"] = "joined"
    """`joined`: documents one after the other, cut at the window; `whole`: no document is cut where it fits; `complete`: in their
    order, what no longer fits a window is left out."""
    documents: Literal["attend", "mask"] = "attend"
    """Whether attention may cross from one document into the previous one in the same window."""
    held_out: float = Field(0.01, ge=0, lt=1)
    """Share of the documents kept out of training, chosen by their content."""
    metadata: Metadata | None = None
    """What stands in front of documents, and until when."""

    @model_validator(mode="after")
    def _some_source(self) -> Self:
        if not self.sources:
            raise ValueError("a recipe needs at least one source of documents")
        return self


class Training(Options):
    """How long, in what steps, in what arithmetic."""

    tokens: Amount = Amount(1e6, "tokens")
    """Length of the run in tokens (or steps)."""
    batch: Count = Field(16384, ge=1)
    """Tokens of one update, over all ranks; a multiple of the sequence length."""
    micro_batch: Count | None = None
    """Tokens of one forward pass on one rank; default: a rank's whole share. It never changes what is computed."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """`bfloat16` is autocast over float32 weights."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile: `auto` measures an eager step and compiles when the run is long enough to pay for it."""
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; None does not clip."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient: stop before the update, or skip the update (at most `non_finite_limit` times in a row)."""
    non_finite_limit: int = Field(10, ge=1)
    deterministic: bool = True
    """Ask torch for deterministic kernels, so that a resume is bit-identical."""
    log_every: int = Field(1, ge=1)
    """Steps between rows of metrics.jsonl."""


class Checkpoints(Options):
    """When state is written."""

    every: Amount = Amount(10, "%")
    keep: int | None = Field(None, ge=1)
    """Newest checkpoints that stay; None keeps all."""
    also: list[Amount] = []
    """Further moments, for example `[1M tokens, 2M tokens, 4M tokens]` for a trajectory in doublings."""
    first: bool = False
    """Also write step 0, before any update."""
    capture: Literal["auto", "lazy", "eager"] = "auto"
    """When state is copied for a save: `lazy`, while the next gradient is computed; `eager`, before it; `auto` times both.
    Either way it is written in the background."""
    buffer: Bytes | None = None
    """Host memory of one process for copies on their way to disk; default: a little more than its state (twice that where
    every step is saved). With less, updates wait for the disk."""
    store: str | None = None
    """URL of a store (`s3://bucket/run`, any that fsspec opens) in whose `checkpoints/` they go; None keeps them in the run directory."""


class Parallel(Options):
    """How many processes share the work: data x shard x tensor of them."""

    data: int = Field(1, ge=1)
    """Copies of the model that each take a share of every batch (DistributedDataParallel; with `shard`, hybrid sharding).
    `all`: as many as the started processes make, so that a job may come back larger or smaller."""
    shard: int = Field(1, ge=1)
    """Processes over which weights, gradients and moments are spread; each takes a share of every batch too (FSDP2)."""
    tensor: int = Field(1, ge=1)
    """Processes over which every matrix of a block is cut (DTensor tensor parallelism); they compute the same share together."""
    restarts: int = Field(0, ge=0)
    """How often lost processes are started again from the newest complete checkpoint, where cairn launches them itself
    (under torchrun its own --max-restarts decides)."""

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_started(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("data") != "all":
            return values
        copy, started = int(values.get("shard", 1)) * int(values.get("tensor", 1)), int(os.environ.get("WORLD_SIZE", "1"))
        if started % copy:
            raise ValueError(f"{started} started process(es) do not make whole copies of the model, of {copy} processes each (shard x tensor)")
        return {**values, "data": started // copy}

    @property
    def processes(self) -> int:
        return self.data * self.shard * self.tensor

    @property
    def replicas(self) -> int:
        """Shares into which a batch is cut."""
        return self.data * self.shard


class Recipe(Options):
    """Everything that decides what a run computes."""

    model: Annotated[Any, Method("architecture")]
    data: Data
    objective: Annotated[Any, Method("objective")] = "causal-lm"
    optimizer: Annotated[Any, Method("optimizer")] = "adamw"
    schedule: Annotated[Any, Method("schedule")] = "cosine"
    reweighting: Annotated[Any, Method("reweighting", optional=True)] = None
    training: Training = Training()
    checkpoint: Checkpoints = Checkpoints()
    events: list[Annotated[Any, Method("event")]] = []
    parallel: Parallel = Parallel()
    fault_tolerance: FaultTolerance = FaultTolerance()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        length, batch = self.data.sequence_length, self.training.batch
        if batch % length:
            raise ValueError(f"training.batch ({batch} tokens) is not a multiple of data.sequence_length ({length}).")
        share, rest = divmod(batch // length, self.parallel.replicas)
        if rest:
            raise ValueError(f"a batch of {batch // length} sequences can not be shared by parallel.data x shard = {self.parallel.replicas} replicas.")
        micro = self.training.micro_batch
        if micro is not None and (micro % length or share % (micro // length)):
            raise ValueError(
                f"training.micro_batch ({micro} tokens) must be a multiple of data.sequence_length ({length}) and divide a "
                f"process's share of the batch ({share * length} tokens)."
            )
        if self.reweighting is not None and not self.objective.separable:
            raise ValueError("reweighting needs the loss of each token, which this objective (or its z_loss) does not give; leave one of them out.")
        if self.training.tokens.unit == "%":
            raise ValueError("training.tokens is the length of the run; write it in tokens or steps, not in %.")
        return self

    @property
    def batch_sequences(self) -> int:
        """Sequences of one update, over all ranks."""
        return self.training.batch // self.data.sequence_length

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, as whole steps."""
        return self.training.tokens.steps(self.training.batch) * self.training.batch

    @property
    def total_steps(self) -> int:
        return self.total_tokens // self.training.batch

    def plain(self) -> dict[str, Any]:
        """As plain values, ready for YAML or JSON; `Recipe.parse` gives an equal recipe back."""
        return self.model_dump(mode="json")

    def pinned(self, **decisions: Any) -> Recipe:
        """The recipe with its schedule in absolute tokens and with `decisions` (dotted keys) put in."""
        pinned = {
            key: method.pinned(self.training.batch, self.total_tokens) for key in ("schedule", "reweighting") if (method := getattr(self, key)) is not None
        }
        if self.data.metadata is not None:
            metadata = self.data.metadata.pinned(self.training.batch, self.total_tokens)
            pinned["data"] = self.data.model_copy(update={"metadata": metadata})
        recipe = self.model_copy(update=pinned)
        return recipe.changed(decisions) if decisions else recipe

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys set to plain values."""
        return self.overridden(f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9).splitlines()[0]}" for key, value in values.items())

    def overridden(self, assignments: Iterable[str]) -> Recipe:
        """A copy with `key=value` assignments applied. Raises `InputError` for unknown keys and bad values."""
        values = self.plain()
        # What the recipe leaves open about the model (its vocabulary, say) stays open: the data decide it later.
        values["model"] = {key: value for key, value in values["model"].items() if key == "name" or key in self.model.model_fields_set}
        return Recipe.parse(override(values, assignments), "recipe")


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in resources.files("cairn").joinpath("recipes").iterdir() if item.name.endswith(".yaml"))


def load(source: Recipe | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a file, the name of a shipped recipe, a mapping, or another recipe, with overrides applied.

    Raises `NotFoundError` for a missing file and `InputError` for YAML that is broken or says something unknown.
    """
    if isinstance(source, Recipe):
        return source.overridden(overrides)
    if isinstance(source, Mapping):
        values: Any = dict(source)
    else:
        values = _read(source)
    if not isinstance(values, dict):
        raise InputError(f"Recipe {source}: a recipe is a mapping of keys to values, not {type(values).__name__}.")
    where = f"recipe {source}" if isinstance(source, (str, Path)) else "recipe"
    return Recipe.parse(override(values, overrides), where)


def _read(source: str | Path) -> Any:
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"Recipe {source} is not a text file in UTF-8.") from None
    elif str(source) in shipped():
        text = resources.files("cairn").joinpath("recipes", f"{source}.yaml").read_text(encoding="utf-8")
    elif path.suffix or "/" in str(source):
        raise NotFoundError(f"There is no recipe file {path}.")
    else:
        raise NotFoundError(f"There is no recipe '{source}'.{suggestion(str(source), shipped())}")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"Recipe {source} is not valid YAML: {' '.join(str(error).split())}") from None
