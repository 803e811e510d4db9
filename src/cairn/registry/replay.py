"""Replay: make a checkpoint again from its parent and compare. What a lineage says is then not a story but a recipe that was followed.

A checkpoint of a run is trained again from the one before it (the first one from nothing), one of an operation is computed
again from its parents. Equal digests are class `bitwise`. Otherwise the distance between what was made and what is there is set
against the distance that the step moved the weights: class `tolerance` up to `tolerance` of it, else `none`.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.checkpoint.format import descent, lineage, read
from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.read import CHECKPOINTS, Checkpoint
from cairn.device import computes
from cairn.errors import InputError, NotFoundError, ResumeError
from cairn.registry import statements
from cairn.registry.record import run_of

TOLERANCE = 1e-3
"""Largest distance from the recorded weights, as a share of how far the step moved them, that counts as the same."""

ALONE = {"parallel": "{}", "fault_tolerance": "{}", "checkpoint": "{}", "track": "[]"}
"""Parts of a recipe that say how work is shared, kept and watched, and what a replay puts there: it does it alone and tells nobody."""


@dataclass
class Replay:
    """What a replay found. `distance` is ||replayed - recorded|| / ||recorded - parent|| over weights and moments together."""

    checkpoint: str
    digest: str
    act: str
    parents: list[str]
    outcome: str
    """`bitwise`, `tolerance` or `none`."""
    replayed_digest: str
    distance: float
    steps: int | None
    differing: list[str] = field(default_factory=list)
    """Tensors and small files that are not the same, the largest distance first."""
    remarks: list[str] = field(default_factory=list)
    versions: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What differs between the machine and programs that made it and those that replayed it."""

    @property
    def holds(self) -> bool:
        return self.outcome != "none"


@computes
def replay(
    source: str | Path | Checkpoint,
    *,
    parents: Sequence[str | Path] = (),
    tolerance: float = TOLERANCE,
    work: str | Path | None = None,
    store: bool = True,
    device: Any = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Replay:
    """Make a checkpoint again from its parents and say whether the same came out.

    `parents` name them where they no longer lie where lineage says; `work` is an empty folder for what is made (default: a
    temporary one); `device` is where it trains (as `cairn.device.choose`). With `store` the outcome is kept beside the checkpoint. Raises `InputError` for
    what cannot be made again (an import, a checkpoint without lineage) and `NotFoundError` for a parent that is not there.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    origin = checkpoint.lineage
    if origin is None:
        raise InputError(f"{checkpoint.path} has no lineage: nothing says how it was made.")
    if origin.kind == "import":
        raise InputError(f"{checkpoint.path} was imported; `cairn import` its source once more and compare with `cairn diff`.")
    found = _parents(checkpoint, parents)
    folder = Path(work) if work is not None else Path(tempfile.mkdtemp(prefix="cairn-replay-"))
    try:
        progress(f"making {checkpoint.path.name} again from {', '.join(p.path.name for p in found) or 'nothing'}")
        made, remarks = _run_again(checkpoint, found, folder) if origin.kind == "run" else _operate_again(checkpoint, found, folder)
        result = _compare(checkpoint, made, found[0] if found else None, tolerance)
        result.remarks = remarks
    except ResumeError as error:
        # What lineage tells cannot have happened: no run goes on with another seed, say.
        result = _judged(checkpoint, None, found[0] if found else None, math.inf, [])
        result.remarks = [str(error)]
    finally:
        if work is None:
            shutil.rmtree(folder, ignore_errors=True)
    if store and not os.environ.get("RANK"):
        statements.keep(checkpoint, "replay", asdict(result) | {"checkpoint": checkpoint.path.name, "tolerance": tolerance})
    return result


def _parents(checkpoint: Checkpoint, named: Sequence[str | Path]) -> list[Checkpoint]:
    assert checkpoint.lineage is not None
    offered = {opened.digest: opened for opened in map(read.open, named)}
    found = []
    for parent in checkpoint.lineage.parents:
        there = offered.get(parent.digest) or descent.find(parent, checkpoint.path)
        if there is None:
            where = f" (it lay at {parent.path})" if parent.path else ""
            raise NotFoundError(f"The parent {parent.digest[:12]} of {checkpoint.path}{where} is not there; name where it lies now with --parent.")
        found.append(there)
    return found


def _run_again(checkpoint: Checkpoint, parents: Sequence[Checkpoint], folder: Path) -> tuple[Checkpoint, list[str]]:
    """Train from the parent to the step of the checkpoint, with the recipe that its lineage keeps, in one process."""
    from cairn.training import recipe as recipes
    from cairn.training import run as runs
    from cairn.training.sources import refuse_unnamed

    assert checkpoint.lineage is not None
    if checkpoint.step is None or "recipe" not in checkpoint.lineage.options:
        raise InputError(f"{checkpoint.path} does not say with which recipe and to which step it was trained.")
    kept = checkpoint.lineage.options["recipe"]
    wanted = recipes.load({key: value for key, value in kept.items() if key not in ALONE})
    refuse_unnamed(wanted.data)
    remarks = ["made by several processes, replayed by one"] if _processes(kept) > 1 else []
    fresh = ["optimizer"] if any(line.startswith("optimizer state") for line in checkpoint.lineage.changed) else []
    stop = checkpoint.step
    if not parents:
        if stop == 0:
            wanted = wanted.changed({"checkpoint.first": True})
        made = runs.train(wanted, folder / "run", stop_at_step=stop)
    elif parents[0].step == stop:
        raise InputError(f"{checkpoint.path} is of the same step as its parent: it was forked from there, and nothing was computed.")
    elif _continues(checkpoint, parents[0]):
        inside = folder / "run" / CHECKPOINTS / parents[0].path.resolve().name
        _linked(parents[0].path.resolve(), inside)
        old = {key: value for key, value in _recipe(parents[0]).items() if key not in ALONE}
        new = {key: value for key, value in wanted.plain().items() if key not in ALONE}
        overrides = [f"{key}={_as_yaml(value)}" for key, value in _changes(old, new)]
        alone = [f"{key}={value}" for key, value in ALONE.items()]
        made = runs.resume(folder / "run", [*overrides, *alone], stop_at_step=stop, fresh=fresh)  # type: ignore[arg-type]
    else:
        made = runs.fork(parents[0], folder / "run", recipe=wanted, stop_at_step=stop, fresh=fresh)  # type: ignore[arg-type]
    return read.open(made.checkpoints()[-1]), remarks


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any]]:
    """What turns the parent's recipe into the child's: whole top parts where a list or a method changed, else single keys."""
    found: dict[str, Any] = {}
    for key, (_, value) in keys_that_differ(old, new).items():
        top = key.split(".")[0]
        if top in ("callbacks", "schedule", "optimizer", "objective") or value is None:
            found[top] = new[top]
        else:
            found[key] = value
    return list(found.items())


def _as_yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**9).splitlines()[0]


def _continues(checkpoint: Checkpoint, parent: Checkpoint) -> bool:
    """Whether both are of one run: a run goes on from its own checkpoints, a fork begins from another's."""
    return run_of(checkpoint.path.resolve()) is not None and run_of(checkpoint.path.resolve()) == run_of(parent.path.resolve())


def _recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(checkpoint.lineage.options.get("recipe", {})) if checkpoint.lineage is not None else {}


def _processes(recipe: dict[str, Any]) -> int:
    shared = recipe.get("parallel") or {}
    return math.prod(int(shared.get(key) or 1) for key in ("data", "shard", "tensor"))


def _linked(source: Path, target: Path) -> None:
    """The same files under another name: linked, since nothing changes them, or copied where that cannot be."""

    def take(origin: str, copy: str) -> str:
        try:
            os.link(origin, copy)
        except OSError:
            shutil.copyfile(origin, copy)
        return copy

    shutil.copytree(source, target, copy_function=take)


def _operate_again(checkpoint: Checkpoint, parents: Sequence[Checkpoint], folder: Path) -> tuple[Checkpoint, list[str]]:
    from cairn.checkpoint.foreign.export import Export
    from cairn.checkpoint.operating import stream

    assert checkpoint.lineage is not None
    origin = checkpoint.lineage
    kind: Any = Export if origin.name == "export" else catalog.get("operation", origin.name).implementation
    options = {key: value for key, value in origin.options.items() if key in kind.model_fields}
    beside = sorted(set(origin.options) - set(options) - {"recipe"})  # the recipe of training that goes on is the parent's
    shards = [size for name, size in _files(checkpoint).items() if name.startswith("model-")]
    made = stream.apply(kind.parse(options, f"operation '{origin.name}'"), list(parents), folder / "made", name=origin.name)
    remarks = [f"lineage also tells of {', '.join(beside)}, which is how its options were found"] if beside else []
    return made, remarks + (["written in several files, replayed into one"] if shards else [])


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    return {name: entry.size for name, entry in checkpoint.manifest.files.items()}


def _compare(recorded: Checkpoint, made: Checkpoint, parent: Checkpoint | None, tolerance: float) -> Replay:
    away = moved = 0.0
    differing: dict[str, float] = {}
    for stem in ("model", "optimizer", "ingredients"):
        ours, theirs, before = (_folder(item, stem) for item in (made, recorded, parent))
        for name in sorted(set(ours) ^ set(theirs)):
            differing[f"{stem}: {name} is in one of them only"] = math.inf
        for name in sorted(set(ours) & set(theirs)):
            if ours[name].shape != theirs[name].shape:
                differing[f"{stem}: {name} has another shape"] = math.inf
                continue
            apart, far = _squares(ours[name], theirs[name], before.get(name))
            away, moved = away + apart, moved + far
            if apart > 0:
                differing[f"{stem}: {name}"] = apart
    small = [name for name in ("config.json", "trainer.json", "tokenizer.json") if _digest(made, name) != _digest(recorded, name)]
    differing |= {name: math.inf for name in small}
    distance = math.sqrt(away / moved) if moved else math.sqrt(away)
    result = _judged(recorded, made, parent, distance, sorted(differing, key=lambda name: -differing[name])[:20])
    if made.digest == recorded.digest or (not differing and made.trainer == recorded.trainer):
        result.outcome = "bitwise"
    elif distance <= tolerance and not any(math.isinf(apart) for apart in differing.values()):
        result.outcome = "tolerance"
    return result


def _judged(recorded: Checkpoint, made: Checkpoint | None, parent: Checkpoint | None, distance: float, differing: list[str]) -> Replay:
    """What was found, of class `none` until somebody knows better."""
    origin = recorded.lineage
    assert origin is not None
    machines = keys_that_differ({**origin.versions, **origin.hardware}, {**lineage.versions(), **lineage.hardware()})
    return Replay(
        checkpoint=str(recorded.path),
        digest=recorded.digest,
        act=f"{origin.kind}: {origin.name}",
        parents=[item.digest for item in origin.parents],
        outcome="none",
        replayed_digest=made.digest if made is not None else "",
        distance=distance,
        steps=(recorded.step - (parent.step or 0 if parent is not None else 0)) if origin.kind == "run" and recorded.step is not None else None,
        differing=differing,
        versions=machines,
    )


def _folder(checkpoint: Checkpoint | None, stem: str) -> Any:
    found = {"model": "tensors"}.get(stem, stem)
    return (getattr(checkpoint, found) if checkpoint is not None else None) or {}


def _squares(ours: Any, theirs: Any, before: Any) -> tuple[float, float]:
    """Sums of squares of ours - theirs and of theirs - before (of theirs alone where there is nothing before), in float64."""
    from cairn.checkpoint.operating.stream import piecewise
    from cairn.checkpoint.operating.walk import widened

    apart = far = 0.0
    for begin, end in piecewise(theirs.spec):
        there = widened(theirs.flat(begin, end)).double()
        apart += float((widened(ours.flat(begin, end)).double() - there).square().sum())
        known = before is not None and before.shape == theirs.shape
        far += float(((there - widened(before.flat(begin, end)).double()) if known else there).square().sum())
    return apart, far


def _digest(checkpoint: Checkpoint, name: str) -> str | None:
    entry = checkpoint.manifest.files.get(name)
    return entry.digest if entry is not None else None
