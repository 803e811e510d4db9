"""Files of FullyShardedDataParallel's local state dicts, one for each rank: flattened units, or flat stretches by name.

The names and shapes inside a flattened unit are not in the files: they follow from the model's config.json, and the count of
items must come out exactly. (Sharded state dicts of FSDP are folders of torch.distributed.checkpoint, and full ones plain files.)
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cairn.catalog import register
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Opening, Slice, TensorSource, agreed, by_rank, complete, read_json
from cairn.checkpoint.foreign.patterns import join_flat
from cairn.checkpoint.foreign.pickles import Inert, InertTensor, Stored, structure
from cairn.errors import InputError, MismatchError

FILE = re.compile(r".*rank[_-]?(\d+)(?:[_-]of[_-]?(\d+))?\.(?:pt|pth|bin)")
FLAT = "_flat_param"
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.")


def _nested(owner: Any, name: str) -> type[Inert]:
    """Stands for `getattr`, by which pickles name nested classes and members of enumerations."""
    return Inert


STAND_INS = (
    (_nested, "builtins.getattr"),
    (InertTensor, "torch.distributed._shard.sharded_tensor.api.ShardedTensor"),
    *(
        (Inert, f"torch.distributed.{name}")
        for name in (
            "_shard.sharded_tensor.shard.Shard",
            "_shard.sharded_tensor.metadata.ShardedTensorMetadata",
            "_shard.sharded_tensor.metadata.TensorProperties",
            "_shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
            "_shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
            "_shard.sharding_spec.api.EnumerableShardingSpec",
            "_shard.metadata.ShardMetadata",
            "remote_device._remote_device",
        )
    ),
)


@dataclass(frozen=True)
class FlatUnit:
    """A stretch of parameters that one buffer holds: all of an FSDP unit, or one parameter alone."""

    held: list[Stored]
    """The buffer's pieces, of rank 0, 1, ..., without padding."""
    members: list[tuple[str, tuple[int, ...]]]


@register("layout", "fsdp1")
class FSDP1(Layout):
    """Local state dicts of FullyShardedDataParallel, one file for each rank."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(FILE.fullmatch(path.name) for path in folder.iterdir())

    def open(self, opening: Opening) -> TensorSource:
        folder = opening.folder
        files = by_rank((((int(m[1]),), path) for path in sorted(folder.iterdir()) if (m := FILE.fullmatch(path.name))), ("data-parallel",), folder)
        stated = [int(m[2]) for path in folder.iterdir() if (m := FILE.fullmatch(path.name)) and m[2]]
        ranks = max([rank + 1 for (rank,) in files] + stated, default=0)
        complete(files, (ranks,), ("data-parallel",), folder)
        opening.needs_pickles(files[0,])
        config = opening.config or read_json(folder / "config.json")
        if config is None:
            raise InputError(f"{folder}: the files do not say which parameters lie in a flattened unit; give the model's config.json with --config.")
        loaded = [structure(files[rank,], allowed=STAND_INS) for rank in range(ranks)]
        models = [{WRAPPERS.sub("", name): value for name, value in _model(each).items()} for each in loaded]
        shapes = parameters_of(config)
        units = _units(models, shapes, folder)
        slices = [piece for unit in units for piece in _slices(unit, WEIGHT, unit.held)]
        moments, left_out = _moments([each.get("optimizer") for each in loaded], units, folder)
        return TensorSource({"data": ranks}, [*slices, *moments], config=config, left_out=left_out)


def parameters_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of the transformers model that a config.json describes, in the order of the model."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise InputError("The order of parameters in FSDP's flattened units is transformers' own; pip install 'cairn-lm[hf]' to import them.") from None
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config.get("model_type")), **values))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _model(loaded: Any) -> dict[str, Any]:
    found = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(found, dict):
        raise InputError("An FSDP file holds a state dict, or one under 'model'; this one holds neither.")
    return found


def _units(models: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> list[FlatUnit]:
    names = list(agreed((list(model) for model in models), "names of parameters", folder))
    prefixes = sorted((name.removesuffix(FLAT) for name in names if name.endswith(FLAT)), key=len, reverse=True)
    units = []
    for name in names:
        held = [_local(model[name], name) for model in models]
        pieces = [stored for stored, _ in held]
        if name.endswith(FLAT):
            prefix = name.removesuffix(FLAT)
            members = [(each, shape) for each, shape in shapes.items() if next((p for p in prefixes if each.startswith(p)), None) == prefix]
            if members and all(each in models[0] for each, _ in members):
                continue  # with use_orig_params the same values are there by name, too
        elif name in shapes:
            members = [(name, shapes[name])]
        else:
            raise MismatchError(f"{folder}: '{name}' is no parameter of the model that config.json describes.")
        wanted, found = sum(math.prod(shape) for _, shape in members), sum(piece.numel for piece in pieces)
        if wanted != found or agreed((size for _, size in held), f"size of '{name}'", folder) not in (None, wanted):
            raise MismatchError(f"{folder}: '{name}' holds {found} items, and the model that config.json describes has {wanted} there.")
        units.append(FlatUnit(pieces, members))
    return units


def _local(value: Any, name: str) -> tuple[Stored, int | None]:
    """The stretch that a rank holds, and the size of the whole where it is recorded."""
    if isinstance(value, Stored) and len(value.shape) == 1:
        return value, None
    if isinstance(value, InertTensor) and isinstance(value.inert, list) and len(value.inert) == 5:
        shards, metadata = value.inert[:2]
        if len(shards) <= 1:
            held = shards[0].state["tensor"] if shards else Stored(Path(), 0, torch.float32, (0,), (1,))
            return held, int(math.prod(metadata.state["size"]))
    raise MismatchError(f"'{name}' is not flat: this is no local state dict of FSDP (a full one is imported as a plain file).")


def _slices(unit: FlatUnit, key: str, held: Sequence[Stored]) -> Iterator[Slice]:
    start = 0
    for name, shape in unit.members:
        end = start + math.prod(shape)
        yield Slice(name, key, shape, held[0].dtype, functools.partial(_read, name, held, start, end, shape))
        start = end


def _read(name: str, held: Sequence[Stored], begin: int, end: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Items `begin` to `end` of a buffer that lies over the ranks."""
    stretches, start = [], 0
    for piece in held:
        first, last = max(begin, start), min(end, start + piece.numel)
        if first < last:
            stretches.append(piece.flat(first - start, last - start))
        start += piece.numel
    return join_flat(name, stretches or [torch.empty(0)], shape)


def _moments(optimizers: Sequence[Any], units: Sequence[FlatUnit], folder: Path) -> tuple[list[Slice], list[str]]:
    """The optimizer's state, if it numbers the units in their order; otherwise it is left out and that is said."""
    if any(optimizer is None for optimizer in optimizers):
        return [], []
    groups = [optimizer["param_groups"] for optimizer in optimizers]
    if any(len(each) != 1 or each[0]["params"] != list(range(len(units))) for each in groups):
        return [], ["the optimizer's state: it numbers parameters in groups of its own, and which is which is not recorded"]
    states = [optimizer["state"] for optimizer in optimizers]
    steps = [_number(state["step"]) for each in states for state in each.values() if "step" in state]
    step = agreed(steps, "optimizer's step", folder)
    found = []
    for number, unit in enumerate(units):
        keys = sorted({key for each in states for key in each.get(number, {})} - {"step"})
        for key in keys:
            held = [each[number][key] if number in each else Stored(Path(), 0, torch.float32, (0,), (1,)) for each in states]
            # The moments of the last rank are padded as its buffer was while training; the weights say how many are real.
            real = [Stored(h.path, h.position, h.dtype, (p.numel,), (1,)) for h, p in zip(held, unit.held, strict=True) if h.numel >= p.numel]
            if len(real) != len(held):
                raise MismatchError(f"{folder}: '{key}' of parameter {number} is shorter than the parameter; the files are of different saves.")
            found += list(_slices(unit, key, real))
        if step is not None and keys:
            found += [Slice(name, "step", (), torch.float32, functools.partial(torch.tensor, step)) for name, _ in unit.members]
    return found, []


def _number(value: Any) -> float:
    return float(value.read()) if isinstance(value, Stored) else float(value)
