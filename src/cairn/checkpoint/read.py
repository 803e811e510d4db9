"""Reading: a checkpoint as an object whose tensors are read from disk only when, and only as far as, they are asked for.

Opening costs a few small files. Nothing that is read is ever executed.
"""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cairn import catalog
from cairn.checkpoint.layout import TensorSpec, read_layout
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.manifest import BLOCK_BYTES, LINEAGE, MANIFEST, FileEntry, Manifest, block_digest, plain_name
from cairn.checkpoint.parts import Part, in_short_rows, spans
from cairn.errors import DamagedError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch
    from torch import nn

_CHUNK = 8 * 2**20


def open(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory, the newest complete checkpoint of a run, or a plain transformers directory.

    Raises `NotFoundError` if there is nothing of the kind, `DamagedError` if files are missing or of another size;
    contents are checked by `cairn verify`.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"There is no checkpoint or run at {path}.")
    if not path.is_dir():
        raise InputError(f"{path} is a file; a checkpoint is a directory.")
    if (path / MANIFEST).exists():
        return Checkpoint(path, Manifest.load(path))
    if (path / "checkpoints").is_dir():
        complete = list_checkpoints(path)
        if not complete:
            raise NotFoundError(f"The run {path} has no complete checkpoint yet.")
        return open(complete[-1])
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        if (path / "trainer.json").exists() or (path / LINEAGE).exists():
            raise DamagedError(f"{path} has no {MANIFEST}: it is not a complete checkpoint.")
        return Checkpoint(path, None)
    raise NotFoundError(f"{path} is neither a checkpoint, nor a run, nor a transformers directory with safetensors files.")


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run directory, by step."""
    found = [path.parent for path in Path(run).glob(f"checkpoints/step-*/{MANIFEST}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


class Checkpoint:
    """An immutable directory of state: `config`, `tensors` (lazily), `tokenizer`, `model()`, `lineage`, `digest`.

    `manifest` is None for a plain transformers directory, whose digests are computed when first asked for.
    """

    def __init__(self, path: Path, manifest: Manifest | None) -> None:
        self.path = path
        self._manifest = manifest
        if manifest is not None and (damage := manifest.check_sizes(path)):
            raise DamagedError(f"{path}: {damage[0]}.")

    @property
    def is_ours(self) -> bool:
        """Whether it has a manifest, and so is complete, digested and has a lineage."""
        return self._manifest is not None

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest; computed from the files for a plain transformers directory (reads everything once)."""
        return self._manifest or Manifest.of({p.name: _entry(p) for p in sorted(self.path.iterdir()) if p.is_file() and not p.name.startswith(".")})

    @property
    def digest(self) -> str:
        """What this state is: equal for equal states, whoever wrote them."""
        return self.manifest.digest

    @property
    def model_digest(self) -> str:
        """Digest of what defines the model's outputs alone: weights, config, tokenizer."""
        return self.manifest.model_digest

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        config = self._json("config.json")
        if config is None:
            raise DamagedError(f"{self.path} has no config.json.")
        return config

    @functools.cached_property
    def generation(self) -> dict[str, Any] | None:
        """generation_config.json, if there is one."""
        return self._json("generation_config.json")

    @functools.cached_property
    def trainer(self) -> dict[str, Any] | None:
        """trainer.json, if this checkpoint can be resumed."""
        return self._json("trainer.json")

    @property
    def step(self) -> int | None:
        return self.trainer["step"] if self.trainer else None

    @property
    def tokens(self) -> int | None:
        """Tokens trained on so far."""
        return self.trainer["tokens"] if self.trainer else None

    @functools.cached_property
    def lineage(self) -> Lineage | None:
        """Where it comes from; None for a plain transformers directory."""
        document = self._json(LINEAGE)
        try:
            return Lineage.model_validate(document) if document is not None else None
        except ValidationError:
            raise DamagedError(f"{self.path / LINEAGE} is not a valid lineage.") from None

    @functools.cached_property
    def tensors(self) -> TensorFolder:
        """The weights, by their Hugging Face names."""
        return TensorFolder(self.path, "model")

    @functools.cached_property
    def optimizer(self) -> TensorFolder | None:
        """The optimizer's state as `<parameter>/<key>`, if it was saved."""
        return self._folder("optimizer")

    @functools.cached_property
    def ingredients(self) -> TensorFolder | None:
        """Tensors that ingredients of training keep, as `<ingredient>/<name>`."""
        return self._folder("ingredients")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer (`cairn.data.tokenizer.Tokenizer`), or None if the checkpoint carries none."""
        if not (self.path / "tokenizer.json").exists():
            return None
        # By name: the room of data stands a floor above this one.
        return importlib.import_module("cairn.data.tokenizer").Tokenizer.load(self.path)

    def model(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
        """The model with these weights, in evaluation mode: ours where the family is known, else transformers' own.

        `dtype` defaults to that of the stored weights.
        """
        import torch

        family = self.config.get("model_type")
        if family not in catalog.names("architecture"):
            return _transformers_model(self.path, dtype, device)
        model = catalog.get("architecture", str(family)).implementation.from_hf(self.config).skeleton()
        stored = next(iter(self.tensors.values())).dtype
        model = model.to(dtype or stored).to_empty(device=device)
        parameters = dict(model.named_parameters())
        strange = sorted(set(parameters) ^ set(self.tensors))
        if strange:
            raise DamagedError(f"{self.path}: the weights do not fit config.json: '{strange[0]}' is only in one of them.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if tuple(parameter.shape) != self.tensors[name].shape:
                    raise DamagedError(f"{self.path}: '{name}' is {self.tensors[name].shape}, config.json asks for {tuple(parameter.shape)}.")
                parameter.copy_(self.tensors[name].load())
        return model.eval()

    def files(self) -> Iterator[Path]:
        """The visible files of the directory."""
        yield from (path for path in sorted(self.path.iterdir()) if path.is_file() and not path.name.startswith("."))

    def _folder(self, stem: str) -> TensorFolder | None:
        return TensorFolder(self.path, stem) if any(self.path.glob(f"{stem}*.safetensors")) else None

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            document = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise DamagedError(f"{self.path / name} is not valid JSON.") from None
        if not isinstance(document, dict):
            raise DamagedError(f"{self.path / name} is not a JSON object.")
        return document

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"


class TensorFolder(Mapping[str, "LazyTensor"]):
    """All tensors of one stem, in one file or in several with an index: name -> LazyTensor."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory, self.stem = directory, stem
        self._tensors: dict[str, LazyTensor] = {}
        for filename in self._filenames():
            file = _MappedFile(directory / filename)
            layout = read_layout(file.path)
            for spec in layout.specs:
                self._tensors[spec.name] = LazyTensor(spec, file, *layout.ranges[spec.name])

    def _filenames(self) -> list[str]:
        single, indexed = f"{self.stem}.safetensors", self.directory / f"{self.stem}.safetensors.index.json"
        if (self.directory / single).exists():
            return [single]
        try:
            names = sorted(set(json.loads(indexed.read_bytes())["weight_map"].values()))
        except FileNotFoundError:
            raise DamagedError(f"{self.directory} has no {single} and no index of numbered files.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"{indexed} is not a valid index.") from None
        for name in names:
            if not isinstance(name, str) or not plain_name(name):
                raise DamagedError(f"{indexed} names a file outside its own directory.")
            if not (self.directory / name).is_file():
                raise DamagedError(f"{self.directory}: {name} is missing.")
        return names

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
        pieces = [(tensor, loaded[name], begin) for name, tensor in self._tensors.items() for begin in range(0, tensor.nbytes, _CHUNK)]
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda piece: piece[0].read_piece(piece[1], piece[2]), pieces):
                pass
        return loaded


class LazyTensor:
    """A tensor on disk: `shape`, `dtype`, `load()` for all of it, `lazy[rows, columns]` for a part."""

    def __init__(self, spec: TensorSpec, file: _MappedFile, begin: int, end: int) -> None:
        self.spec, self._file, self._begin, self._end = spec, file, begin, end

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def dtype(self) -> torch.dtype:
        from cairn.checkpoint.dtypes import DTYPES

        return DTYPES[self.spec.dtype]

    def view(self) -> torch.Tensor:
        """The tensor as a private mapping of the file: pages are read when touched. It must not be changed in place."""
        import torch

        if not self.nbytes:
            return self.empty()
        raw = torch.frombuffer(self._file.map(), dtype=torch.uint8, count=self.nbytes, offset=self._begin)
        return raw.view(self.dtype).view(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A copy of a part; only the pages of that part are read."""
        return self.view()[index].clone()

    def flat(self, begin: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Items `begin` to `end` of the tensor in C order; the end may lie beyond the tensor's.

        They are read into the first items of `out`, a flat tensor of this dtype, or into new memory.
        """
        import torch

        size = self.dtype.itemsize
        begin, end = min(begin * size, self.nbytes), min(end * size, self.nbytes)
        count = (end - begin) // size
        out = torch.empty(count, dtype=self.dtype) if out is None else out[:count]
        self._file.read_into(memoryview(out.view(torch.uint8).numpy().data), self._begin + begin)
        return out

    def empty(self) -> torch.Tensor:
        import torch

        return torch.empty(self.shape, dtype=self.dtype)

    def load(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor in memory; `out`, if given, is a contiguous host tensor of this dtype and shape that takes it."""
        out = self.empty() if out is None else out
        for begin in range(0, self.nbytes, _CHUNK):
            self.read_piece(out, begin)
        return out

    def read_part(self, part: Part, out: torch.Tensor | None = None) -> torch.Tensor:
        """A part of the tensor, reading no other bytes; `out`, if given, is a contiguous host tensor of its shape and this dtype."""
        import torch

        out = torch.empty(part.shape, dtype=self.dtype) if out is None else out
        size, target = self.dtype.itemsize, memoryview(out.reshape(-1).view(torch.uint8).numpy().data)
        if in_short_rows(self.shape, part, size):
            out.copy_(self.view()[part.slices])
            return out
        for span in spans(self.shape, part):
            for begin in range(0, span.items * size, _CHUNK):
                end = min(begin + _CHUNK, span.items * size)
                self._file.read_into(target[span.inner * size + begin : span.inner * size + end], self._begin + span.outer * size + begin)
        return out

    def read_piece(self, out: torch.Tensor, begin: int) -> None:
        """Read up to 8 MiB from `begin` bytes into the tensor to the same place of `out`."""
        import torch

        end = min(begin + _CHUNK, self.nbytes)
        target = memoryview(out.reshape(-1).view(torch.uint8).numpy().data)[begin:end]
        self._file.read_into(target, self._begin + begin)


class _MappedFile:
    """One file, opened and mapped when first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def _fd(self) -> _Descriptor:
        return _Descriptor(self.path)

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        # A private mapping is writable in memory only: torch gets a buffer without a warning, the file can not change.
        return mmap.mmap(self._fd.number, 0, access=mmap.ACCESS_COPY)

    def map(self) -> mmap.mmap:
        return self._map

    def read_into(self, target: memoryview, position: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._fd.number, [target[done:]], position + done)
            if count == 0:
                raise DamagedError(f"{self.path} ends before byte {position + len(target)}.")
            done += count


class _Descriptor:
    """A file descriptor that is closed with its last user."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        blocks = [block_digest(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
    return FileEntry(size=path.stat().st_size, blocks=blocks)


def _transformers_model(path: Path, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise InputError(f"{path} is of a family that cairn does not build itself; pip install 'cairn-lm[hf]' opens it with transformers.") from None
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
    return model.to(device).eval()
