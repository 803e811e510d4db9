"""The manifest: size and block digests of every file, written last. A directory without a valid one is no checkpoint.

Three digests come from the block digests. A file's is over its blocks; `digest` is over every file that is state, so
equal states have equal digests, whenever and by however many processes they were written (lineage.json, which records
exactly that, is checked but not part of the identity); `model_digest` is over what defines the model's outputs, and
is what measurements are stored under.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from blake3 import blake3
from pydantic import Field, model_validator

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.kinds import Whole
from cairn.checkpoint.format.place import sizes
from cairn.errors import DamagedError
from cairn.options import Options

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
FORMAT = 2
"""The newest format that is read. 1: every file lies as it is; 2: files of tensors lie in fragments, see `fragments`."""
BLOCK_BYTES = 4 * 2**20


class FileEntry(Options):
    """Size in bytes and hexadecimal blake3 digests of the fixed-size blocks of one file."""

    size: Whole
    blocks: list[str]

    @property
    def digest(self) -> str:
        return blake3(f"{self.size}:{','.join(self.blocks)}".encode()).hexdigest()


@dataclass(frozen=True)
class Damage:
    """Bytes that are not what was written: `file`, what is wrong, and, for a block, its byte range and the tensors in it."""

    file: str
    problem: str
    block: int | None = None
    begin: int | None = None
    end: int | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.block is None:
            return f"{self.file}: {self.problem}"
        inside = f", in tensors {', '.join(self.tensors)}" if self.tensors else ""
        return f"{self.file}: block {self.block} (bytes {self.begin} to {self.end}) {self.problem}{inside}"


class Manifest(Options):
    """What a checkpoint consists of."""

    format: Whole = 1
    block_size: int = Field(BLOCK_BYTES, ge=2**12, le=2**30)
    files: dict[str, FileEntry]
    fragments: dict[str, Whole] = {}
    """Objects and their sizes that hold the files of tensors where a store cannot hold them as they are."""
    uncut: dict[str, FileEntry] = {}
    """Where a model's tensors lie in numbered files, the one file that they would fill: equal models have equal digests, however they are cut."""
    digest: str
    model_digest: str

    @model_validator(mode="after")
    def _every_block_counts(self) -> Self:
        for name, entry in (*self.files.items(), *self.uncut.items()):
            if len(entry.blocks) != -(-entry.size // self.block_size):
                raise ValueError(f"{name[:80]} of {entry.size} bytes does not have {len(entry.blocks)} blocks")
        return self

    @classmethod
    def of(
        cls,
        files: dict[str, FileEntry],
        block_size: int = BLOCK_BYTES,
        fragments: dict[str, int] | None = None,
        uncut: dict[str, FileEntry] | None = None,
    ) -> Manifest:
        """The manifest of these files. Its digests do not depend on whether the files lie in fragments, that of the model not on how they are cut."""
        files = dict(sorted(files.items()))
        return cls(
            format=2 if fragments else 1,
            fragments=dict(sorted((fragments or {}).items())),
            block_size=block_size,
            files=files,
            digest=_digest(files, (name for name in files if name != LINEAGE)),
            uncut=dict(sorted((uncut or {}).items())),
            model_digest=model_digest(files, uncut),
        )

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check `directory/manifest.json`. Raises `DamagedError` if it is absent, unsound or of a later format."""
        path = directory / MANIFEST
        try:
            values = documents.read_object(path)
        except FileNotFoundError:
            raise DamagedError(f"{directory} has no {MANIFEST}: it is not a complete checkpoint.") from None
        if type(values.get("format")) is int and values["format"] > FORMAT:
            raise DamagedError(f"{path} has format {values['format']}; this version of cairn reads formats up to {FORMAT}. Upgrade cairn-lm.")
        manifest = documents.validated(cls, values, path)
        if any(not plain_name(name) for name in (*manifest.files, *manifest.fragments, *manifest.uncut)):
            raise DamagedError(f"{path} names a file outside its own directory.")
        if any(name in manifest.files or not manifest.cut_into(name) for name in manifest.uncut):
            raise DamagedError(f"{path} describes a file that is not cut into numbered ones.")
        if manifest != cls.of(manifest.files, manifest.block_size, manifest.fragments, manifest.uncut):
            raise DamagedError(f"{path}: the digests in it do not agree with each other.")
        return manifest

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        return documents.as_json(self.model_dump(exclude={name for name in ("fragments", "uncut") if not getattr(self, name)}), indent=1)

    def cut_into(self, name: str) -> list[str]:
        """The numbered files into which the tensors of a file are cut."""
        return [part for part in self.files if is_part(part, name) and part.endswith(".safetensors")]

    def check_sizes(self, directory: Path) -> list[Damage]:
        """Files that are absent or of another size: quick, reads no contents."""
        found, there = [], sizes(directory)
        wanted = {name: entry.size for name, entry in self.files.items() if not self.in_fragments(name)} | self.fragments
        for name, size in wanted.items():
            if name not in there:
                found.append(Damage(name, "is missing"))
            elif there[name] != size:
                found.append(Damage(name, f"has {there[name]} bytes, {size} were written"))
        return found

    def in_fragments(self, name: str) -> bool:
        """Whether a file lies in fragments, so that there is no object of its name."""
        return bool(self.fragments) and name.endswith(".safetensors")

    def check_file(self, name: str, block: Callable[[int], bytes], ranges: Mapping[str, tuple[int, int]], share: tuple[int, int] = (0, 1)) -> Iterator[Damage]:
        """Blocks of one file that are not what was written. `block` gives the contents by number; `ranges` are the bytes that its tensors fill;
        of several processes each takes its `share`, (rank, number of processes)."""
        entry = self.files[name]
        for number in range(share[0], len(entry.blocks), share[1]):
            if block_digest(block(number)) != entry.blocks[number]:
                begin = number * self.block_size
                end = min(begin + self.block_size, entry.size)
                inside = tuple(tensor for tensor, (first, last) in ranges.items() if first < end and begin < last)
                yield Damage(name, "is damaged", number, begin, end, inside)


def block_digest(data: bytes | memoryview) -> str:
    """Hexadecimal blake3 digest of one block."""
    return blake3(data).hexdigest()


def entry_of(data: bytes, block_size: int = BLOCK_BYTES) -> FileEntry:
    """The entry of a file with these contents."""
    return FileEntry(size=len(data), blocks=[block_digest(data[i : i + block_size]) for i in range(0, len(data), block_size)])


def model_digest(files: Mapping[str, FileEntry], uncut: Mapping[str, FileEntry] | None = None) -> str:
    """The digest of what defines a model's outputs, from the entries of its files; `uncut` stand for the numbered files of the same tensors."""
    kept = {name: entry for name, entry in files.items() if not any(is_part(name, whole) for whole in uncut or {})}
    entries = kept | dict(uncut or {})
    return _digest(entries, sorted(filter(is_model_file, entries)))


def is_part(name: str, whole: str) -> bool:
    """Whether a file is one of the numbered files of a file of tensors, or their index."""
    return name == f"{whole}.index.json" or (name.startswith(f"{whole.removesuffix('.safetensors')}-") and name.endswith(".safetensors"))


def is_model_file(name: str) -> bool:
    """Whether a file is part of what defines the model's outputs (weights, config, preprocessor; of an adapter also which base it belongs to)."""
    prefixes = ("model", "adapter_", "tokenizer", "special_tokens")
    named = ("config.json", "preprocessor_config.json", "generation_config.json", "vocab.json", "merges.txt")
    return name in named or name.startswith(prefixes)


def plain_name(name: str) -> bool:
    """Whether a name read from a document is a plain visible file name: no folder, no way out of the directory."""
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\\" not in name and "\0" not in name


def _digest(files: Mapping[str, FileEntry], names: Iterable[str]) -> str:
    return blake3(json.dumps([[name, files[name].digest] for name in names]).encode()).hexdigest()
