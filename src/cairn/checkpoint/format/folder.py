"""The tensors of one stem (`model`, `optimizer`, ...): in one file, or in several with an index that decides where each stands."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cairn.checkpoint.format import documents, fragments, kinds
from cairn.checkpoint.format.layout import FileLayout, read_layout
from cairn.checkpoint.format.lazy import LazyTensor, MappedFile, StoredTensor, StoreObject
from cairn.checkpoint.format.manifest import Manifest, plain_name
from cairn.checkpoint.format.place import is_store
from cairn.checkpoint.format.sound import SoundBlocks
from cairn.errors import DamagedError

if TYPE_CHECKING:
    import torch


class TensorFolder(Mapping[str, "LazyTensor"]):
    """All tensors of one stem: name -> LazyTensor. With a `manifest`, what is read whole is held against its digests as it is read."""

    def __init__(
        self,
        directory: Path,
        stem: str,
        stored: Mapping[str, fragments.StoredFile] | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.directory, self.stem, self._stored, self._manifest = directory, stem, stored or {}, manifest
        self.layouts: list[FileLayout] = []
        self._tensors: dict[str, LazyTensor] = {}
        where = self._where()
        files = {filename: self._open(filename) for filename in ([f"{stem}.safetensors"] if where is None else sorted(set(where.values())))}
        for filename, tensors in files.items():
            for name, tensor in tensors.items():
                home = where.get(name) if where is not None else filename
                if home is None and name in self._tensors:
                    raise DamagedError(f"{self._index}: '{name[:80]}' stands in two files and the index does not say which one counts.")
                if home in (filename, None):
                    self._tensors[name] = tensor
        for name, filename in (where or {}).items():
            if name not in files[filename]:
                raise DamagedError(f"{self._index}: the index says that '{name[:80]}' stands in {filename}, which does not hold it.")

    @property
    def _index(self) -> Path:
        return self.directory / f"{self.stem}.safetensors.index.json"

    def _where(self) -> dict[str, str] | None:
        """The file of each tensor, from the index; None where one file holds them all."""
        single = f"{self.stem}.safetensors"
        if self._there(single):
            return None
        try:
            where = documents.validated(kinds.Index, documents.read_object(self._index), self._index).weight_map
        except FileNotFoundError:
            raise DamagedError(f"{self.directory} has no {single} and no index of numbered files.") from None
        for name in sorted(set(where.values())):
            if not plain_name(name):
                raise DamagedError(f"{self._index} names a file outside its own directory.")
            if not self._there(name):
                raise DamagedError(f"{self.directory}: {name} is missing.")
        return where

    def _open(self, filename: str) -> dict[str, LazyTensor]:
        path, stored = self.directory / filename, self._stored.get(filename)
        layout = stored.layout if stored is not None else read_layout(path)
        self.layouts.append(layout)
        known = self._manifest.files.get(filename) if self._manifest is not None else None
        blocks = (known.blocks, self._manifest.block_size, layout.size) if known is not None and self._manifest is not None else None
        if stored is not None:
            sound = SoundBlocks(path, *blocks, stored.fill) if blocks is not None else None
            return {spec.name: StoredTensor(spec, stored, sound) for spec in layout.specs}
        file = StoreObject(path) if is_store(path) else MappedFile(path)
        if blocks is not None:
            file.verify_by(*blocks)
        return {spec.name: LazyTensor(spec, file, layout.ranges[spec.name][0]) for spec in layout.specs}

    def _there(self, name: str) -> bool:
        return name in self._stored or (self.directory / name).is_file()

    def without(self, names: Container[str]) -> TensorFolder:
        """The same tensors but those of these names."""
        kept = object.__new__(TensorFolder)
        kept.__dict__ |= self.__dict__ | {"_tensors": {name: tensor for name, tensor in self._tensors.items() if name not in names}}
        return kept

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self._tensors.values())

    def load(self, threads: int | None = None) -> dict[str, torch.Tensor]:
        """All tensors in memory, read by several threads."""
        loaded = {name: tensor.empty() for name, tensor in self._tensors.items()}
        pieces = [(tensor, loaded[name], begin) for name, tensor in self._tensors.items() for begin in tensor.piece_starts()]
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda piece: piece[0].read_piece(piece[1], piece[2]), pieces):
                pass
        return loaded
