"""Plain transformers directories: safetensors or pickled .bin files, single or numbered with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from cairn.catalog import register
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Opening, Slice, TensorSource, read_json, whole
from cairn.checkpoint.foreign.pickles import structure, tensors_of
from cairn.checkpoint.format.folder import TensorFolder
from cairn.errors import DamagedError, MismatchError, NotFoundError

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@register("layout", "transformers")
class Transformers(Layout):
    """A directory that transformers wrote: model.safetensors or pytorch_model.bin, single or numbered."""

    pickled: ClassVar[bool] = False

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        safe = (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists()
        return (safe or (folder / BIN).exists() or (folder / INDEX).exists()) and not (folder / ".metadata").exists()

    def open(self, opening: Opening) -> TensorSource:
        folder = opening.folder
        config = opening.config or read_json(folder / "config.json")
        if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
            tensors = TensorFolder(folder, "model")
            slices = [Slice(name, WEIGHT, lazy.shape, lazy.dtype, lazy.load) for name, lazy in tensors.items()]
            return TensorSource({"files": 1}, slices, config=config)
        files = _files(folder)
        opening.needs_pickles(folder / files[0])
        slices = [whole(name, tensor) for file in files for name, tensor in tensors_of(structure(folder / file), folder / file)]
        stored = [piece.name for piece in slices]
        if len(set(stored)) != len(stored):
            raise MismatchError(f"{folder}: '{next(n for n in stored if stored.count(n) > 1)}' stands in two files; one of them is of another save.")
        _refuse_lost(folder, set(stored))
        return TensorSource({"files": len(files)}, slices, config=config)


def _files(folder: Path) -> list[str]:
    if (folder / BIN).exists():
        return [BIN]
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DamagedError(f"{folder / INDEX} names a file outside its own directory.")
        if not (folder / name).is_file():
            raise NotFoundError(f"{folder}: {name} is missing.")
    return names


def _weight_map(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if index is None or not isinstance(index.get("weight_map"), dict):
        raise DamagedError(f"{folder / INDEX} is not a valid index.")
    return dict(index["weight_map"])


def _refuse_lost(folder: Path, stored: set[str]) -> None:
    if (folder / BIN).exists():
        return
    lost = sorted(set(_weight_map(folder)) - stored)
    if lost:
        raise NotFoundError(f"{folder}: the index names '{lost[0]}', which is in none of the files.")
