"""Reading: a checkpoint as an object whose tensors are read from disk only when, and only as far as, they are asked for.

Opening costs a few small files. Nothing that is read is ever executed.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn import catalog
from cairn.checkpoint.format import adapter, building, canonical, documents, fragments, kinds
from cairn.checkpoint.format.folder import TensorFolder
from cairn.checkpoint.format.hub import snapshot_in
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import BLOCK_BYTES, LINEAGE, MANIFEST, FileEntry, Manifest, block_digest, entry_of, is_model_file
from cairn.checkpoint.format.place import is_store, named_place, place, refusals, sizes
from cairn.checkpoint.format.redundant import redundant
from cairn.checkpoint.format.sound import newest_sound
from cairn.errors import DamagedError, InputError, NotFoundError, Notice
from cairn.options import UNITS

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINTS = "checkpoints"
ELSEWHERE = "checkpoints.url"
"""A run whose checkpoints lie in a store has this file instead of `checkpoints/`: the URL of the place that holds them."""

STAGES = "stages"
"""A run of several stages has them here as `1-web`, `2-anneal`, ...: runs of their own, and checkpoints that operations have made."""


_STEP = re.compile(r"step-([0-9]{1,18})")
_STAGE = re.compile(r"([0-9]{1,18})-.*", re.DOTALL)


def open(path: str | Path, *, base: str | Path | Checkpoint | None = None, follow: bool = False) -> Checkpoint:
    """Open a checkpoint directory, the newest complete checkpoint of a run, or a plain directory of transformers or PEFT.

    Parameters
    ----------
    path
        A path, a URL, or `hf:org/name@revision`, a checkpoint of a model hub.
        A run means its newest complete checkpoint, a run of several stages that of the last stage that has one.
    base
        Where the base of an adapter lies, where it is no longer found by itself; its digest decides.
    follow
        Whether a run may name a store where its checkpoints lie (`checkpoints.url`) and be followed there. Without it nothing
        connects to anything because a file says so.

    Raises
    ------
    NotFoundError
        If there is nothing of the kind.
    DamagedError
        If files are missing, of another size or not what they claim to be; of a run, the message names the newest sound checkpoint.
        What is read whole later is held against the manifest as it is read; `cairn verify` checks all of it.

    Examples
    --------
    >>> cairn.open("runs/demo").config["model_type"]  # doctest: +SKIP
    'llama'
    """
    path = place(path)
    try:
        opened = _open(path, follow)
        opened.named_base = base
        return opened
    except refusals() as error:
        raise InputError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error
    except ValueError as error:  # a zero byte in a path
        raise InputError(f"{str(path)!r} is not a path: {error}.") from None


def opened(source: str | Path | Checkpoint, *, base: str | Path | Checkpoint | None = None) -> Checkpoint:
    """A checkpoint, opened if it is not; with a `base` it is opened again, so that the one that others hold stays as it is."""
    return source if isinstance(source, Checkpoint) and base is None else open(source.path if isinstance(source, Checkpoint) else source, base=base)


def _open(path: Path, follow: bool) -> Checkpoint:
    if not path.exists():
        raise NotFoundError(f"There is no checkpoint or run at {path}.")
    if not path.is_dir():
        raise InputError(f"{path} is a file; a checkpoint is a directory.")
    if (path / MANIFEST).exists():
        return Checkpoint(path, Manifest.load(path))
    if not is_store(path) and (inside := snapshot_in(path)) is not None:
        return _open(inside, follow)
    if is_run(path):
        complete = list_checkpoints(path, follow=follow)
        if not complete:
            raise NotFoundError(f"The run {path} has no complete checkpoint yet.{_set_aside(path)}")
        try:
            return Checkpoint(complete[-1], Manifest.load(complete[-1]))
        except DamagedError as error:
            raise DamagedError(f"{error}{way_on(complete[:-1])}") from None
    if (path / "trainer.json").exists() or (path / LINEAGE).exists():
        raise DamagedError(f"{path} has no {MANIFEST}: it is not a complete checkpoint.{way_on(older_than(path))}")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
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
    found = [(match, path) for path in (place(run) / STAGES).iterdir() if (match := _STAGE.fullmatch(path.name))] if has_stages(run) else []
    return [path for _, path in sorted(found, key=lambda item: (int(item[0][1]), item[1].name))]


def home_of(run: Path, *, follow: bool = False) -> Path:
    """The place that holds the checkpoints of a run. Raises `InputError` for a store that a file names and nobody asked to follow."""
    if not (run / ELSEWHERE).is_file():
        return run / CHECKPOINTS
    return named_place(documents.read_text(run / ELSEWHERE, limit=2**16).strip(), run / ELSEWHERE, follow=follow)


def list_checkpoints(run: str | Path, *, follow: bool = False) -> list[Path]:
    """The complete checkpoints of a run directory, by step; of a run of several stages those of each stage in turn.

    What has another name than `step-` and a number is passed over, and said once. Raises `InputError` where `checkpoints/` is there and
    cannot be listed: not to see any is not to have none.
    """
    if has_stages(run):
        return [path for stage in list_stages(run) for path in ([stage] if (stage / MANIFEST).exists() else list_checkpoints(stage, follow=follow))]
    home = home_of(place(run), follow=follow)
    try:
        inside = list(home.iterdir()) if is_store(home) else [home / name for name in os.listdir(home)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except refusals() as error:
        raise InputError(f"{home} cannot be listed: {str(error).rstrip('.')}.") from error
    found = {path: match for path in inside if (match := _STEP.fullmatch(path.name))}
    strange = sorted(path.name for path in inside if path.name.startswith("step-") and path not in found)
    if strange:
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        warnings.warn(f"{home}: '{strange[0][:80]}'{more} passed over: the name is not step-NUMBER.", Notice, stacklevel=2)
    return [path for path in sorted(found, key=lambda path: (int(found[path][1]), path.name)) if (path / MANIFEST).exists()]


def way_on(older: list[Path]) -> str:
    """Which of the older checkpoints is sound, and the command that goes on from it."""
    sound = newest_sound(older)
    if sound is None:
        return ""
    return f" {sound} is sound: `cairn resume {sound}` goes on from it and sets what is newer aside."


def older_than(path: Path) -> list[Path]:
    """The complete checkpoints of a run before this one."""
    match = _STEP.fullmatch(path.name)
    if match is None or path.parent.name != CHECKPOINTS:
        return []
    return [other for other in list_checkpoints(path.parent.parent) if int(other.name.removeprefix("step-")) < int(match[1])]


def _set_aside(run: Path) -> str:
    inside = sorted(path.name for path in (run / CHECKPOINTS).glob("step-*")) if (run / CHECKPOINTS).is_dir() else []
    return f" {inside[-1]} is there without a {MANIFEST}, so it was never completed or has lost it." if inside else ""


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
            raise DamagedError(f"{path} is damaged: {damage[0]}.")

    @property
    def is_ours(self) -> bool:
        """Whether it has a manifest, and so is complete, digested and has a lineage."""
        return self._manifest is not None

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest; computed from the files for a plain transformers directory (reads everything once)."""
        if self._manifest is not None:
            return self._manifest
        _ = self.folder(adapter.STEM) if self.is_adapter else self.tensors  # headers that are sound say how much there is to read
        return Manifest.of({path.name: _entry(path) for path in self.files() if path.suffix == ".safetensors" or path.stat().st_size <= documents.LARGEST})

    @property
    def digest(self) -> str:
        """What this state is: equal for equal states, whichever program or number of processes wrote them."""
        return self.manifest.digest

    @functools.cached_property
    def model_digest(self) -> str:
        """Digest of what defines the model's outputs alone: weights, config, tokenizer. A plain directory has that of an import of it."""
        if self._manifest is not None or self.is_adapter:
            return self.manifest.model_digest
        names = [path.name for path in self.files() if is_model_file(path.name) and not path.name.startswith("model")]
        small = {name: data for name in names if (data := self.read_file(name)) is not None}
        return canonical.digest_of(self.without(redundant(self)).tensors, self.config, small)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json; of an adapter without one that of its base."""
        config = self._json("config.json", kinds.Config)
        if config is None and self.is_adapter:
            return self.base.config
        if config is None:
            raise DamagedError(f"{self.path} has no config.json.")
        return config

    @functools.cached_property
    def generation(self) -> dict[str, Any] | None:
        """generation_config.json, if there is one."""
        return self._json("generation_config.json", kinds.Generation)

    @functools.cached_property
    def trainer(self) -> dict[str, Any] | None:
        """trainer.json, if this checkpoint can be resumed."""
        return self._json("trainer.json", kinds.Trainer)

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
        data = self.read_file(LINEAGE)
        return documents.validated(Lineage, documents.parse(data, self.path / LINEAGE), self.path / LINEAGE) if data is not None else None

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
        """The checkpoint that an adapter was trained on: where its lineage says, beside it, or as it was named when opened."""
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
        definition = self.read_file("tokenizer.json")
        if definition is None:
            return self.base.tokenizer if self.is_adapter else None
        # By name: the room of data stands a floor above this one.
        tokenizer = importlib.import_module("cairn.data.text.tokenizer").Tokenizer
        ends = kinds.ids(self.config.get("eos_token_id")) + kinds.ids((self.generation or {}).get("eos_token_id"))
        return tokenizer(definition, self._json("tokenizer_config.json", kinds.TokenizerConfig), ends, where=self.path / "tokenizer.json")

    def model(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
        """The model with these weights, in evaluation mode: ours where the family is known, else transformers' own.

        `dtype` defaults to that of the stored weights. Raises `MismatchError` where config.json and the tensors do not describe the same
        network: a weight that is missing is never made up. No code that lies in the directory runs.
        """
        if self.is_adapter:
            return adapter.adapted_model(self, dtype, device)
        if not self.tensors:
            raise DamagedError(f"{self.path} holds no weights.")
        repeated = redundant(self)
        for head, embedding in ((name, of) for name, of in repeated.items() if of is not None):
            building.refuse_untied(self.path, self.tensors, (head, embedding))
        tensors = self.without(repeated).tensors
        ours = catalog.has("architecture", str(self.config.get("model_type")))
        return (building.ours if ours else building.by_transformers)(self.path, self.config, tensors, dtype, device)

    def files(self) -> Iterator[Path]:
        """The visible files of the directory."""
        yield from (path for path in sorted(self.path.iterdir()) if path.is_file() and not path.name.startswith("."))

    def folder(self, stem: str) -> TensorFolder:
        """The tensors of `stem`.safetensors, or of its numbered files. Raises `DamagedError` if there are none."""
        if stem not in self._folders:
            self._folders[stem] = TensorFolder(self.path, stem, self._stored, self._manifest)
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
        return self._json(name, kinds.File)

    def read_file(self, name: str) -> bytes | None:
        """The contents of a small file, or None where the checkpoint has none of this name.

        Raises `DamagedError` for bytes that are not what was written, and for what is no regular file. What lies in the directory and is not in
        the manifest is no part of the checkpoint.
        """
        entry = self._manifest.files.get(name) if self._manifest is not None else None
        if self._manifest is not None and entry is None:
            return None
        try:
            data = documents.read_bytes(self.path / name)
        except FileNotFoundError:
            return None
        if entry is not None and self._manifest is not None and entry_of(data, self._manifest.block_size) != entry:
            raise DamagedError(f"{self.path / name} is damaged: it is not what was written. `cairn verify {self.path}` checks everything.")
        return data

    def _json(self, name: str, kind: type[kinds.File]) -> dict[str, Any] | None:
        data = self.read_file(name)
        if data is None:
            return None
        document = documents.as_object(documents.parse(data, self.path / name), self.path / name)
        documents.validated(kind, document, self.path / name)
        return document

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"


def _holds(names: Iterable[str], stem: str) -> bool:
    """Whether files of tensors of this stem are among the names."""
    return any(name.startswith(stem) and name.endswith(".safetensors") for name in names)


def _entry(path: Path) -> FileEntry:
    with os.fdopen(documents.open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        blocks = [block_digest(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
    return FileEntry(size=size, blocks=blocks)
