"""The trainer's side: takes a state part by part into the keeper's memory, in step with the other processes of the job.

    if snapshots.begin(step, specs, parts, files):      # together with all processes; False: this one is left out
        snapshots.put(stem, part, tensor)               # any order, any thread
        snapshots.commit()

A slot is written again only when a newer version is whole on every member, parity included: two versions are always held,
and a death at any moment leaves one of them. Nothing here waits for a disk.
"""

from __future__ import annotations

import json
import mmap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.checkpoint.format.layout import ITEM_BYTES, TensorSpec
from cairn.checkpoint.format.parts import Part
from cairn.checkpoint.memory import link as links
from cairn.checkpoint.memory.area import ALIGNMENT, BODY, Header, Version
from cairn.checkpoint.memory.link import GoneError, Link, Settings
from cairn.checkpoint.saving.peers import Peers
from cairn.errors import InputError

if TYPE_CHECKING:
    import torch


def groups(nodes: Sequence[str], size: int, parity: int) -> list[list[int]]:
    """For each process the processes that protect it and one another: one each on up to `size` nodes.

    `nodes` names the node of each process. Where there are too few nodes for the parity, a process is in a group of its own: parity
    inside one node protects nothing when that node is lost.
    """
    order = list(dict.fromkeys(nodes))
    count = max(1, -(-len(order) // size))
    bunch = {name: number * count // len(order) for number, name in enumerate(order)}
    seen, found = Counter[str](), dict[tuple[int, int], list[int]]()
    for rank, name in enumerate(nodes):
        found.setdefault((bunch[name], seen[name]), []).append(rank)
        seen[name] += 1
    by_rank = {rank: members for members in found.values() for rank in members}
    return [by_rank[rank] if parity and len(by_rank[rank]) > parity else [rank] for rank in range(len(nodes))]


class Snapshots:
    """The snapshots of one process of a job."""

    def __init__(self, settings: Settings, group: Sequence[int], parity: int, peers: Peers, *, wait: float = 20, say: Callable[[str], object]) -> None:
        """Start or find the keeper that `settings` describe. `wait` is how long a snapshot waits for the one before to be whole."""
        self.settings, self._peers, self._wait, self._say = settings, peers, wait, say
        self._group, self._parity = list(group), parity if len(group) > 1 else 0
        self.counts: Counter[str] = Counter()
        self.waited = 0.0
        """Seconds in which training waited for keepers."""
        self._attempt = peers.gather(f"{time.time_ns():016x}")[0]
        self._names = peers.gather(settings.name)
        self._last: Version | None = None
        self.keep: Version | None = None
        """The newest version that is known to be whole everywhere."""
        self._slot, self._map = -1, dict[int, tuple[int, mmap.mmap]]()
        self._places: dict[tuple[str, Part], tuple[TensorSpec, int]] = {}
        self._cleaned = False
        self._link = self._linked()
        peers.gather(None)  # everyone's keeper is there before the first asks another

    def _linked(self, attempts: int = 3) -> Link:
        """A link to the keeper, which is started if it is not there. The one that is found may be about to end, hence the attempts."""
        try:
            link = Link(links.start(self.settings), timeout=120)
            link.ask("attach", members=self._names)
        except GoneError:
            if attempts == 1:
                raise
            return self._linked(attempts - 1)
        return link

    def _ask(self, act: str, **fields: Any) -> dict[str, Any]:
        """Ask the keeper; one that is gone is started again first, and has what its memory still holds."""
        try:
            return self._link.ask(act, **fields)
        except GoneError:
            self._link.close()
            self._link = self._linked()
            self.counts["keepers started again"] += 1
            self._say(f"the keeper {self.settings.name} was gone and was started again; the steps since the last snapshot were unprotected")
            return self._link.ask(act, **fields)

    # -- one snapshot ----------------------------------------------------------------------------------------------

    def begin(self, step: int, specs: Mapping[str, Sequence[TensorSpec]], parts: Mapping[str, Sequence[Part]], files: Mapping[str, bytes]) -> bool:
        """Agree with all processes and make room: `specs` of all tensors by stem, the `parts` that this process will put, the small
        `files` (those of the first process count). False where it is left out, since the one before is not yet whole everywhere.

        Raises `InputError` if there is no room for even one snapshot.
        """
        began = time.monotonic()
        self.abort()
        if not self._settled(step):
            return False
        head, size = self._laid_out(specs, parts, files)
        header = Header(step=step, attempt=self._attempt, member=self._peers.rank, members=self._peers.size, group=self._group, parity=self._parity, size=size)
        refusal = self._begun(header)
        first_refusal = next((each for each in self._peers.gather(refusal) if each), None)
        self.waited += time.monotonic() - began
        if first_refusal is not None:
            self.abort()
            if self._last is None:
                raise InputError(first_refusal)
            self._left_out(step, first_refusal)
            return False
        self._write(0, head)
        return True

    def _settled(self, step: int) -> bool:
        """Whether the version before is whole everywhere, or cannot be any more; and it is then the one to keep."""
        if self._last is None:
            return True
        states = self._peers.gather(self._ask("protected", wait=self._wait, **self._last._asdict())["protected"])
        if "no" in states:
            self._left_out(step, "the one before is not whole on every node yet")
            return False
        if set(states) == {"yes"}:
            self.keep = self._last
            self._stop_others()
        return True

    def _left_out(self, step: int, why: str) -> None:
        self.counts["left out"] += 1
        self._say(f"step {step}: no snapshot in memory: {why}")

    def _begun(self, header: Header) -> str | None:
        try:
            answer = self._ask("begin", header=header.model_dump(mode="json"), keep=self.keep)
        except InputError as error:
            return str(error)
        self._slot, path = answer["slot"], Path(answer["path"])
        with path.open("r+b") as file:
            inode = path.stat().st_ino
            if self._map.get(self._slot, (0, None))[0] != inode:
                self._map[self._slot] = inode, mmap.mmap(file.fileno(), 0)
        self._version, self._base = header.version, BODY + header.table
        return None

    def _laid_out(self, specs: Mapping[str, Sequence[TensorSpec]], parts: Mapping[str, Sequence[Part]], files: Mapping[str, bytes]) -> tuple[bytes, int]:
        """The beginning of the payload (its index and the small files) and the bytes of all of it."""
        first = self._peers.first
        sizes = {stem: {spec.name: spec for spec in listed} for stem, listed in specs.items()}
        items = {stem: [ITEM_BYTES[sizes[stem][part.name].dtype] * part.count for part in listed] for stem, listed in parts.items()}
        small = dict(files) if first else {}
        # The index holds positions and so depends on its own length: positions count from its end, which is a multiple of the alignment.
        index: dict[str, Any] = {"stems": {}, "files": {}}
        position = 0
        for name, data in small.items():
            index["files"][name] = [position, position + len(data)]
            position += len(data)
        position, places = _aligned(position), {}
        for stem, listed in parts.items():
            entry: dict[str, Any] = {"parts": []}
            if first:
                entry["specs"] = [[spec.name, spec.dtype, list(spec.shape)] for spec in specs[stem]]
            for part, size in zip(listed, items[stem], strict=True):
                entry["parts"].append([part.name, list(part.offset), list(part.shape), position])
                places[stem, part] = position
                position = _aligned(position + size)
            index["stems"][stem] = entry
        text = json.dumps(index, separators=(",", ":")).encode()
        text += b" " * (_aligned(8 + len(text)) - 8 - len(text))
        front = 8 + len(text)
        self._places = {key: (sizes[key[0]][key[1].name], front + place) for key, place in places.items()}
        return len(text).to_bytes(8, "little") + text + b"".join(small.values()), front + position

    def _write(self, position: int, data: bytes) -> None:
        start = self._base + position
        self._map[self._slot][1][start : start + len(data)] = data

    def place(self, stem: str, part: Part) -> torch.Tensor:
        """The memory of a part that `begin` was told of, of its shape and dtype: whatever is copied there is in the snapshot."""
        import torch

        from cairn.checkpoint.format.dtypes import DTYPES

        spec, begin = self._places[stem, part]
        if not part.count:
            return torch.empty(part.shape, dtype=DTYPES[spec.dtype])
        raw = torch.frombuffer(self._map[self._slot][1], dtype=torch.uint8, count=part.count * ITEM_BYTES[spec.dtype], offset=self._base + begin)
        return raw.view(DTYPES[spec.dtype]).view(part.shape)

    def put(self, stem: str, part: Part, tensor: torch.Tensor) -> None:
        """Copy a part to its place; `tensor` has its shape and dtype and may lie on any device."""
        self.place(stem, part).copy_(tensor)

    def commit(self) -> None:
        """All parts are put: the keeper digests and protects them from here on, whatever becomes of this process."""
        slot, self._slot = self._slot, -1
        try:
            self._link.ask("commit", slot=slot)
        except GoneError:
            self.counts["torn"] += 1  # what a keeper that is gone had begun never was; the next question starts another
            return
        self._last = self._version
        self.counts["snapshots"] += 1

    def abort(self) -> None:
        """Leave a snapshot that was begun; nothing of it stays."""
        if self._slot >= 0:
            slot, self._slot = self._slot, -1
            try:
                self._link.ask("abort", slot=slot)
            except GoneError:
                self.counts["torn"] += 1

    # -- the end ---------------------------------------------------------------------------------------------------

    def _stop_others(self) -> None:
        """Keepers of an earlier, larger job are let go once this job's own state is whole."""
        if not self._peers.first or self._cleaned:
            return
        self._cleaned = True
        run = Path(self.settings.run)
        for name, home in links.homes(run).items():
            if name not in self._names:
                links.stop(run, home)

    def close(self, *, finished: bool) -> None:
        """The run has ended with its state on disk (`finished`): the keeper may go; otherwise it stays, with what it holds."""
        self._map.clear()
        if finished:
            self._peers.gather(None)
            try:
                self._link.ask("stop")
            except GoneError:
                self.counts["torn"] += 1
        self._link.close()


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
