"""DeepSpeed folders: ZeRO stages 1, 2 and 3, and plain stage 0, over data, tensor and pipeline ranks.

Weights are the float32 masters where there are any; the moments come with them. How data-parallel ranks cut the flattened
groups is recorded in the files (`param_slice_mappings`) for stages 1 and 2 and follows from the shapes for stage 3.
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
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Opening, Slice, TensorSource, agreed, by_rank, complete, read_json, whole
from cairn.checkpoint.foreign.patterns import flat_param_stretch, join_flat
from cairn.checkpoint.foreign.pickles import Inert, InertInt, Stored, structure
from cairn.checkpoint.foreign.spec import ShardSpec, recorded
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError

STAND_INS = (
    (InertInt, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Inert, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
)
"""Classes of DeepSpeed's that its files hold; none of their code is needed to read them."""

AXES = ("model-parallel", "data-parallel")
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
MODEL_STAGE_3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
EXPERTS = re.compile(r"(layer_\d+_)?expert_\d+.*_states\.pt|expp_rank_.*")


@dataclass(frozen=True)
class PartitionSlice:
    """Where one data-parallel rank keeps its stretch of a parameter: items `begin` to `begin + count` of a flat buffer."""

    buffer: Stored
    begin: int
    count: int


Pieces = dict[tuple[str, str], list[PartitionSlice]]
"""By (parameter, key): the stretches of all data-parallel ranks, in their order."""


@register("layout", "deepspeed")
class DeepSpeed(Layout):
    """A DeepSpeed folder: ZeRO stage 0 to 3, over data, tensor and pipeline ranks."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(pattern.fullmatch(path.name) for path in _tagged(folder).iterdir() for pattern in (MODEL, MODEL_STAGE_3))

    def open(self, opening: Opening) -> TensorSource:
        folder = _tagged(opening.folder)
        _refuse_experts(folder)
        files = sorted(folder.iterdir())
        optimizers, third = (
            by_rank((((int(m[2]), int(m[1])), path) for path in files if (m := pattern.fullmatch(path.name))), AXES, folder)
            for pattern in (OPTIMIZER, MODEL_STAGE_3)
        )
        models = by_rank((((int(m[1]), 0), path) for path in files if (m := MODEL.fullmatch(path.name))), AXES, folder)
        models = third or models
        if not models:
            raise NotFoundError(f"{folder} holds no *_model_states.pt file, so it is not a complete DeepSpeed checkpoint.")
        opening.needs_pickles(next(iter(models.values())))
        states = {cell: structure(path, allowed=STAND_INS) for cell, path in models.items()}
        folded = {cell: structure(path, allowed=STAND_INS)["optimizer_state_dict"] for cell, path in optimizers.items()}
        config = opening.config or read_json(opening.folder / "config.json") or read_json(folder.parent / "config.json")
        return _Folder(folder, states, folded, stage_3=bool(third)).source(config)


@dataclass
class _Folder:
    """All files of one save: `models` and `optimizers` by (model-parallel rank, data-parallel rank)."""

    path: Path
    models: dict[tuple[int, int], dict[str, Any]]
    optimizers: dict[tuple[int, int], dict[str, Any]]
    stage_3: bool

    def source(self, config: dict[str, Any] | None) -> TensorSource:
        first = self.models[min(self.models)]
        for cell, model in self.models.items():
            if not isinstance(model.get("module"), dict):
                raise DamagedError(f"{self.path}: the model file of rank {cell[0]} holds no weights.")
            if "ds_autoep_layers" in model or "autoep_layers" in model:
                raise InputError(f"{self.path} holds experts spread by AutoEP, which cannot be joined here; convert it with DeepSpeed's own tools first.")
        ways, data = self._sizes()
        stages, tensors = self._degrees(first, ways)
        complete(self.models, (ways, data if self.stage_3 else 1), AXES, self.path)
        if self.optimizers:
            complete(self.optimizers, (ways, data), AXES, self.path)
        steps = self._steps()
        slices = []
        for rank in range(ways):
            place = {"stage": rank // tensors, "tensor": rank % tensors}
            slices += [*self._trained(rank, data, steps, place), *self._untrained(rank, data, place)]
        facts = {key: agreed((model.get(key) for model in self.models.values()), key, self.path) for key in ("global_steps", "global_samples", "ds_version")}
        return TensorSource(
            grid={"pipeline": stages, "tensor": tensors, "data": data},
            slices=slices,
            recorded=_recorded(first.get("universal_checkpoint_info") or {}, self.path),
            aliases=dict(first.get("shared_params") or {}),
            config=config,
            plain={key: value for key, value in facts.items() if value is not None},
            left_out=["learning-rate scheduler, loss scaler and parameter groups of DeepSpeed"],
        )

    def _sizes(self) -> tuple[int, int]:
        """Model-parallel and data-parallel ranks, as recorded; files that are missing do not make the grid smaller."""
        ways = max(rank for rank, _ in (*self.models, *self.optimizers)) + 1
        counts = [count for folded in self.optimizers.values() for count in _listed(folded.get("partition_count", 1))]
        recorded = [int(model["dp_world_size"]) for model in self.models.values() if model.get("dp_world_size")]
        files = max((rank for _, rank in (*self.models, *self.optimizers)), default=0) + 1
        data = max([files, *counts, *(recorded if self.optimizers or self.stage_3 else [])])
        sizes = [int(model["mp_world_size"]) for model in self.models.values() if model.get("mp_world_size")]
        return max([ways, *sizes]), data

    def _degrees(self, first: Mapping[str, Any], ways: int) -> tuple[int, int]:
        degrees = first.get("checkpoint_parallel_dimensions") or {}
        tensors = int(degrees.get("tp_degree") or first.get("mp_world_size") or 1)
        stages = int(degrees.get("pp_degree") or max(1, ways // tensors))
        ways = max(ways, stages * tensors)
        if stages * tensors != ways:
            raise MismatchError(f"{self.path} has files of {ways} model-parallel ranks and records {stages} pipeline x {tensors} tensor ranks.")
        return stages, tensors

    # -- what the optimizer keeps -----------------------------------------------------------------------------------

    def _trained(self, rank: int, data: int, steps: float | None, place: dict[str, int]) -> Iterator[Slice]:
        """Masters and moments, each joined from the stretches of the data-parallel ranks."""
        if not self.optimizers:
            return
        shapes = {name: tuple(shape) for group in self.models[rank, 0]["param_shapes"] for name, shape in group.items()}
        pieces: Pieces = {}
        for replica in range(data):
            found = self._stage_3(rank, replica, data) if self.stage_3 else self._stage_1(rank, replica, data)
            for name, key, piece in found:
                pieces.setdefault((name, key), []).append(piece)
        lost = [name for name, shape in shapes.items() if (name, WEIGHT) not in pieces and math.prod(shape)]
        if lost:
            raise MismatchError(f"{self.path}: no rank holds a piece of '{lost[0]}'.")
        for (name, key), stretches in pieces.items():
            if name not in shapes:
                raise MismatchError(f"{self.path}: the optimizer keeps '{name}', which the model files do not know.")
            held = sum(piece.count for piece in stretches)
            if held != math.prod(shapes[name]):
                raise MismatchError(f"{self.path}: '{name}' has {math.prod(shapes[name])} items and the ranks hold {held}; a file is of another save.")
            yield Slice(name, key, shapes[name], stretches[0].buffer.dtype, functools.partial(_join, name, stretches, shapes[name]), **place)
            if key == WEIGHT and steps is not None:
                yield Slice(name, "step", (), torch.float32, functools.partial(torch.tensor, steps), **place)

    def _stage_1(self, rank: int, replica: int, data: int) -> Iterator[tuple[str, str, PartitionSlice]]:
        """Stages 1 and 2 (`flat_group`): every parameter's recorded place in each group's buffer."""
        folded = self.optimizers[rank, replica]
        groups, states = folded["single_partition_of_fp32_groups"], _states(folded["base_optimizer_state"])
        mappings = folded.get("param_slice_mappings") or self._places(rank, replica, groups, data)
        for group, mapping in enumerate(mappings):
            buffers = {WEIGHT: groups[group], **_tensors(states.get(group, {}))}
            for name, place in mapping.items():
                for key, buffer in buffers.items():
                    yield name, key, PartitionSlice(buffer, int(place["start"]), int(place["numel"]))

    def _places(self, rank: int, replica: int, groups: Sequence[Stored], data: int) -> list[dict[str, dict[str, int]]]:
        """Where older versions, which do not record it, lay the parameters: end to end, in the order of `param_shapes`."""
        padded = self.optimizers[rank, replica].get("param_alignment_paddings") or []
        if any(any(group) for group in padded):
            raise InputError(f"{self.path} pads between parameters and does not record where each lies; save it with param_slice_mappings.")
        found = []
        for group, shapes in zip(groups, self.models[rank, 0]["param_shapes"], strict=True):
            first, last = replica * group.numel, (replica + 1) * group.numel
            places, start = {}, 0
            for name, shape in shapes.items():
                end = start + math.prod(shape)
                if max(start, first) < min(end, last):
                    places[name] = {"start": max(start, first) - first, "numel": min(end, last) - max(start, first)}
                start = end
            if start > data * group.numel:
                raise MismatchError(f"{self.path}: the shapes need {start} items and the ranks hold {data * group.numel}.")
            found.append(places)
        return found

    def _stage_3(self, rank: int, replica: int, data: int) -> Iterator[tuple[str, str, PartitionSlice]]:
        """Stage 3 (`flat_param`): every parameter cut in equal stretches, padded at the end, one after another in each group."""
        folded, shapes = self.optimizers[rank, replica], self.models[rank, replica]["param_shapes"]
        groups, states = folded["fp32_flat_groups"], _states(folded["optimizer_state_dict"])
        if len(groups) != len(shapes):
            raise MismatchError(f"{self.path}: {len(groups)} groups of masters and {len(shapes)} groups of shapes; the files are of different saves.")
        for group, (buffer, members) in enumerate(zip(groups, shapes, strict=True)):
            buffers, start = {WEIGHT: buffer, **_tensors(states.get(group, {}))}, 0
            for name, shape in members.items():
                numel = math.prod(shape)
                begin, end = flat_param_stretch(numel, replica, data)
                for key, held in buffers.items():
                    yield name, key, PartitionSlice(held, start, end - begin)
                start += -(-numel // data)
            if start != buffer.numel:
                raise MismatchError(f"{self.path}: group {group} of data-parallel rank {replica} holds {buffer.numel} items, its shapes ask for {start}.")

    def _steps(self) -> float | None:
        """The number of updates, which all ranks and groups must agree about."""
        key = "optimizer_state_dict" if self.stage_3 else "base_optimizer_state"
        found = [_number(state["step"]) for folded in self.optimizers.values() for state in _states(folded[key]).values() if "step" in state]
        return agreed(found, "optimizer's step", self.path)  # type: ignore[no-any-return]

    # -- what the optimizer does not keep ---------------------------------------------------------------------------

    def _untrained(self, rank: int, data: int, place: dict[str, int]) -> Iterator[Slice]:
        """Buffers and frozen parameters, and without ZeRO everything, as the model file holds them."""
        model = self.models[rank, 0]
        trained = {name for group in model["param_shapes"] or [] for name in group} if self.optimizers else set()
        trained |= set(model.get("shared_params") or {})
        if not self.stage_3:
            yield from (whole(name, value, **place) for name, value in model["module"].items() if isinstance(value, Stored) and name not in trained)
            return
        yield from (whole(name, model["module"][name], **place) for name in model.get("buffer_names") or [] if name in model["module"])
        for name, shape in (model.get("frozen_param_shapes") or {}).items():
            held = [self.models[rank, replica]["frozen_param_fragments"][name] for replica in range(data)]
            stretches = [PartitionSlice(each, 0, end - begin) for r, each in enumerate(held) for begin, end in [flat_param_stretch(math.prod(shape), r, data)]]
            yield Slice(name, WEIGHT, tuple(shape), held[0].dtype, functools.partial(_join, name, stretches, tuple(shape)), **place)


def _join(name: str, pieces: Sequence[PartitionSlice], shape: tuple[int, ...]) -> torch.Tensor:
    return join_flat(name, [piece.buffer.flat(piece.begin, piece.begin + piece.count) for piece in pieces], shape)


def _states(base: Any) -> dict[int, dict[str, Any]]:
    """The optimizer's state by parameter group."""
    state = base.get("state") if isinstance(base, Mapping) else None
    if not isinstance(state, Mapping):
        raise InputError("The optimizer state is in DeepSpeed's old elastic form, which is not read here; save it with elastic_checkpoint off.")
    return {int(group): dict(values) for group, values in state.items()}


def _tensors(state: Mapping[str, Any]) -> dict[str, Stored]:
    """What has one item for each item of the parameters; other state does not lie as they do and is refused."""
    found = {key: value for key, value in state.items() if isinstance(value, Stored) and key != "step"}
    strange = next((key for key, value in found.items() if len(value.shape) != 1), None)
    if strange is not None:
        raise InputError(f"The optimizer keeps '{strange}' in another shape than its parameters, and how that was cut is not known.")
    return found


def _number(value: Any) -> float:
    return float(value.read()) if isinstance(value, Stored) else float(value)


def _listed(value: Any) -> list[int]:
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]


def _recorded(info: Mapping[str, Any], where: Path) -> ShardSpec:
    """The spec that DeepSpeed records for its own converter (`universal_checkpoint_info`)."""
    unsupported = [*info.get("autotp_unsupported_parameter_patterns", [])]
    vocabulary, columns = info.get("vocabulary_parameter_patterns", []), info.get("parameter_with_row_parallelism_patterns", [])
    fused: list[dict[str, Any]] = [{"pattern": pattern, "parts": 2} for pattern in info.get("parameter_with_2_sub_params_cat_dim_0", [])]
    for item in info.get("parameter_with_sub_params", []):
        dim, shape = int(item["partition_dim"]), item["shape"]
        for pattern in item["patterns"]:
            widths = info.get("sub_param_shard_widths", {}).get(pattern)
            if widths is None and not isinstance(shape[dim], int):
                raise InputError(f"{where} records fused parts of unequal size for '{pattern}' without their widths; say them in a spec.")
            fused.append({"pattern": pattern, "dim": dim, **({"widths": widths} if widths is not None else {"parts": shape[dim]})})
    values = {
        "replicated": info.get("tp_replicated_parameter_patterns", []),
        "average": info.get("parameter_to_average_patterns", []),
        "pipeline_replicated": info.get("pipeline_replicated_parameter_patterns", []),
        "shard": [{"pattern": pattern, "dim": 1} for pattern in columns]
        + [{"pattern": pattern, "vocab": info.get("original_vocab_size")} for pattern in vocabulary],
        "fused": fused,
        "unsupported": [{"pattern": pattern, "reason": "DeepSpeed records that its layout cannot be described"} for pattern in unsupported],
    }
    return recorded(values, str(where))


def _tagged(folder: Path) -> Path:
    """The folder of the save that `latest` names, or the folder itself."""
    if not (folder / "latest").is_file():
        return folder
    tag = (folder / "latest").read_text().strip()
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        raise NotFoundError(f"{folder / 'latest'} names '{tag}', which is not there.")
    return folder / tag


def _refuse_experts(folder: Path) -> None:
    expert = next((path.name for path in folder.iterdir() if EXPERTS.fullmatch(path.name)), None)
    if expert is not None:
        raise InputError(f"{folder} holds files of experts ({expert}), whose ranks are not joined here; convert them with DeepSpeed's own tools first.")
