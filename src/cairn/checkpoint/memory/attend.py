"""What a person asks of a run's keepers: what they hold, and to go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cairn.checkpoint.format import read
from cairn.checkpoint.memory import link
from cairn.checkpoint.memory.link import GoneError, Link
from cairn.checkpoint.memory.persist import persist
from cairn.checkpoint.memory.plan import find
from cairn.errors import NotFoundError


def status(run: Path) -> dict[str, Any]:
    """Each keeper of a run (`keepers`) and the step of the newest state that they can give back whole (`newest`).

    Raises `NotFoundError` if the run has no keepers.
    """
    plan, keepers = find(run), []
    for home in _homes(run).values():
        try:
            with Link(home, timeout=5) as conversation:
                keepers.append({"answers": True, **_held(conversation.ask("status"))})
        except GoneError:
            keepers.append({"answers": False, "name": home.name, "node": home.node, "pid": home.pid})
    return {"keepers": keepers, "newest": plan.version.step if plan is not None else None}


def _held(status: dict[str, Any]) -> dict[str, Any]:
    steps: dict[str, list[int]] = {"data": [], "parity": []}
    for area in status["areas"]:
        if area["state"] == "clean" and area["header"] is not None:
            steps[area["kind"]].append(area["header"]["step"])
    return status | {"steps": sorted(steps["data"]), "parity_steps": sorted(steps["parity"]), "bytes": sum(area["bytes"] for area in status["areas"])}


def stop(run: Path, *, discard: bool = False) -> dict[str, Any]:
    """Let every keeper of a run go, its newest state written to disk first unless `discard`; says where, and how many there were.

    Raises `NotFoundError` if there are none, or if what they hold is neither whole nor older than what is on disk: they stay then.
    """
    known = _homes(run)
    plan = find(run)
    steps = [path.name.removeprefix("step-") for path in read.list_checkpoints(run)]
    needed = not discard and (plan is not None or not steps)
    saved = persist(run) if needed else None
    stopped = sum(link.stop(run, home) for home in known.values())
    return {"stopped": stopped, "checkpoint": str(saved.path) if saved is not None else None}


def _homes(run: Path) -> dict[str, link.Home]:
    known = link.homes(run)
    if not known:
        raise NotFoundError(f"The run {run} has no keepers; fault_tolerance.memory.every=5 in its recipe starts them.")
    return known
