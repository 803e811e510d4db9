"""How likely work is lost, and how often to snapshot: node losses against parity, and the best intervals for memory and disk.

"Reliable and Efficient In-Memory Fault Tolerance of LLM Pretraining" (2310.12670) for survival; Young 1974 and Daly 2006 for intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from cairn import plotting
from cairn.errors import InputError
from cairn.options import Options

HOUR = 3600.0


def node_survival(hours: float, mtbf: float, shape: float = 1.0) -> float:
    """Probability that a node lives for `hours`: exp(-(t / scale) ** shape), with the scale at which its mean life is `mtbf` hours."""
    return math.exp(-((hours / (mtbf / math.gamma(1 + 1 / shape))) ** shape))


def group_survival(alive: float, members: int, parity: int) -> float:
    """Probability that at most `parity` of `members` nodes are lost, each living with probability `alive`."""
    return math.fsum(math.comb(members, lost) * (1 - alive) ** lost * alive ** (members - lost) for lost in range(min(parity, members) + 1))


def job_survival(alive: float, groups: Sequence[int], parity: int, software: float = 1.0) -> float:
    """Probability that every group survives. `software` is that of one node's programs; with a keeper their death loses nothing: 1."""
    return math.prod(group_survival(alive * software, members, parity) for members in groups)


def group_sizes(nodes: int, group: int) -> list[int]:
    """Members of the groups into which a job of `nodes` nodes falls, of at most `group` each and as equal as can be."""
    count = -(-nodes // group)
    return [(number + 1) * nodes // count - number * nodes // count for number in range(count)]


def fatal_rate(groups: Sequence[int], parity: int, mtbf: float, repair: float) -> float:
    """Losses of work per hour in the long run: a node is lost, and `parity` more of its group before `repair` hours have made it good.

    A first loss in a group of n comes at rate n / mtbf; each further one is exponential at the rate of the nodes that are left.
    """
    alive = math.exp(-repair / mtbf)
    return math.fsum(n / mtbf * (1 - group_survival(alive, n - 1, parity - 1) if parity else 1.0) for n in groups)


def best_interval(stall: float, between: float) -> float:
    """Time between two saves that costs least: each stalls for `stall`, a failure comes every `between` on average (same unit).

    Daly's higher-order form of Young's sqrt(2 * stall * between); infinite where nothing ever fails.
    """
    if math.isinf(between) or stall >= 2 * between:
        return between
    ratio = stall / (2 * between)
    return math.sqrt(2 * stall * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def overhead(interval: float, stall: float, between: float, restore: float) -> float:
    """Share of the time that goes into saving, redoing and restoring: d / T + (T / 2 + r) / M."""
    if math.isinf(between):
        return 0.0 if math.isinf(interval) else stall / interval
    return stall / interval + (interval / 2 + restore) / between


class Job(Options):
    """A job and how its machines fail."""

    nodes: int = Field(ge=1)
    group: int = Field(8, ge=1)
    """Most nodes that protect one another."""
    parity: int = Field(1, ge=0)
    """Nodes of a group that may be lost at once."""
    mtbf: float = Field(2000.0, gt=0)
    """Mean life of one NODE in hours (a device's, divided by the devices of a node)."""
    shape: float = Field(1.0, gt=0)
    """Of the Weibull law of a node's life: 1 no ageing, < 1 early deaths, > 1 wear."""
    hours: float = Field(24.0, gt=0)
    """The time over which the job is to survive."""
    software: float | None = Field(None, gt=0)
    """Mean time in hours between deaths of a node's programs alone; None: they do not die."""
    repair: float = Field(0.25, ge=0)
    """Hours from a node's loss until its state is protected again: replacement, restore and the next snapshot."""
    memory_stall: float = Field(0.1, gt=0)
    """Seconds for which a snapshot in memory stops training,"""
    disk_stall: float = Field(10.0, gt=0)
    """and one on disk."""
    memory_restore: float = Field(60.0, ge=0)
    """Seconds from a death to the next finished step with a state in memory,"""
    disk_restore: float = Field(300.0, ge=0)
    """and with one on disk."""


def survival(nodes: int, **options: Any) -> dict[str, Any]:
    """Probabilities of losing work, best intervals and what they cost, with the assumptions under which these figures hold.

    Options are the fields of `Job`. Times in the result are hours, but for intervals, which are seconds.
    Raises `InputError` for impossible values.
    """
    job = Job.parse({"nodes": nodes, **options}, "survival")
    groups = group_sizes(job.nodes, job.group)
    if job.parity >= min(groups) and job.parity:
        raise InputError(f"parity {job.parity} needs groups of more nodes than {min(groups)}; raise group, or lower parity.")
    alive = node_survival(job.hours, job.mtbf, job.shape)
    programs = node_survival(job.hours, job.software) if job.software is not None else 1.0
    fatal = fatal_rate(groups, job.parity, job.mtbf, job.repair)
    survived = job.nodes / job.mtbf - fatal + (job.nodes / job.software if job.software is not None else 0.0)
    memory = _level(job.memory_stall, survived, job.memory_restore)
    disk = _level(job.disk_stall, fatal, job.disk_restore)
    alone = _level(job.disk_stall, survived + fatal, job.disk_restore)
    return {
        "node_survives": alive,
        "lost_without_memory_protection": 1 - job_survival(alive, groups, 0, programs),
        "lost_with_keepers_alone": 1 - job_survival(alive, groups, 0),
        "lost_with_parity": 1 - job_survival(alive, groups, job.parity),
        "lost_with_parity_and_repair": -math.expm1(-fatal * job.hours),
        "groups": groups,
        "memory": memory,
        "disk": disk,
        "overhead": memory["overhead"] + disk["overhead"],
        "disk_alone": alone,
        "assumptions": _assumptions(job),
    }


def _level(stall: float, rate: float, restore: float) -> dict[str, float]:
    """The best interval (seconds) against failures of a rate per hour, and its overhead."""
    between = HOUR / rate if rate > 0 else math.inf
    interval = best_interval(stall, between)
    return {"hours_between_failures": between / HOUR, "interval_seconds": interval, "overhead": overhead(interval, stall, between, restore)}


def _assumptions(job: Job) -> list[str]:
    ageing = "does not age" if job.shape == 1 else "is more often lost when young" if job.shape < 1 else "wears out"
    return [
        f"A node lives {job.mtbf:g} hours on average by a Weibull law of shape {job.shape:g} (it {ageing}); all begin new.",
        "Nodes fail independently: a rack, a switch or a power line that takes several at once is not in these figures.",
        "The members of a group are on different nodes, and a node's memory is lost with it.",
        f"Without repair no lost node comes back within the {job.hours:g} hours; with repair it is protected again after {job.repair:g} hours.",
        "Rates for repair and intervals are those of the long run (1 / mean life), whatever the shape.",
        "With keepers the death of programs loses no snapshot; without, it loses what was in memory.",
    ]


def draw(path: str | Path, nodes: int, **options: Any) -> Path:
    """The probability of losing work over time, without repair, for no parity up to two blocks more than asked; as a PNG."""
    job = Job.parse({"nodes": nodes, **options}, "survival")
    groups = group_sizes(job.nodes, job.group)
    times = [job.hours * (number + 1) / 100 for number in range(200)]
    figure, axis = plotting.subplots(figsize=(6, 4))
    for parity in range(min(job.parity + 2, min(groups))):
        lost = [1 - job_survival(node_survival(time, job.mtbf, job.shape), groups, parity) for time in times]
        axis.plot(times, lost, label=f"parity {parity}" if parity else "no parity", linewidth=2.5 if parity == job.parity else 1.2)
    axis.axvline(job.hours, color="grey", linewidth=0.8)
    axis.set(xlabel="hours", ylabel="probability of losing a snapshot", yscale="log", title=f"{job.nodes} nodes, groups of {max(groups)}")
    axis.legend()
    plotting.save(figure, path)
    return Path(path)
