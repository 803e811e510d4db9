"""Combining checkpoints by name: what `cairn merge` and `cairn average` call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.checkpoint.format.place import place
from cairn.device import computes
from cairn.errors import InputError

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint
    from cairn.merging.barrier import Barrier
    from cairn.merging.compare import MethodComparison
    from cairn.merging.protocols import ProtocolChoice
    from cairn.merging.target import MergeTarget

Progress = Callable[[int, int], object]


@computes
def merge(
    method: str,
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    base: str | Path | Checkpoint | None = None,
    objective: Callable[[Checkpoint], MergeTarget] | MergeTarget | None = None,
    budget: int = 20,
    seed: int = 0,
    allow_non_finite: bool = False,
    device: Any = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Combine checkpoints by the operation `method` with its `options` into the new checkpoint `out`; streams.

    Methods on task vectors need the `base` that the checkpoints were trained from. With an `objective` the options that
    are not given are searched with at most `budget` merges in memory, measured on `device` (as `cairn.device.choose`); lineage keeps every
    trial. Raises `NotFoundError`
    for an unknown method and `InputError` or `MismatchError` before anything is written.
    """
    from cairn.checkpoint.format import read
    from cairn.checkpoint.operating.stream import apply, opened_for
    from cairn.options import configure

    operation = configure("operation", {"name": method, **(options or {})})
    parents = parents_of(method, checkpoints, base)
    if objective is None:
        return apply(operation, parents, out, allow_non_finite=allow_non_finite, progress=progress)
    from cairn.merging.search import search
    from cairn.merging.target import Bench

    if place(out).exists():
        raise InputError(f"{out} exists; a checkpoint is never overwritten, choose another name.")
    opened = opened_for(operation, parents)
    wanted = objective if not callable(objective) else objective(read.open(opened[0].path))
    found = search(method, Bench(opened), wanted, budget, options, seed=seed)
    told = {"search": {"objective": wanted.described, "budget": budget, "seed": seed, "value": found.value, "trials": found.trials}}
    return apply(configure("operation", {"name": method, **found.options}), opened, out, also=told, allow_non_finite=allow_non_finite, progress=progress)


def parents_of(method: str, checkpoints: Sequence[str | Path | Checkpoint], base: str | Path | Checkpoint | None) -> list[str | Path | Checkpoint]:
    """The operation's parents: the base first where the method works on task vectors. Raises `InputError` if it is missing or has no use."""
    from cairn import catalog

    based = getattr(catalog.get("operation", method).implementation, "based", False)
    if based and base is None:
        raise InputError(f"{method} merges what checkpoints have learned beyond the one that they were trained from; name that with --base.")
    if base is not None and not based:
        raise InputError(f"{method} knows no base; give the checkpoint among the others if it is to be part of the result.")
    return [base, *checkpoints] if base is not None else list(checkpoints)


def average(
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    last: int | None = None,
    method: str = "average",
    options: Mapping[str, Any] | None = None,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Mean of checkpoints (`method` average, or ema with its beta); of the `last` checkpoints of a run when one run is named."""
    from cairn.checkpoint.format import read

    sources = list(checkpoints)
    if last is not None:
        if len(sources) != 1 or not isinstance(sources[0], (str, Path)):
            raise InputError("last=N averages the newest checkpoints of one run; name that run alone.")
        if read.has_stages(sources[0]):
            raise InputError(f"{sources[0]} has several stages; name one of them, or the checkpoints: {read.list_stages(sources[0])[0]}.")
        inside = read.list_checkpoints(sources[0])
        if len(inside) < last or last < 1:
            raise InputError(f"The run {sources[0]} has {len(inside)} complete checkpoints; {last} cannot be averaged.")
        sources = list(inside[-last:])
    return merge(method, sources, out, options, allow_non_finite=allow_non_finite, progress=progress)


@dataclass(frozen=True)
class Compared:
    """A comparison, and the best merge of it if it was to be written."""

    table: MethodComparison
    written: Checkpoint | None

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return self.table.plain() | {"written": str(self.written.path) if self.written is not None else None}


@dataclass(frozen=True)
class Selected:
    """What each protocol chose of each run."""

    choices: list[ProtocolChoice]

    def plain(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [asdict(choice) | {"mean": choice.mean} for choice in self.choices]


@computes
def request(
    method: str,
    checkpoints: Sequence[str],
    out: Path | None,
    settings: Sequence[str],
    *,
    base: str | None,
    measure: str | None,
    metric: str | None,
    budget: int,
    methods: Sequence[str] | None,
    seed: int,
    allow_non_finite: bool = False,
    device: Any = None,
    say: Callable[[str], object],
    progress: Progress,
) -> Checkpoint | Compared | Selected | Barrier:
    """What a command line asks for: a method, or one of `compare`, `protocols`, `barrier`, `greedy-soup`, `reconstruct`, which are no single
    operation."""
    from cairn.options import override

    options = override({}, settings)
    if method == "protocols":
        return _select(checkpoints, out, measure, metric, options)
    aims = {key: options.pop(key, None) for key in ("select", "report")}
    objective = _objective(measure, metric, aims)
    if method == "barrier":
        if base is not None or aims["report"] is not None:
            raise InputError("barrier looks at two checkpoints on one set of data: select.KEY=VALUE alone, and no --base.")
        return _barrier(checkpoints, out, options, _needed(objective, method))
    if method == "compare":
        if base is None:
            raise InputError("compare needs the checkpoint that the others were trained from; name it with --base.")
        return _compare(checkpoints, base, _needed(objective, method), methods, budget, seed, out, say)
    if out is None:
        raise InputError(f"{method} writes a new checkpoint; say where with -o.")
    if method == "greedy-soup":
        from cairn.checkpoint.format import read
        from cairn.merging.methods.soup import greedy_soup

        opened = [read.open(path) for path in checkpoints]
        return greedy_soup(opened, out, _needed(objective, method)(opened[0]), allow_non_finite=allow_non_finite, progress=progress)
    if method == "reconstruct":
        from cairn.merging.methods.tall_masks import reconstruct

        if len(checkpoints) != 1 or set(options) != {"expert"}:
            raise InputError("reconstruct takes one bundle and the name of an expert: cairn merge reconstruct BUNDLE expert=NAME -o OUT.")
        return reconstruct(checkpoints[0], str(options["expert"]), out, allow_non_finite=allow_non_finite, progress=progress)
    return merge(
        method, checkpoints, out, options, base=base, objective=objective, budget=budget, seed=seed, allow_non_finite=allow_non_finite, progress=progress
    )


def _select(runs: Sequence[str], out: Path | None, measure: str | None, metric: str | None, options: dict[str, Any]) -> Selected:
    from cairn.merging.protocols import measured_selection

    if measure is None:
        raise InputError("protocols chooses and reports by a measurement; name it with --measure, for example --measure held-out source.corpus=en.txt.")
    if out is None or out.exists():
        raise InputError("protocols writes the averages of each run into a new folder; say where with -o.")
    source, targets = options.pop("source", {}), options.pop("target", {})
    unknown = sorted(set(options) - {"last", "oracle", "heads"})
    if unknown:
        raise InputError(f"protocols knows no option '{unknown[0]}'; it takes source.KEY, target.NAME.KEY, last, heads and oracle.")
    return Selected(measured_selection(runs, measure, source, targets, out, metric=metric, **options))


def _barrier(checkpoints: Sequence[str], out: Path | None, options: Mapping[str, Any], objective: Callable[[Checkpoint], MergeTarget]) -> Barrier:
    from cairn.checkpoint.format import read
    from cairn.merging.barrier import between

    if len(checkpoints) != 2 or set(options) - {"points"}:
        raise InputError("barrier takes two checkpoints and may be told how many points: cairn merge barrier A B --measure held-out points=11.")
    if out is not None:
        raise InputError("barrier writes nothing; leave -o out.")
    points = options.get("points", 11)
    if not isinstance(points, int):
        raise InputError(f"points is a whole number, not {points!r}.")
    x, y = map(read.open, checkpoints)
    return between(x, y, objective(x), points)


def _objective(measure: str | None, metric: str | None, aims: Mapping[str, Any]) -> Callable[[Checkpoint], MergeTarget] | None:
    if measure is None:
        if any(aims.values()) or metric is not None:
            raise InputError("select, report and metric belong to a measurement; name one with --measure.")
        return None
    from cairn.merging.target import objective

    return lambda reference: objective(measure, reference, select=aims["select"] or {}, report=aims["report"], metric=metric)


def _needed(objective: Callable[[Checkpoint], MergeTarget] | None, method: str) -> Callable[[Checkpoint], MergeTarget]:
    if objective is None:
        raise InputError(f"{method} chooses by a measurement; name it with --measure, for example --measure held-out select.corpus=valid.txt.")
    return objective


def _compare(
    experts: Sequence[str],
    base: str,
    objective: Callable[[Checkpoint], MergeTarget],
    methods: Sequence[str] | None,
    budget: int,
    seed: int,
    out: Path | None,
    say: Callable[[str], object],
) -> Compared:
    from cairn.checkpoint.operating.stream import apply
    from cairn.merging.compare import METHODS, compare
    from cairn.options import configure

    if out is not None and out.exists():
        raise InputError(f"{out} exists; a checkpoint is never overwritten, choose another name.")
    table = compare(experts, base, objective, methods or METHODS, budget=budget, seed=seed, progress=say)
    if out is None:
        return Compared(table, None)
    best = table.best
    parents = parents_of(best.what, experts, base if configure("operation", best.what).based else None)
    told = {"search": {"objective": table.objective, "budget": budget, "seed": seed, "value": best.chosen_value, "verdict": table.verdict}}
    return Compared(table, apply(configure("operation", {"name": best.what, **(best.options or {})}), parents, out, also=told))
