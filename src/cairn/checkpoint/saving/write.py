"""Writing a checkpoint: staged beside its place, every byte range written once, digested, then published in one rename.

    with Writer(path) as writer:
        writer.declare("model", specs)              # headers are computed and the files allocated here
        writer.put("model", name, tensor)           # any order, any thread
        writer.put_json("config.json", config)
        checkpoint = writer.publish(lineage)

Until `publish` nothing is visible under `path`; if anything fails, or the process dies, nothing ever is. Blocks are
digested in the background from the pages just written, while further bytes are copied and flushed; where the cores are
busy otherwise, from the bytes as they are written.

Several processes write one checkpoint by giving their `Peers`: every one of them declares the same tensors, puts the
parts that it owns, and publishes. The files are the same, byte for byte, as if one had written them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cairn.checkpoint.format import canonical, fragments, layout, read
from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.layout import FileLayout, TensorSpec
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE, FileEntry, Manifest, entry_of, is_model_file, plain_name
from cairn.checkpoint.format.parts import Part, local_of, owners, part_of
from cairn.checkpoint.format.place import is_store, new_place, place, refusals
from cairn.checkpoint.saving import disk
from cairn.checkpoint.saving.peers import Peers
from cairn.errors import InputError, MismatchError

if TYPE_CHECKING:
    import torch


class Writer:
    """One checkpoint being written. Leaving the context without `publish` removes every trace of it."""

    def __init__(self, path: str | Path, peers: Peers | None = None, *, busy: bool = False) -> None:
        """Begin under a hidden name beside `path`. Raises `InputError` if `path` exists: nothing is ever overwritten.

        `busy`: the cores have other work meanwhile, so that the thread that writes also digests, which takes less work and more time.
        """
        self.path, self._peers = new_place(path), peers or Peers()
        self._files: dict[str, Any] = {}
        self._places: dict[tuple[str, str], tuple[Any, TensorSpec, int]] = {}
        self._small: dict[str, FileEntry] = {}
        self._layouts: dict[str, Sequence[FileLayout]] = {}
        self._pool = disk.workers(self._peers.size, busy=busy)
        self._target: Any = fragments.Store(self.path) if is_store(self.path) else disk.Directory(self.path)
        self._target.join(self._peers.together(self._begin)[0], self._peers.rank)

    def _begin(self) -> str:
        if not self._peers.first:
            return ""
        with self._explained():
            return self._target.begin()

    def declare(self, stem: str, specs: Iterable[TensorSpec], shard_bytes: int | None = None) -> None:
        """Lay out the tensors of `stem` ('model', 'optimizer', ...) and allocate their files, so that a full disk shows now."""
        layouts = layout.plan(specs, stem, shard_bytes)
        self.lay_out(stem, layouts)
        if len(layouts) > 1:
            self.put_json(f"{stem}.safetensors.index.json", layout.index(layouts))

    def lay_out(self, stem: str, layouts: Sequence[FileLayout]) -> None:
        """Like `declare`, with files that are laid out already; an index of them is the caller's to write."""
        self._layouts[stem] = layouts
        if self._peers.first:
            self._peers.together(lambda: self._open(stem, layouts))
        else:
            self._peers.together(lambda: None)  # the first one makes the files
            self._open(stem, layouts)

    def _open(self, stem: str, layouts: Sequence[FileLayout]) -> None:
        with self._explained():
            for plan in layouts:
                file = self._target.open(plan, self._pool, create=self._peers.first)
                self._files[plan.filename] = file
                for spec in plan.specs:
                    self._places[stem, spec.name] = (file, spec, plan.ranges[spec.name][0])

    def put(self, stem: str, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor, whose dtype and shape are those declared, to its place."""
        self.put_bytes(stem, name, 0, as_bytes(tensor))

    def put_bytes(self, stem: str, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` bytes into a tensor. Ranges may come in any order and from any thread, each exactly once."""
        file, spec, _ = self._places[stem, name]
        if offset < 0 or offset + len(data) > spec.nbytes:
            raise ValueError(f"{len(data)} bytes at {offset} do not fit tensor '{name}' of {spec.nbytes} bytes")
        with self._explained():
            file.put_bytes(spec, offset, data)

    def put_part(self, stem: str, part: Part, tensor: torch.Tensor) -> None:
        """Write a part of a tensor; `tensor` has the declared dtype and the shape of the part."""
        self.put_part_bytes(stem, part, as_bytes(tensor))

    def put_part_bytes(self, stem: str, part: Part, data: memoryview) -> None:
        """The same from the part's bytes in C order."""
        file, spec, _ = self._places[stem, part.name]
        if len(data) != part.count * layout.ITEM_BYTES[spec.dtype]:
            raise ValueError(f"{len(data)} bytes do not fill {part}")
        with self._explained():
            file.put_part(spec, part, data)

    def put_all(self, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Write everything that was declared, each process its share of what the processes hold between them."""
        shares = self.shares(groups)

        def put() -> None:
            for stem, mine in shares.items():
                # In the order of the file, so that few of its blocks are begun and not yet complete.
                for part in sorted(mine, key=lambda part: (self._places[stem, part.name][2], part.offset)):
                    self.put_part(stem, part, local_of(groups[stem][part.name]))

        self._peers.together(put)

    def shares(self, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list[Part]]:
        """The parts that this process is to write, by stem."""
        held = self._peers.gather({stem: [part_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in groups.items()})
        found = {}
        for stem, tensors in groups.items():
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            found[stem] = owners([process[stem] for process in held], shapes)[self._peers.rank]
        return found

    def put_json(self, filename: str, document: Any) -> None:
        """Write a small JSON file."""
        self.put_file(filename, as_json(document))

    def put_file(self, filename: str, data: bytes) -> None:
        """Write a small file whole; of several processes the first does."""
        if not plain_name(filename):
            raise ValueError(f"'{filename}' is not a plain file name")
        if not self._peers.first:
            return
        with self._explained():
            self._target.put(filename, data)
        self._small[filename] = entry_of(data)

    def publish(self, lineage: Lineage, expected: str | None = None) -> read.Checkpoint:
        """Flush, write the manifest last, and make the checkpoint visible under its name.

        Raises `MismatchError`, and nothing is published, if a digest is `expected` and the checkpoint has another.
        """
        self.put_json(LINEAGE, lineage.model_dump(mode="json"))
        # What one process alone has completed it digests itself; blocks that several wrote to are shared out once all have written.
        told = self._peers.gather(self._told())
        digests = self._peers.together(lambda: self._finish(told))
        self._peers.together(lambda: self._show(told, digests, expected) if self._peers.first else None)
        self._close()
        return read.open(self.path)

    def _told(self) -> dict[str, Any]:
        with self._explained():
            return {name: file.told() for name, file in self._files.items()}

    def _finish(self, told: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, str]]:
        """Flush, and digest this process's share; returns the digests that it knows, by file and block."""
        found: dict[str, dict[int, str]] = {}
        with self._explained():
            for name, file in self._files.items():
                everyone = [process[name] for process in told]
                found[name] = file.finish(file.left_open(everyone)[self._peers.rank :: self._peers.size], everyone)
        return found

    def _show(self, told: Sequence[Mapping[str, Any]], digests: Sequence[Mapping[str, Mapping[int, str]]], expected: str | None) -> None:
        entries = file_entries(self._files, digests) | self._small
        if expected is not None and (found := Manifest.of(entries).digest) != expected:
            raise MismatchError(
                f"What was read for {self.path} has digest {found[:12]}, not {expected[:12]}: the source is damaged; `cairn verify` says where."
            )
        with self._explained():
            self._target.show(entries, self._files, told, self._uncut(told))

    def _uncut(self, told: Sequence[Mapping[str, Any]]) -> dict[str, FileEntry]:
        """The one file of a model whose tensors were cut into several: they are read back once, in its order."""
        found = {}
        for stem, layouts in self._layouts.items():
            if len(layouts) > 1 and is_model_file(f"{stem}.safetensors"):
                fills = [self._files[plan.filename].written([process[plan.filename] for process in told]) for plan in layouts]
                found[f"{stem}.safetensors"] = canonical.weights_entry(canonical.in_files(zip(layouts, fills, strict=True)), stem)
        return found

    def abort(self) -> None:
        """Remove every trace."""
        if self._target is not None:
            target = self._target
            self._close()
            target.abort()

    def _close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files, self._places, self._target = {}, {}, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the operating system's refusals into one plain sentence, with nothing left behind."""
        try:
            yield
        except refusals() as error:
            self.abort()
            reasons = {
                errno.ENOSPC: "the disk is full",
                errno.EDQUOT: "the disk quota is used up",
                errno.EFBIG: "the file would be too large for the system's limit",
            }
            reason = reasons.get(getattr(error, "errno", None) or 0, getattr(error, "strerror", None) or str(error).rstrip("."))
            raise InputError(f"{self.path} was not written: {reason}. Nothing was left behind; free some space or choose another place.") from error


def file_entries(files: Mapping[str, Any], digests: Sequence[Mapping[str, Mapping[int, str]]]) -> dict[str, FileEntry]:
    """The manifest's entries of files of tensors, from the digests that each process knows by file and block."""
    found = {}
    for name, file in files.items():
        known = {block: digest for process in digests for block, digest in process[name].items()}
        found[name] = FileEntry(size=file.size, blocks=[known[block] for block in range(len(known))])
    return found


def save(
    path: str | Path,
    *,
    model: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    lineage: Lineage,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, torch.Tensor] | None = None,
    ingredients: Mapping[str, torch.Tensor] | None = None,
    trainer: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    peers: Peers | None = None,
) -> read.Checkpoint:
    """Write a whole checkpoint from tensors in memory and return it opened.

    `tokenizer` is anything with `files() -> {name: bytes}`; `trainer` makes trainer.json; files of tensors larger than
    `shard_bytes` are split. Where `peers` are several processes, all of them call this with the same names; tensors may be
    DTensors in any layout, or the same plain tensor everywhere, and what they write does not depend on how many they are.
    Raises `InputError` if `path` exists or the disk is full; nothing is left behind then.
    """
    groups = {stem: tensors for stem, tensors in (("model", model), ("optimizer", optimizer), ("ingredients", ingredients)) if tensors}
    with Writer(path, peers) as writer:
        writer.put_json("config.json", dict(config))
        if generation is not None:
            writer.put_json("generation_config.json", dict(generation))
        for name, data in (tokenizer.files() if tokenizer is not None else {}).items():
            writer.put_file(name, data)
        if trainer is not None:
            writer.put_json("trainer.json", dict(trainer))
        for stem, tensors in groups.items():
            writer.declare(stem, [spec_of(name, tensor) for name, tensor in tensors.items()], shard_bytes)
        writer.put_all(groups)
        return writer.publish(lineage)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor."""
    from cairn.checkpoint.format.dtypes import CODES

    return TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy where it already lies so in host memory."""
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def sweep(directory: str | Path) -> list[Path]:
    """Remove what writers that no longer live left in `directory`; a living one's work on this machine is never touched.

    In a store nobody can tell who lives: whatever lies in a `step-*` there and has no manifest goes, so one run owns the place.
    """
    home = place(directory)
    return fragments.sweep(home) if is_store(home) else disk.sweep(home)
