"""Snapshots in memory as an ingredient of a run: `fault_tolerance.memory.every=5 fault_tolerance.memory.parity=1`; `protection` takes them."""

from __future__ import annotations

from pydantic import Field

from cairn.options import Options


class MemoryOptions(Options):
    """Snapshots of the whole state in the memory of the nodes, kept by processes that outlive the trainers."""

    every: int = Field(5, ge=1)
    """Steps between two snapshots."""
    parity: int = Field(0, ge=0)
    """Nodes of a group that may be lost at once with their memory. 0: snapshots survive trainers, not nodes."""
    group: int = Field(8, ge=2, le=32)
    """Most nodes that protect one another; parity costs parity / (group - parity) of a snapshot's memory."""
    slots: int = Field(2, ge=2)
    """Snapshots held at once. A third lets a snapshot begin before the parity of the last is complete."""
    idle: float = Field(600, gt=0)
    """Seconds without a trainer after which a keeper writes what it holds to disk and leaves."""


class FaultTolerance(Options):
    """What is done so that a death costs little."""

    memory: MemoryOptions | None = None
    """Snapshots in memory; None keeps checkpoints on disk alone."""
