"""The recipe: everything that decides what a run computes, as one strict, serialisable object.

A recipe is YAML read into pydantic models. An unknown key is an error that names the nearest key; dotted
overrides (`optimizer.lr=3e-4`) are applied before validation. `Recipe.pinned` turns whatever depends on the
machine or on other keys into plain values, so that the recipe stored in a checkpoint says exactly what ran:
schedules and mixtures in absolute units (tokens, samples) (a resume cannot stretch them) and `compile` as a decision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from cairn import catalog
from cairn.checkpoint.format import documents
from cairn.errors import DamagedError, InputError, NotFoundError, suggestion
from cairn.options import UNITS, Amount, Bytes, Count, Method, Options, PositiveAmount, assign, in_unit, override, read_yaml
from cairn.training.fault_tolerance import FaultTolerance


class Training(Options):
    """How long, in what steps, in what arithmetic."""

    tokens: PositiveAmount | None = None
    """Length of a run on text, in tokens or steps; default: a million tokens."""
    samples: PositiveAmount | None = None
    """Length of a run on a field that counts samples, in samples or steps."""
    batch: Count = Field(16384, ge=1)
    """Units (tokens of text, samples of anything else) of one update, over all ranks; of text a multiple of the sequence length."""
    micro_batch: Count | None = Field(None, ge=1)
    """Units of one forward pass on one rank; default: a rank's whole share. It never changes what is computed."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """`bfloat16` is autocast over float32 weights."""
    gradient_sums: Literal["weights", "float64"] = "weights"
    """In what gradients are added up over micro-batches and processes: in the precision of the weights, or in float64 and rounded once. With
    the same `micro_batch`, any number of copies (`parallel.data`) then computes the same bits, shards nearly so; 8 more bytes a parameter."""
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

    @model_serializer(mode="wrap")
    def _one_length(self, handler: Any) -> dict[str, Any]:
        """Without the length that another field has."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if key not in UNITS or value is not None}


class Checkpoints(Options):
    """When state is written."""

    every: PositiveAmount = Amount(10, "%")
    keep: int | None = Field(None, ge=1)
    """Newest checkpoints that stay; None keeps all."""
    also: list[Amount] = []
    """Further moments, for example `[1M tokens, 2M tokens, 4M tokens]` for a trajectory in doublings."""
    first: bool = False
    """Also write step 0, before any update."""
    capture: Annotated[Literal["auto", "lazy", "eager", "off"], BeforeValidator(lambda value: "off" if value is False else value)] = "auto"
    """When state is copied for a save: `lazy`, while the next gradient is computed; `eager`, before it; `auto` times both.
    Each way it is written in the background. `off`: it is not copied, and training waits until it is written; a process then needs
    the memory of a plain loop, where a copy needs that of weights and moments once more (twice, with a save at every step)."""
    buffer: Bytes | None = None
    """Host memory of one process for copies on their way to disk; default: a little more than its state (twice that where
    every step is saved). With less, updates wait for the disk."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """In what weights are written; None: as they are held, a fork as its checkpoint has them. The float32 weights that lower ones are rounded
    from are then in the optimizer's state, so that a resume loses nothing."""
    store: str | None = None
    """URL of a store (`s3://bucket/run`, any that fsspec opens) in whose `checkpoints/` they go; None keeps them in the run directory."""


def started_processes() -> int:
    """How many processes `torchrun` (or whatever sets WORLD_SIZE) has started, of which this is one; 1 where nobody has."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"WORLD_SIZE is '{text}' in the environment; it must be the number of processes that were started. Unset it to train in one.")
    return int(text)


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
        copy, started = int(values.get("shard", 1)) * int(values.get("tensor", 1)), started_processes()
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


class Teacher(Options):
    """A model beside the one that trains, whose outputs the objective learns from."""

    checkpoint: str | None = None
    """The checkpoint that teaches, frozen; with `ema`, where the average begins."""
    ema: float | None = Field(None, gt=0, lt=1)
    """The teacher is an average of the student's own weights, which keeps this share of itself in every update."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.checkpoint is None and self.ema is None:
            raise ValueError("a teacher is a checkpoint, or with ema=0.999 an average of the model in training.")
        return self


def _named_teachers(value: Any) -> Any:
    """`CKPT`, `{checkpoint: CKPT, ema: 0.999}` or `{name: one of these}` as the last of them."""
    if value is None:
        return {}
    if isinstance(value, (str, Path)):
        value = {"checkpoint": str(value)}
    if isinstance(value, Mapping) and value and set(value) <= set(Teacher.model_fields):
        value = {"teacher": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"teacher is a checkpoint, {{checkpoint: ..., ema: ...}} or several of these by name, not {value!r}.")
    return {name: {"checkpoint": str(each)} if isinstance(each, (str, Path)) else each for name, each in value.items()}


class Stage(Options):
    """One stage of a recipe: a run that begins where another stage ended, or an operation on what other stages made."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    parents: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field([], alias="from")
    """The stage, or for an operation the stages, whose last checkpoints this one begins with; none: training from scratch."""
    operation: Any = None
    """An operation by name, or a mapping with `name` and its options; None: this stage trains."""
    checkpoint: str | None = None
    """A checkpoint (or run) that is there already and takes the place of this stage's training."""
    settings: dict[str, Any] = Field({}, alias="set")
    """What differs from the recipe of the stage before, as `dotted.key: value`. `training.tokens` is the length of this stage, and
    percents are shares of it; `now` stands for the parent's tokens, under `optimizer.lr` for the rate of its next update."""
    fresh: list[Literal["optimizer"]] = []
    """State that begins anew instead of being the parent's."""


class Recipe(Options):
    """Everything that decides what a run computes."""

    model: Annotated[Any, Method("architecture")]
    data: Annotated[Any, Method("field", default="text")]
    objective: Annotated[Any, Method("objective")] = "causal-lm"
    optimizer: Annotated[Any, Method("optimizer")] = "adamw"
    schedule: Annotated[Any, Method("schedule")] = "cosine"
    reweighting: Annotated[Any, Method("reweighting", optional=True)] = None
    adapter: Annotated[Any, Method("adapter", optional=True)] = None
    """What is trained beside the frozen weights of the checkpoint that a fork begins from; checkpoints hold it alone."""
    teacher: Annotated[dict[str, Teacher], BeforeValidator(_named_teachers)] = {}
    """What the objective learns from beside the data: `teacher: CKPT`, `teacher: {ema: 0.999}`, or several by the names that it knows."""
    trainable: list[str] = []
    """Patterns of the parameters that train, for example `[norm, "model.layers.[0-3].*"]`; the others stay as they are. None: all train."""
    training: Training = Training()
    checkpoint: Checkpoints = Checkpoints()
    callbacks: list[Annotated[Any, Method("callback")]] = []
    parallel: Parallel = Parallel()
    fault_tolerance: FaultTolerance = FaultTolerance()
    track: list[Literal["tensorboard", "wandb"]] = []
    """Where the rows of metrics.jsonl also go: TensorBoard files in the run directory, a run of Weights & Biases. Decides nothing that is computed."""
    seed: int = Field(0, ge=0)
    stages: list[Stage] = []
    """Runs and operations that follow from one another (`cairn.training.stages`); the other keys are what they have in common."""
    stage: str | None = None
    """Which stage of a larger recipe this is."""

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        known: dict[str, Stage] = {}
        for stage in self.stages:
            if stage.name in known:
                raise ValueError(f"two stages are called '{stage.name}'.")
            for parent in stage.parents:
                if parent not in known:
                    raise ValueError(f"the stage '{stage.name}' begins from '{parent}', which is no stage before it.{suggestion(parent, known)}")
            if stage.operation is None and len(stage.parents) > 1:
                raise ValueError(f"the stage '{stage.name}' trains, so it begins from one stage; name an operation to combine {', '.join(stage.parents)}.")
            if stage.checkpoint is not None and (stage.parents or stage.operation is not None or stage.fresh):
                raise ValueError(f"the stage '{stage.name}' is a checkpoint that is there already: it has no 'from', no 'operation' and no 'fresh'.")
            if stage.operation is not None and (not stage.parents or stage.settings or stage.fresh):
                raise ValueError(f"the stage '{stage.name}' is an operation: it needs the stages that it works on (from), and has no 'set' and no 'fresh'.")
            known[stage.name] = stage
        return self

    @model_validator(mode="after")
    def _counts_in_the_unit_of_the_field(self) -> Self:
        """Every amount without a unit is in the field's; one in another field's unit is refused."""
        field, training = self.data, self.training
        strange = next(unit for unit in UNITS if unit != self.unit)
        if getattr(training, strange) is not None:
            raise ValueError(f"training.{strange}: the field '{field.title}' counts {self.unit}; write the length of the run as training.{self.unit}.")
        if getattr(training, self.unit) is None:
            if self.unit != "tokens":
                raise ValueError(f"training.{self.unit} is missing: the length of the run, for example '10k {self.unit}' or '500 steps'.")
            self = self.model_copy(update={"training": training.model_copy(update={"tokens": Amount(1e6, "tokens")})})
        return cast(Self, in_unit(self, self.unit))

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        field, name = self.data, catalog.name_of(self.objective)
        gives = f"the field '{field.title}' gives {' and '.join(sorted(field.gives))}"
        if missing := sorted(self.objective.needs - field.gives):
            raise ValueError(f"the objective '{name}' needs {' and '.join(missing)}, and {gives}; take an objective for them, or another field.")
        for callback in self.callbacks:
            if missing := sorted(callback.needs() - field.gives):
                raise ValueError(
                    f"the callback '{catalog.name_of(callback)}' needs {' and '.join(missing)}, and {gives}; leave it out, or give it other options."
                )
        if self.model.reads not in field.gives:
            raise ValueError(f"a '{self.model.model_type}' reads {self.model.reads}, and {gives}; take a family of models for them, or another field.")
        return self

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        length, batch, unit = self.data.sample_units, self.training.batch, self.unit
        if batch % length:
            raise ValueError(f"training.batch ({batch} {unit}) is not a multiple of {self.data.size_key} ({length}).")
        share, rest = divmod(batch // length, self.parallel.replicas)
        if rest:
            raise ValueError(f"a batch of {batch // length} {self.data.noun} cannot be shared by parallel.data x shard = {self.parallel.replicas} replicas.")
        micro_batch = self.training.micro_batch
        if micro_batch is not None and (micro_batch % length or share % (micro_batch // length)):
            raise ValueError(
                f"training.micro_batch ({micro_batch} {unit}) must be a multiple of {self.data.size_key} ({length}) and divide a "
                f"process's share of the batch ({share * length} {unit})."
            )
        self._teachers_fit()
        if self.adapter is not None and self.trainable:
            raise ValueError("an adapter trains beside weights that all stay as they are; leave out either adapter or trainable.")
        if self.checkpoint.capture == "off" and self.fault_tolerance.memory is not None:
            raise ValueError("snapshots in memory are captured: checkpoint.capture=off and fault_tolerance.memory exclude each other.")
        if self.reweighting is not None and not self.objective.separable:
            raise ValueError("reweighting needs the loss of each token, which this objective (or its z_loss) does not give; leave one of them out.")
        if self.length.unit == "%":
            raise ValueError(f"training.{unit} is the length of the run; write it in {unit} or steps, not in %.")
        moments = [change.at.units(batch, self.total_units) for change in self.data.mixture]
        if moments != sorted(set(moments)):
            raise ValueError(f"the moments of data.mixture must follow each other; they are {', '.join(f'{moment} {unit}' for moment in moments)}.")
        return self

    @property
    def unit(self) -> str:
        """In what progress, batches and schedules count: tokens or samples."""
        return str(self.data.unit)

    @property
    def length(self) -> Amount:
        """Length of the run, as it is written."""
        return cast(Amount, getattr(self.training, self.unit))

    def _teachers_fit(self) -> None:
        known, named = self.objective.teachers, list(self.teacher)
        strange = next((name for name in named if name not in known), None)
        if strange is not None:
            there = f"it knows {', '.join(known)}" if known else "it knows none (objective=distillation does)"
            raise ValueError(f"teacher: the objective learns from no teacher '{strange}'; {there}.")
        missing = next((name for name in known if name not in named), None)
        if missing is not None and (named or self.objective.needs_teachers):
            example = "teacher=CHECKPOINT" if missing == "teacher" else f"teacher.{missing}=CHECKPOINT"
            raise ValueError(f"the objective learns from the teacher '{missing}', which the recipe does not name: {example}.")

    @property
    def batch_samples(self) -> int:
        """Samples of one update, over all ranks."""
        return self.training.batch // int(self.data.sample_units)

    @property
    def total_units(self) -> int:
        """Units (tokens, samples) of the whole run, as whole steps."""
        return self.length.steps(self.training.batch) * self.training.batch

    @property
    def total_steps(self) -> int:
        return self.total_units // self.training.batch

    def weights_at(self, tokens: int) -> dict[str, float]:
        """Weights that this recipe wants for the sources in the update that begins after `tokens` tokens."""
        changes = [change.weights for change in self.data.mixture if change.at.units(self.training.batch, self.total_units) <= tokens]
        return changes[-1] if changes else {name: source.weight for name, source in self.data.sources.items()}

    def learning_rate(self, tokens: int) -> float:
        """The learning rate of the update that begins after `tokens` tokens; the recipe must be pinned."""
        return self.optimizer.lr * self.schedule.factor(tokens, self.training.batch)

    def plain(self) -> dict[str, Any]:
        """As plain values, ready for YAML or JSON; `Recipe.parse` gives an equal recipe back."""
        return self.model_dump(mode="json")

    def pinned(self, **decisions: Any) -> Recipe:
        """The recipe with its schedule, mixture and reweighting in absolute tokens and with `decisions` (dotted keys) put in."""
        parts = {key: part for key in ("schedule", "data", "reweighting") if (part := getattr(self, key)) is not None}
        recipe = in_unit(self.model_copy(update={key: part.pinned(self.training.batch, self.total_units) for key, part in parts.items()}), self.unit)
        return recipe.changed(decisions) if decisions else recipe

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys set to plain values."""
        return Recipe.parse(assign(self.asked(), values.items()), "recipe")

    def overridden(self, assignments: Iterable[str]) -> Recipe:
        """A copy with `key=value` assignments applied. Raises `InputError` for unknown keys and bad values."""
        return Recipe.parse(override(self.asked(), assignments), "recipe")

    def asked(self) -> dict[str, Any]:
        """As plain values, without what the recipe leaves open about the model (its vocabulary, say), which the data or a checkpoint decide."""
        values = self.plain()
        values["model"] = {key: value for key, value in values["model"].items() if key == "name" or key in self.model.model_fields_set}
        return values


MOMENTS = ("schedule", "optimizer", "data.mixture", "data.metadata", "reweighting", "training", "checkpoint", "callbacks")
"""Where `now` is a moment; elsewhere (a corpus, a prompt) it is a word like any other."""


def with_moment(key: str, value: Any, units: int, rate: Callable[[], float]) -> Any:
    """A value in which each `now` stands for a moment of a run: under optimizer.lr its learning rate there, elsewhere its tokens (or samples)."""
    if isinstance(value, Mapping):
        return {inner: with_moment(f"{key}.{inner}", item, units, rate) for inner, item in value.items()}
    if isinstance(value, list):
        return [with_moment(f"{key}.{number}", item, units, rate) for number, item in enumerate(value)]
    if value != "now" or not key.startswith(MOMENTS):
        return value
    return rate() if key == "optimizer.lr" else str(units)


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in resources.files("cairn").joinpath("recipes").iterdir() if item.name.endswith(".yaml"))


def load(source: Recipe | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a file, the name of a shipped recipe, a mapping, or another recipe, with overrides applied.

    Raises `NotFoundError` for a missing file and `InputError` for YAML that is broken or says something unknown.
    """
    where = f"recipe {source}" if isinstance(source, (str, Path)) else "recipe"
    return Recipe.parse(override(values_of(source), overrides), where)


def values_of(source: Recipe | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """What a recipe says, as plain values that are not validated yet: overrides may still complete them."""
    if isinstance(source, Recipe):
        return source.asked()
    values: Any = dict(source) if isinstance(source, Mapping) else _read(source)
    if not isinstance(values, dict):
        raise InputError(f"Recipe {source}: a recipe is a mapping of keys to values, not {type(values).__name__}.")
    return values


def _read(source: str | Path) -> Any:
    path = Path(source)
    if path.is_file():
        try:
            text = documents.read_text(path, named=True)
        except DamagedError as error:
            raise InputError(f"Recipe {error}") from None
    elif str(source) in shipped():
        text = resources.files("cairn").joinpath("recipes", f"{source}.yaml").read_text(encoding="utf-8")
    elif path.suffix or "/" in str(source):
        raise NotFoundError(f"There is no recipe file {path}.")
    else:
        raise NotFoundError(f"There is no recipe '{source}'.{suggestion(str(source), shipped())}")
    try:
        documents.parse_yaml(text, source)  # holds its size against limits before anything walks through it
        return read_yaml(text, f"Recipe {source}")
    except DamagedError as error:
        raise InputError(f"Recipe {error}") from None
