"""The one file in which a model's tensors would lie if this package had written them: what makes equal models equal, however they are stored.

A plain directory of another program has the model digest of the checkpoint that an import makes of it: of its tensors in this order, of
what its config.json says, and of its tokenizer; not of how its files are cut, padded or indented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.layout import FileLayout, TensorSpec, plan
from cairn.checkpoint.format.manifest import BLOCK_BYTES, FileEntry, block_digest, entry_of, model_digest


class Stored(Protocol):
    """A tensor that lies somewhere."""

    @property
    def spec(self) -> TensorSpec:
        """Its name, dtype and shape."""

    def read_bytes(self, target: memoryview, offset: int) -> object:
        """Fill `target` with its bytes from `offset` on."""


@dataclass(frozen=True)
class InFile:
    """A tensor in a file of which any range can be read."""

    spec: TensorSpec
    fill: Callable[[memoryview, int], object]
    """Fills a buffer with bytes of the file from a position on."""
    begin: int

    def read_bytes(self, target: memoryview, offset: int) -> None:
        """Fill `target` with its bytes from `offset` on."""
        self.fill(target, self.begin + offset)


def in_files(files: Iterable[tuple[FileLayout, Callable[[memoryview, int], object]]]) -> dict[str, Stored]:
    """The tensors of files, each given by its layout and how its bytes are read."""
    return {spec.name: InFile(spec, fill, layout.ranges[spec.name][0]) for layout, fill in files for spec in layout.specs}


def weights_entry(tensors: Mapping[str, Stored], stem: str = "model") -> FileEntry:
    """The size and the block digests of one file of `stem` with these tensors; reads each once, in that file's order."""
    (layout,) = plan((tensor.spec for tensor in tensors.values()), stem)
    block, filled, digests = memoryview(bytearray(BLOCK_BYTES)), 0, list[str]()
    sources: list[tuple[int, Any]] = [(len(layout.header), layout.header), *((spec.nbytes, tensors[spec.name]) for spec in layout.specs)]
    for size, source in sources:
        done = 0
        while done < size:
            count = min(BLOCK_BYTES - filled, size - done)
            if isinstance(source, bytes):
                block[filled : filled + count] = source[done : done + count]
            else:
                source.read_bytes(block[filled : filled + count], done)
            done, filled = done + count, filled + count
            if filled == BLOCK_BYTES:
                digests.append(block_digest(block))
                filled = 0
    if filled:
        digests.append(block_digest(block[:filled]))
    return FileEntry(size=layout.size, blocks=digests)


def digest_of(tensors: Mapping[str, Stored], config: Mapping[str, Any], small: Mapping[str, bytes]) -> str:
    """The model digest of tensors, config.json and small files, whichever program stored them."""
    entries = {name: entry_of(data) for name, data in small.items()}
    return model_digest(entries | {"config.json": entry_of(as_json(config)), "model.safetensors": weights_entry(tensors)})
