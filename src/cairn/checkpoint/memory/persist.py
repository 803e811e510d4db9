"""From memory to disk: the newest state that a run's keepers hold becomes an ordinary checkpoint, trainers or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cairn.checkpoint.format import read
from cairn.checkpoint.format.layout import ITEM_BYTES
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE
from cairn.checkpoint.memory.link import Link, homes
from cairn.checkpoint.memory.plan import ParityLayout, find
from cairn.checkpoint.memory.restore import Snapshot
from cairn.checkpoint.saving.write import Writer
from cairn.errors import NotFoundError


def persist(run: Path, path: Path | None = None) -> read.Checkpoint:
    """Write the newest whole state in memory to `path`, by default to its place among the run's checkpoints.

    The checkpoint is, byte for byte but for its lineage, the one that saving at that step would have made. A step that is already on
    disk is not written again. Raises `NotFoundError` if no keeper holds a whole state.
    """
    plan = find(run)
    known = read.list_checkpoints(run)
    if plan is None:
        raise NotFoundError(f"The keepers of {run} hold no state that is whole{f'; the newest on disk is {known[-1].name}' if known else ''}.")
    step = plan.version.step
    place = path or run / "checkpoints" / f"step-{step:08d}"
    if path is None and known and int(known[-1].name.removeprefix("step-")) >= step:
        return read.open(known[-1])
    with _leased(plan) as snapshot, Writer(place) as writer:
        for name, data in snapshot.contents.items():
            if name != LINEAGE:
                writer.put_file(name, data)
        for stem, specs in snapshot.specs.items():
            writer.declare(stem, specs.values())
            for part, rank, begin in snapshot.pieces[stem]:
                piece = memoryview(bytearray(part.count * ITEM_BYTES[specs[part.name].dtype]))
                snapshot.memory.read(rank, begin, begin + len(piece), piece)
                writer.put_part_bytes(stem, part, piece)
        return writer.publish(Lineage.model_validate_json(snapshot.contents[LINEAGE]))


@contextlib.contextmanager
def _leased(plan: ParityLayout) -> Iterator[Snapshot]:
    """The state; as long as it is read, no trainer writes into the memory that is being read."""
    known = homes(Path(plan.run))
    with contextlib.ExitStack() as stack:
        for share in plan.data.values():
            stack.enter_context(Link(known[share.home], timeout=60)).ask("lease", **plan.version._asdict())
        yield stack.enter_context(contextlib.closing(Snapshot(plan)))
