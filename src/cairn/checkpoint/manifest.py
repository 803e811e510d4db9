"""The manifest: size and block digests of every file, written last. A directory without a valid one is no checkpoint.

Three digests come from the block digests. A file's is over its blocks; `digest` is over every file that is state, so
equal states have equal digests whoever wrote them, when and with how many processes (lineage.json, which records
exactly that, is checked but not part of the identity); `model_digest` is over what defines the model's outputs, and
is what measurements are stored under.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from pydantic import ValidationError

from cairn.checkpoint import layout
from cairn.errors import DamagedError
from cairn.options import Options

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
FORMAT = 1
BLOCK_BYTES = 4 * 2**20


class FileEntry(Options):
    """Size in bytes and hexadecimal blake3 digests of the fixed-size blocks of one file."""

    size: int
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

    format: int = FORMAT
    block_size: int = BLOCK_BYTES
    files: dict[str, FileEntry]
    digest: str
    model_digest: str

    @classmethod
    def of(cls, files: dict[str, FileEntry], block_size: int = BLOCK_BYTES) -> Manifest:
        """The manifest of these files."""
        files = dict(sorted(files.items()))
        return cls(
            block_size=block_size,
            files=files,
            digest=_digest(files, (name for name in files if name != LINEAGE)),
            model_digest=_digest(files, filter(is_model_file, files)),
        )

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check `directory/manifest.json`. Raises `DamagedError` if it is absent, unsound or of a later format."""
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            later = isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > FORMAT
            manifest = None if later else cls.model_validate(values)
        except FileNotFoundError:
            raise DamagedError(f"{directory} has no {MANIFEST}: it is not a complete checkpoint.") from None
        except (ValueError, ValidationError):
            raise DamagedError(f"{path} is not a valid manifest.") from None
        if manifest is None:
            raise DamagedError(f"{path} has format {values['format']}; this version of cairn reads formats up to {FORMAT}. Upgrade cairn-lm.")
        if any(not plain_name(name) for name in manifest.files):
            raise DamagedError(f"{path} names a file outside its own directory.")
        if manifest != cls.of(manifest.files, manifest.block_size):
            raise DamagedError(f"{path}: the digests in it do not agree with each other.")
        return manifest

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()

    def check_sizes(self, directory: Path) -> list[Damage]:
        """Files that are absent or of another size: quick, reads no contents."""
        found = []
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                found.append(Damage(name, "is missing"))
            elif path.stat().st_size != entry.size:
                found.append(Damage(name, f"has {path.stat().st_size} bytes, {entry.size} were written"))
        return found

    def check_file(self, directory: Path, name: str) -> Iterator[Damage]:
        """Blocks of one file whose contents are not what was written."""
        entry, path = self.files[name], directory / name
        with path.open("rb") as file:
            for number, expected in enumerate(entry.blocks):
                if block_digest(file.read(self.block_size)) != expected:
                    begin = number * self.block_size
                    end = min(begin + self.block_size, entry.size)
                    yield Damage(name, "is damaged", number, begin, end, _tensors_in(path, begin, end))


def block_digest(data: bytes | memoryview) -> str:
    """Hexadecimal blake3 digest of one block."""
    return blake3(data).hexdigest()


def entry_of(data: bytes, block_size: int = BLOCK_BYTES) -> FileEntry:
    """The entry of a file with these contents."""
    return FileEntry(size=len(data), blocks=[block_digest(data[i : i + block_size]) for i in range(0, len(data), block_size)])


def is_model_file(name: str) -> bool:
    """Whether a file is part of what defines the model's outputs (weights, config, tokenizer)."""
    return name in ("config.json", "generation_config.json", "vocab.json", "merges.txt") or name.startswith(("model", "tokenizer", "special_tokens"))


def plain_name(name: str) -> bool:
    """Whether a name read from a document is a plain visible file name: no folder, no way out of the directory."""
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\\" not in name and "\0" not in name


def _digest(files: dict[str, FileEntry], names: Iterable[str]) -> str:
    return blake3(json.dumps([[name, files[name].digest] for name in names]).encode()).hexdigest()


def _tensors_in(path: Path, begin: int, end: int) -> tuple[str, ...]:
    if path.suffix != ".safetensors":
        return ()
    try:
        ranges = layout.read_layout(path).ranges
    except DamagedError:
        return ()  # the damage is in the header itself
    return tuple(name for name, (first, last) in ranges.items() if first < end and begin < last)
