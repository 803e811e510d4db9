"""Storage for `torch.distributed.checkpoint`: a loop that saves with it writes our checkpoints and reads them in any layout.

    dcp.save({"model": model.state_dict(), "optimizer": optimizer_state}, storage_writer=DcpWriter("ck/100", config=model.config))
    dcp.load(state, storage_reader=DcpReader("ck/100"))

Every rank writes its shards straight into their byte ranges of one `model.safetensors` (and `optimizer.safetensors`, ...), so
nothing is consolidated afterwards: what the save leaves opens in transformers, and `cairn verify` accepts it. Values that are
not tensors go to `state.json`; nothing is pickled on disk.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cairn.checkpoint.format import documents, fragments, kinds, layout, read
from cairn.checkpoint.format.dtypes import CODES
from cairn.checkpoint.format.layout import FileLayout, TensorSpec
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE, entry_of
from cairn.checkpoint.format.parts import Part
from cairn.checkpoint.format.place import is_store, place
from cairn.checkpoint.format.redundant import aliases
from cairn.checkpoint.saving import disk
from cairn.checkpoint.saving.write import as_bytes, file_entries
from cairn.errors import InputError

STATE = "state.json"
FORMAT = 1
_STEM = re.compile(r"[A-Za-z0-9_-]+")
_TUPLE = "__tuple__"


@dataclass(frozen=True)
class Leaf:
    """Where a value of the state dictionary goes: the keys that lead to it, and for a tensor its file and name there."""

    path: tuple[str | int, ...]
    stem: str | None = None
    name: str | None = None


class _Leaf(kinds.File):
    """What the description of a state says of one leaf."""

    path: list[str | int]
    stem: str | None = None
    name: str | None = None
    value: Any = None


class _State(kinds.File):
    """The description of a state, by the leaves' names."""

    leaves: dict[str, _Leaf]


@dataclass(frozen=True)
class _Work:
    """What the coordinator tells every rank: how to join, and how the files are laid out."""

    token: str
    ranks: int
    layouts: list[FileLayout]
    leaves: dict[str, Leaf]


@dataclass(frozen=True)
class _Report:
    """What a rank has done: of each file what it tells and its digests, and the values that it was asked for."""

    told: dict[str, Any]
    digests: dict[str, dict[int, str]]
    values: dict[str, Any]
    leaves: dict[str, Leaf]


def _or_undone(act: Callable[..., Any]) -> Callable[..., Any]:
    """An act of a writer after which, if it fails, nothing is left of what was begun."""

    @functools.wraps(act)
    def acted(writer: DcpWriter, *args: Any, **kwargs: Any) -> Any:
        try:
            return act(writer, *args, **kwargs)
        except BaseException:
            writer._undo.close()
            raise

    return acted


class DcpWriter(StorageWriter):
    """Write what `dcp.save` or `dcp.async_save` saves as a checkpoint at `path`, a directory or the URL of a store.

    A state dictionary of dictionaries makes one file for each (`{"model": ..., "optimizer": ...}`), with the names inside them; a flat
    one is the model. `config` (a mapping, or a configuration of transformers) makes config.json. Raises `InputError` where something
    lies at `path`, and for a value that JSON cannot say, by its name; nothing is published then. What was begun under a hidden name
    goes at once where a rank fails itself, and else with the writer, or with the next save beside it.
    """

    def __init__(self, path: str | Path, *, config: Any = None, lineage: Lineage | None = None) -> None:
        self.path, self.rank, self._coordinator = place(path), 0, True
        self._config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        self._lineage = lineage
        self._target: Any = None
        self._files: dict[str, Any] = {}
        self._undo = contextlib.ExitStack()
        weakref.finalize(self, self._undo.close)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._undo.close()
        self._files = {}
        if checkpoint_id is not None:
            self.path = place(os.fspath(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise InputError("All ranks write one checkpoint together, which takes collectives: leave use_collectives as it is.")
        self.reset()
        self.rank, self._coordinator = kwargs.get("rank", 0), is_coordinator
        self._target = fragments.Store(self.path) if is_store(self.path) else disk.Directory(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @_or_undone
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay out the files, on the coordinator."""
        paths = {name: path for plan in plans for name, path in (plan.planner_data or {}).items()}
        leaves, specs = dict[str, Leaf](), dict[str, dict[str, TensorSpec]]()
        for item in (item for plan in plans for item in plan.items):
            path: tuple[str | int, ...] = tuple(paths.get(item.index.fqn, (item.index.fqn,)))
            if item.type == WriteItemType.BYTE_IO:
                leaves[item.index.fqn] = Leaf(path)
            elif item.index.fqn not in leaves:
                stem, name = _file_of(path)
                if name in specs.setdefault(stem, {}):
                    raise InputError(f"Two tensors would be called '{name}' in {stem}.safetensors; '{item.index.fqn}' is one of them: rename it.")
                leaves[item.index.fqn] = Leaf(path, stem, name)
                specs[stem][name] = _spec(name, item)
        layouts = [each for stem, found in specs.items() for each in layout.plan(found.values(), stem)]
        if not is_store(self.path):
            disk.sweep(self.path.parent)  # of saves that failed on some rank, which nobody tells the others' writers
        token = self._target.begin()
        self._undo.callback(self._target.abort)
        work = _Work(token, len(plans), layouts, leaves)
        self._join(work)
        return [replace(plan, storage_data=work) for plan in plans]

    def _join(self, work: _Work) -> None:
        """Open the files; the coordinator does so first, which makes them."""
        self._target.join(work.token, 0 if self._coordinator else self.rank or 1)
        pool = disk.workers(work.ranks)
        self._undo.callback(pool.shutdown, cancel_futures=True)
        for each in work.layouts:
            self._files[each.filename] = self._undo.enter_context(contextlib.closing(self._target.open(each, pool, create=self._coordinator)))

    @_or_undone
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        work: _Work = plan.storage_data
        values = {item.index.fqn: _value(planner, item) for item in plan.items if item.type == WriteItemType.BYTE_IO}
        if not self._coordinator:
            self._undo.callback(self._target.abort)
            self._join(work)
        specs = {(each.filename, spec.name): spec for each in work.layouts for spec in each.specs}
        for item in plan.items:
            if item.tensor_data is not None:
                leaf, chunk, tensor = work.leaves[item.index.fqn], item.tensor_data.chunk, planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                spec = specs[_filename(leaf), str(leaf.name)]
                self._files[_filename(leaf)].put_part(spec, Part(spec.name, tuple(chunk.offsets), tuple(chunk.sizes)), as_bytes(tensor))
        told = {name: file.told() for name, file in self._files.items()}
        digests = {name: file.finish([], [told[name]]) for name, file in self._files.items()}
        if not self._coordinator:
            self._settle()
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(dcp.MetadataIndex(""), 0, _Report(told, digests, values, work.leaves))])
        return done

    @_or_undone
    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """Digest the blocks that several ranks wrote to, write what is small, and show the checkpoint; on the coordinator."""
        reports = [result.storage_data for rank in results for result in rank]
        told = [report.told for report in reports]
        last = {}
        for name, file in self._files.items():
            everyone = [each[name] for each in told]
            last[name] = file.finish(file.left_open(everyone), everyone)
        values = {name: value for report in reports for name, value in report.values.items()}
        lineage = self._lineage or Lineage.record("import", "torch.distributed.checkpoint")
        small = {
            "config.json": documents.as_json(self._config),
            STATE: documents.as_json({"format": FORMAT, "leaves": {name: _entry(leaf, values.get(name)) for name, leaf in reports[0].leaves.items()}}),
            LINEAGE: documents.as_json(lineage.model_dump(mode="json")),
        }
        for name, data in small.items():
            self._target.put(name, data)
        entries = file_entries(self._files, [*(report.digests for report in reports), last])
        entries |= {name: entry_of(data) for name, data in small.items()}
        self._target.show(entries, self._files, told, uncut={})  # each stem is one file here
        self._settle()

    def _settle(self) -> None:
        """Close the files and leave what was written where it is."""
        self._undo.pop_all()
        for file in self._files.values():
            file.close()
        self._files = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class DcpReader(StorageReader):
    """Read, with `dcp.load`, what `DcpWriter` wrote, and the weights of any other checkpoint under their Hugging Face names.

    `prefix` stands before those names in the state dictionary: `model.` for `{"model": model.state_dict()}`. Each rank reads the
    bytes of its own shards, in whatever layout it holds them.
    """

    def __init__(self, path: str | Path, *, prefix: str = "") -> None:
        self.path, self._prefix = place(path), prefix

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        for name in ("_opened", "_contents"):
            vars(self).pop(name, None)
        if checkpoint_id is not None:
            self.path = place(os.fspath(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        described: dict[str, Any] = {}
        for name, leaf in self._leaves.items():
            described[name] = dcp.BytesStorageMetadata() if leaf.name is None else _described(self._tensor(leaf))
        return dcp.Metadata(described, planner_data={name: leaf.path for name, leaf in self._leaves.items()})

    def set_up_storage_reader(self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is set up: every rank opens the checkpoint when it reads."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            leaf = self._leaves[item.storage_index.fqn]
            if item.type == LoadItemType.BYTE_IO:
                # The planner unpickles what it is given; this is pickled here, in memory, from plain JSON.
                buffer = io.BytesIO()
                torch.save(_decoded(self._values[item.storage_index.fqn]), buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
                continue
            lazy, target = self._tensor(leaf), planner.resolve_tensor(item).detach()
            part = Part(lazy.name, tuple(item.storage_offsets), tuple(item.lengths))
            if target.device.type == "cpu" and target.dtype == lazy.dtype and target.is_contiguous():
                lazy.read_part(part, target)
            else:
                target.copy_(lazy.read_part(part))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def _leaves(self) -> dict[str, Leaf]:
        return self._contents[0]

    @property
    def _values(self) -> dict[str, Any]:
        return self._contents[1]

    @functools.cached_property
    def _contents(self) -> tuple[dict[str, Leaf], dict[str, Any]]:
        opened = self._opened
        data = opened.read_file(STATE)
        if data is None:
            names = {name: name for name in opened.tensors} | aliases(opened)
            return {self._prefix + name: Leaf((self._prefix + name,), "model", stored) for name, stored in names.items()}, {}
        found = documents.validated(_State, documents.parse(data, opened.path / STATE), opened.path / STATE).leaves
        leaves = {name: Leaf(tuple(entry.path), entry.stem, entry.name) for name, entry in found.items()}
        return leaves, {name: entry.value for name, entry in found.items() if entry.name is None}

    def _tensor(self, leaf: Leaf) -> LazyTensor:
        return self._opened.folder(str(leaf.stem))[str(leaf.name)]

    @functools.cached_property
    def _opened(self) -> read.Checkpoint:
        return read.open(self.path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _file_of(path: tuple[str | int, ...]) -> tuple[str, str]:
    """The file and the name in it of the tensor to which these keys lead: what lies at the top is the model's."""
    if len(path) == 1:
        return "model", str(path[0])
    stem = str(path[0])
    if not _STEM.fullmatch(stem):
        raise InputError(f"'{stem}' names a file of tensors; use letters, digits, '-' and '_' for the keys at the top of the state dictionary.")
    return stem, ".".join(map(str, path[1:]))


def _filename(leaf: Leaf) -> str:
    return f"{leaf.stem}.safetensors"


def _spec(name: str, item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None
    dtype = item.tensor_data.properties.dtype
    if dtype not in CODES:
        raise InputError(f"'{item.index.fqn}' is of type {dtype}, which safetensors cannot hold.")
    return TensorSpec(name, CODES[dtype], tuple(item.tensor_data.size))


def _described(lazy: LazyTensor) -> dcp.TensorStorageMetadata:
    size = torch.Size(lazy.shape)
    return dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=lazy.dtype), size, [dcp.ChunkStorageMetadata(torch.Size([0] * len(size)), size)])


def _entry(leaf: Leaf, value: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": list(leaf.path)}
    return entry | ({"stem": leaf.stem, "name": leaf.name} if leaf.name is not None else {"value": value})


def _value(planner: SavePlanner, item: WriteItem) -> Any:
    """A value that is not a tensor, as JSON says it."""
    if not hasattr(planner, "lookup_object"):
        raise InputError(f"'{item.index.fqn}' is no tensor, and {type(planner).__name__} gives it only pickled; use a DefaultSavePlanner.")
    return _encoded(planner.lookup_object(item.index), item.index.fqn)


def _encoded(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [_encoded(inner, where) for inner in value]
    if type(value) is tuple:
        return {_TUPLE: [_encoded(inner, where) for inner in value]}
    if type(value) is dict and _TUPLE not in value and all(type(key) is str for key in value):
        return {key: _encoded(inner, where) for key, inner in value.items()}
    shown = repr(value) if len(repr(value)) < 60 else type(value).__name__
    raise InputError(f"'{where}' holds {shown}, which JSON cannot say; make it a tensor, a number, a text, or a list or dictionary of these, or leave it out.")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    if isinstance(value, dict):
        return tuple(map(_decoded, value[_TUPLE])) if _TUPLE in value else {key: _decoded(inner) for key, inner in value.items()}
    return value
