"""Reading: a checkpoint as an object whose tensors are read from disk only when, and only as far as, they are asked for.

Opening costs a few small files. Nothing that is read is ever executed.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cairn import catalog
from cairn.checkpoint.format import adapter, fragments
from cairn.checkpoint.format.layout import FileLayout, read_layout
from cairn.checkpoint.format.lazy import CHUNK, LazyTensor, MappedFile, StoredTensor, StoreObject
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import BLOCK_BYTES, LINEAGE, MANIFEST, FileEntry, Manifest, block_digest, plain_name
from cairn.checkpoint.format.place import is_store, place, refusals, sizes
from cairn.errors import DamagedError, InputError, NotFoundError
from cairn.options import UNITS

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINTS = "checkpoints"
ELSEWHERE = "checkpoints.url"
"""A run whose checkpoints lie in a store has this file instead of `checkpoints/`: the URL of the place that holds them."""

STAGES = "stages"
"""A run of several stages has them here as `1-web`, `2-anneal`, ...: runs of their own, and checkpoints that operations have made."""


def open(path: str | Path, *, base: str | Path | Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint directory, the newest complete checkpoint of a run, or a plain directory of transformers or PEFT.

    Of a run of several stages it is that of the last stage that has one. `base` says where the base of an adapter lies, where it is no
    longer found by itself; its digest decides.

    Raises `NotFoundError` if there is nothing of the kind, `DamagedError` if files are missing or of another size;
    contents are checked by `cairn verify`.
    """
    path = place(path)
    try:
        opened = _open(path)
        opened.named_base = base
        return opened
    except refusals() as error:
        raise InputError(f"{path} can not be read: {str(error).rstrip('.')}.") from error


def opened(source: str | Path | Checkpoint, *, base: str | Path | Checkpoint | None = None) -> Checkpoint:
    """A checkpoint, opened if it is not; with a `base` it is opened again, so that the one that others hold stays as it is."""
    return source if isinstance(source, Checkpoint) and base is None else open(source.path if isinstance(source, Checkpoint) else source, base=base)


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise NotFoundError(f"There is no checkpoint or run at {path}.")
    if not path.is_dir():
        raise InputError(f"{path} is a file; a checkpoint is a directory.")
    if (path / MANIFEST).exists():
        return Checkpoint(path, Manifest.load(path))
    if is_run(path):
        complete = list_checkpoints(path)
        if not complete:
            raise NotFoundError(f"The run {path} has no complete checkpoint yet.")
        return open(complete[-1])
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        if (path / "trainer.json").exists() or (path / LINEAGE).exists():
            raise DamagedError(f"{path} has no {MANIFEST}: it is not a complete checkpoint.")
        return Checkpoint(path, None)
    if (path / adapter.CONFIG).is_file() and any(path.glob(f"{adapter.STEM}*.safetensors")):
        return Checkpoint(path, None)
    raise NotFoundError(f"{path} is neither a checkpoint, nor a run, nor a transformers directory with safetensors files.")


def is_run(path: Path) -> bool:
    """Whether a place is a run: a directory with `checkpoints/`, or with the URL of the store where they lie."""
    return (path / CHECKPOINTS).is_dir() or (path / ELSEWHERE).is_file() or has_stages(path)


def has_stages(path: str | Path) -> bool:
    """Whether a place is a run of several stages."""
    path = place(path)
    return not is_store(path) and (path / STAGES).is_dir()


def list_stages(run: str | Path) -> list[Path]:
    """The stages of a run of several that have begun, in their order: runs, and checkpoints that an operation has made."""
    found = [path for path in (place(run) / STAGES).iterdir() if path.name.partition("-")[0].isdigit()] if has_stages(run) else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[0]))


def home_of(run: Path) -> Path:
    """The place that holds the checkpoints of a run."""
    return place((run / ELSEWHERE).read_text().strip()) if (run / ELSEWHERE).is_file() else run / CHECKPOINTS


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run directory, by step; of a run of several stages those of each stage in turn."""
    if has_stages(run):
        return [path for stage in list_stages(run) for path in ([stage] if (stage / MANIFEST).exists() else list_checkpoints(stage))]
    found = [path.parent for path in home_of(place(run)).glob(f"step-*/{MANIFEST}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


class Checkpoint:
    """An immutable directory of state: `config`, `tensors` (lazily), `tokenizer`, `model()`, `lineage`, `digest`.

    `manifest` is None for a plain transformers directory, whose digests are computed when first asked for.
    """

    def __init__(self, path: Path, manifest: Manifest | None) -> None:
        self.path = path
        self.named_base: str | Path | Checkpoint | None = None
        self._manifest = manifest
        self._folders: dict[str, TensorFolder] = {}
        if manifest is not None and (damage := manifest.check_sizes(path)):
            raise DamagedError(f"{path}: {damage[0]}.")

    @property
    def is_ours(self) -> bool:
        """Whether it has a manifest, and so is complete, digested and has a lineage."""
        return self._manifest is not None

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest; computed from the files for a plain transformers directory (reads everything once)."""
        return self._manifest or Manifest.of({path.name: _entry(path) for path in self.files()})

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
        """config.json; of an adapter without one that of its base."""
        config = self._json("config.json")
        if config is None and self.is_adapter:
            return self.base.config
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
        """Tokens trained on so far; None where its field does not count tokens."""
        return self.trainer.get("tokens") if self.trainer else None

    @property
    def units(self) -> int | None:
        """How far it was trained, in what its field counts: tokens of text, samples of anything else."""
        return self.trainer.get(self.unit) if self.trainer else None

    @property
    def unit(self) -> str:
        """What its field counts: tokens or samples."""
        return next((unit for unit in UNITS if self.trainer and self.trainer.get(unit) is not None), UNITS[0])

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
        """The weights, by their Hugging Face names. Raises `InputError` for an adapter, which holds none of a model's."""
        if self.is_adapter:
            raise InputError(f"{self.path} is an adapter, not a whole model; fold it into its base first: cairn adapt fold {self.path} -o OUT.")
        return self.folder("model")

    @functools.cached_property
    def stored(self) -> TensorFolder:
        """The tensors that it holds as its result: the weights, or those of an adapter."""
        return self.folder(adapter.STEM if self.is_adapter else "model")

    @functools.cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter instead of a model's weights."""
        names = self._manifest.files if self._manifest is not None else sizes(self.path)
        return not _holds(names, "model") and _holds(names, adapter.STEM)

    @functools.cached_property
    def base(self) -> Checkpoint:
        """Of an adapter, the checkpoint that it was trained on: found where its lineage says, beside it, or as it was named when opened."""
        return adapter.find_base(self, self.named_base, open)

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
        """The tokenizer (`cairn.data.text.tokenizer.Tokenizer`), or None if the checkpoint carries none."""
        if not (self.path / "tokenizer.json").exists():
            return self.base.tokenizer if self.is_adapter else None
        # By name: the room of data stands a floor above this one.
        return importlib.import_module("cairn.data.text.tokenizer").Tokenizer.load(self.path)

    def model(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
        """The model with these weights, in evaluation mode: ours where the family is known, else transformers' own.

        `dtype` defaults to that of the stored weights.
        """
        import torch

        if self.is_adapter:
            return adapter.adapted_model(self, dtype, device)
        family = self.config.get("model_type")
        if family not in catalog.names("architecture"):
            if is_store(self.path):
                raise InputError(f"{self.path} is of a family that only transformers builds, which reads plain directories: cairn export {self.path} -o DIR.")
            return _transformers_model(self.path, dtype, device)
        architecture = catalog.get("architecture", str(family)).implementation.from_hf(self.config)
        model = architecture.meta_model()
        stored = next(iter(self.tensors.values())).dtype
        model = model.to(dtype or stored).to_empty(device=device)
        parameters = dict(model.named_parameters())
        strange = sorted(set(parameters) ^ (set(self.tensors) - architecture.restated))
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

    def folder(self, stem: str) -> TensorFolder:
        """The tensors of `stem`.safetensors, or of its numbered files. Raises `DamagedError` if there are none."""
        if stem not in self._folders:
            self._folders[stem] = TensorFolder(self.path, stem, self._stored)
        return self._folders[stem]

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same checkpoint, seen without some of its weights."""
        if not names:
            return self
        seen = copy.copy(self)
        for known in ("tensors", "stored"):
            seen.__dict__.pop(known, None)
        seen._folders = {**self._folders, "model": self.tensors.without(names)}
        return seen

    def _folder(self, stem: str) -> TensorFolder | None:
        names = self._manifest.files if self._manifest is not None else sizes(self.path)
        return self.folder(stem) if _holds(names, stem) else None

    @functools.cached_property
    def _stored(self) -> Mapping[str, fragments.StoredFile]:
        """The files that lie in fragments."""
        return fragments.load_index(self.path, self._manifest) if self._manifest is not None and self._manifest.fragments else {}

    def document(self, name: str) -> dict[str, Any] | None:
        """A small JSON file of the checkpoint by its name, if there is one."""
        return self._json(name)

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

    def __init__(self, directory: Path, stem: str, stored: Mapping[str, fragments.StoredFile] | None = None) -> None:
        self.directory, self.stem, self._stored = directory, stem, stored or {}
        self.layouts: list[FileLayout] = []
        self._tensors: dict[str, LazyTensor] = {}
        for filename in self._filenames():
            layout = self._stored[filename].layout if filename in self._stored else read_layout(directory / filename)
            self.layouts.append(layout)
            file = StoreObject(directory / filename) if is_store(directory) else MappedFile(directory / filename)
            for spec in layout.specs:
                begin, _ = layout.ranges[spec.name]
                self._tensors[spec.name] = StoredTensor(spec, self._stored[filename]) if filename in self._stored else LazyTensor(spec, file, begin)

    def _filenames(self) -> list[str]:
        single, indexed = f"{self.stem}.safetensors", self.directory / f"{self.stem}.safetensors.index.json"
        if self._there(single):
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
            if not self._there(name):
                raise DamagedError(f"{self.directory}: {name} is missing.")
        return names

    def _there(self, name: str) -> bool:
        return name in self._stored or (self.directory / name).is_file()

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def without(self, names: Collection[str]) -> TensorFolder:
        """The same folder, seen without some of its tensors."""
        seen = copy.copy(self)
        seen._tensors = {name: tensor for name, tensor in self._tensors.items() if name not in names}
        return seen

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self._tensors.values())

    def load(self, threads: int | None = None) -> dict[str, torch.Tensor]:
        """All tensors in memory, read by several threads."""
        loaded = {name: tensor.empty() for name, tensor in self._tensors.items()}
        pieces = [(tensor, loaded[name], begin) for name, tensor in self._tensors.items() for begin in range(0, tensor.nbytes, CHUNK)]
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda piece: piece[0].read_piece(piece[1], piece[2]), pieces):
                pass
        return loaded


def _holds(names: Iterable[str], stem: str) -> bool:
    """Whether files of tensors of this stem are among the names."""
    return any(name.startswith(stem) and name.endswith(".safetensors") for name in names)


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
