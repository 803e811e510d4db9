"""One file of llama.cpp: weights, plain or quantized, with config and tokenizer as metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from cairn.catalog import register
from cairn.checkpoint.foreign.gguf.config import OF_ROPE, config_of, family_of
from cairn.checkpoint.foreign.gguf.families import Family, heads_of, undone
from cairn.checkpoint.foreign.gguf.file import PLAIN, GGUFFile, StoredTensor
from cairn.checkpoint.foreign.gguf.vocabulary import files_of
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Opening, Slice, TensorSource, Translate
from cairn.errors import InputError, NotFoundError

ENDING = ".gguf"


@register("layout", "gguf")
class GGUFLayout(Layout):
    """A GGUF file of llama.cpp, or a folder that holds one: any quantization that the gguf package reads."""

    pickled: ClassVar[bool] = False
    single_file: ClassVar[bool] = True

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return folder.suffix == ENDING if folder.is_file() else bool(_inside(folder)) and not (folder / "model.safetensors").exists()

    def open(self, opening: Opening) -> TensorSource:
        path = opening.folder if opening.folder.is_file() else _only(opening.folder)
        file = GGUFFile.open(path)
        family = family_of(file)
        config = opening.config or config_of(file, family)
        documents, ids = ({}, {}) if opening.own_tokenizer else files_of(file)
        dtype = _dtype(file)
        slices = [_slice(tensor, dtype) for name, tensor in file.tensors.items() if name not in OF_ROPE]
        kinds = sorted({tensor.kind for tensor in file.tensors.values()})
        written = {} if opening.config else {**ids, "dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
        plain = {"architecture": family.architecture, "types": kinds, "name": file.text("general.name"), "license": file.text("general.license")}
        return TensorSource(
            {"files": 1}, slices, translate=_translation(family, config), config={**config, **written}, plain=plain, documents=documents, file=path
        )


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ENDING)


def _only(folder: Path) -> Path:
    found = _inside(folder)
    if not found:
        raise NotFoundError(f"{folder} holds no {ENDING} file.")
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} {ENDING} files, {found[0].name} and {found[1].name} among them; name one of them.")
    return found[0]


def _dtype(file: GGUFFile) -> torch.dtype:
    """The dtype in which no value of the file loses anything: that of the matrices where vectors, which are float32 in most files, fit into it."""
    matrices = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    dtype = PLAIN.get(next(iter(matrices)), torch.float32) if len(matrices) == 1 else torch.float32
    vectors = [tensor for name, tensor in file.tensors.items() if len(tensor.shape) == 1 and name not in OF_ROPE and tensor.dtype != dtype]
    if dtype.itemsize < 4 and not all(torch.equal(values, values.to(dtype).to(values.dtype)) for values in (tensor.read() for tensor in vectors)):
        return torch.float32
    return dtype


def _slice(tensor: StoredTensor, dtype: torch.dtype) -> Slice:
    return Slice(tensor.name, WEIGHT, tensor.shape, dtype, lambda: tensor.read().to(dtype))


def _translation(family: Family, config: Mapping[str, Any]) -> Translate:
    def translate(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if (experts := family.all_here(name, tensor.shape[0])) is not None:
            yield from zip(experts, tensor, strict=True)
            return
        here = family.here(name)
        if here is None:
            yield name, tensor  # the plan refuses it by name
            return
        yield here, undone(family.change(name), tensor, heads_of(config, name))

    return translate
