"""The one file in which a model's tensors would lie if this package had written them: what makes equal models equal, however they are stored.

A plain directory of another program has the model digest of the checkpoint that an import makes of it: of its tensors in this order, of
what its config.json says, and of its tokenizer; not of how its files are cut, padded or indented.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.layout import plan
from cairn.checkpoint.format.manifest import BLOCK_BYTES, FileEntry, block_digest, entry_of, model_digest

if TYPE_CHECKING:
    from cairn.checkpoint.format.lazy import LazyTensor


def weights_entry(tensors: Mapping[str, LazyTensor]) -> FileEntry:
    """The size and the block digests of `model.safetensors` with these tensors; reads each once, in that file's order."""
    (layout,) = plan((tensor.spec for tensor in tensors.values()), "model")
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


def digest_of(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], small: Mapping[str, bytes]) -> str:
    """The model digest of tensors, config.json and small files, whoever stored them."""
    entries = {name: entry_of(data) for name, data in small.items()}
    return model_digest(entries | {"config.json": entry_of(as_json(config)), "model.safetensors": weights_entry(tensors)})
