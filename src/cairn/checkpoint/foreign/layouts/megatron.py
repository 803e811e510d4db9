"""Megatron-LM folders: iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt, of the classic and the core models.

Weights come over, renamed and unfused for a LLaMA-style model; the optimizer's state, whose layout depends on Megatron's
version and buckets, does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cairn.catalog import register
from cairn.checkpoint.foreign.layouts import Layout, Opening, Slice, TensorSource, agreed, by_rank, complete, whole
from cairn.checkpoint.foreign.layouts.llama import halves
from cairn.checkpoint.foreign.pickles import Inert, InertInt, Stored, structure
from cairn.checkpoint.foreign.spec import FusedOf, ShardOf, ShardSpec
from cairn.errors import DamagedError, InputError, NotFoundError

FILES = ("model_optim_rng.pt", "model_rng.pt")
AXES = ("tensor", "pipeline", "expert")
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
STAND_INS = (
    (Inert, "argparse.Namespace"),
    (InertInt, "megatron.core.enums.ModelType"),
    (InertInt, "megatron.model.enums.PositionEmbeddingType"),
    (InertInt, "megatron.core.transformer.enums.AttnBackend"),
    (Inert, "numpy.core.multiarray._reconstruct"),
    (Inert, "numpy._core.multiarray._reconstruct"),
    (Inert, "numpy.ndarray"),
    (Inert, "numpy.dtype"),
    (Inert, "signal.Signals"),
)
"""What Megatron keeps beside the tensors: its arguments and the states of random generators."""

CLASSIC = (
    (r"language_model\.embedding\.", "embedding."),
    (r"language_model\.output_layer\.", "output_layer."),
    (r"language_model\.(?:encoder|transformer)\.final_(?:norm|layernorm)\.", "decoder.final_layernorm."),
    (r"language_model\.(?:encoder|transformer)\.layers\.", "decoder.layers."),
    (r"(.*)\.input_norm\.", r"\1.input_layernorm."),
    (r"(.*)\.(?:post_attention_norm|post_attention_layernorm)\.", r"\1.pre_mlp_layernorm."),
    (r"(.*)\.(?:self_attention|attention)\.query_key_value\.", r"\1.self_attention.linear_qkv."),
    (r"(.*)\.(?:self_attention|attention)\.dense\.", r"\1.self_attention.linear_proj."),
    (r"(.*)\.dense_h_to_4h\.", r"\1.linear_fc1."),
    (r"(.*)\.dense_4h_to_h\.", r"\1.linear_fc2."),
)
"""Names of the classic models in terms of the core ones."""

NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
}


def unfused_qkv(fused: torch.Tensor, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value from Megatron's rows, which lie group by group: the queries of a group, its key, its value.

    `fused` is (size * (heads + 2 * groups), ...), where `groups` are the key-value heads.
    """
    each = heads // groups
    size = fused.shape[0] // (heads + 2 * groups)
    grouped = fused.reshape(groups, each + 2, size, *fused.shape[1:])
    parts = grouped[:, :each], grouped[:, each : each + 1], grouped[:, each + 1 :]
    query, key, value = (part.reshape(-1, *fused.shape[1:]) for part in parts)
    return query, key, value


@register("layout", "megatron")
class Megatron(Layout):
    """A Megatron-LM folder of tensor-, pipeline- and expert-parallel ranks."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(RANK.fullmatch(path.name) for path in _iteration(folder).iterdir())

    def open(self, opening: Opening) -> TensorSource:
        folder = _iteration(opening.folder)
        cells = by_rank(((_cell(m), path) for path in sorted(folder.iterdir()) if (m := RANK.fullmatch(path.name))), AXES, folder)
        files = {cell: _file(path) for cell, path in cells.items()}
        if not files:
            raise NotFoundError(f"{folder} holds no mp_rank_* folder, so it is not a complete Megatron checkpoint.")
        opening.needs_pickles(next(iter(files.values())))
        states = {cell: structure(path, allowed=STAND_INS) for cell, path in files.items()}
        arguments = _arguments(next(iter(states.values())))
        sizes = _sizes(arguments, cells)
        complete(cells, sizes, AXES, folder)
        iteration = agreed((state.get("iteration") for state in states.values()), "iteration", folder)
        config = opening.config or _config(arguments, folder)
        tied = bool(config.get("tie_word_embeddings"))
        slices = _slices(states, folder, tied)
        heads, groups = int(config["num_attention_heads"]), int(config.get("num_key_value_heads") or config["num_attention_heads"])
        if groups % sizes[0]:
            raise InputError(f"{folder}: {groups} key-value heads over {sizes[0]} tensor ranks are kept in several copies, which is not read here.")
        return TensorSource(
            grid={"tensor": sizes[0], "pipeline": sizes[1], "expert": sizes[2]},
            slices=slices,
            recorded=_cuts(int(config["vocab_size"])),
            translate=_translation(heads, groups, bool(arguments.get("rotary_interleaved"))),
            config=config,
            plain={"iteration": iteration} if iteration is not None else {},
            left_out=["optimizer state, schedule and random states of Megatron"] if any("optimizer" in state for state in states.values()) else [],
        )


def _slices(states: Mapping[tuple[int, int, int], dict[str, Any]], folder: Path, tied: bool) -> list[Slice]:
    found, before = [], _layers_before(states, folder)
    for (tensor, stage, expert), state in states.items():
        for name, value in _flat(state.get("model"), folder):
            if layer := re.match(r"decoder\.layers\.(\d+)", name):
                name = f"decoder.layers.{int(layer[1]) + before[stage]}{name[layer.end() :]}"
            if tied and name in ("output_layer.weight", "word_embeddings_for_head.weight"):
                name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
                if stage == 0:
                    continue
            found.append(whole(name, value, tensor=tensor, stage=stage, expert=expert))
    return [_renumbered(piece, states) for piece in found]


def _renumbered(piece: Slice, states: Mapping[tuple[int, int, int], Any]) -> Slice:
    """Experts are numbered from 0 on every expert rank; here over all of them."""
    match = re.fullmatch(r"(.*\.local_experts\.)(\d+)(\..*)", piece.name)
    if match is None:
        return piece
    names = [name for name, _ in _flat(states[piece.tensor, piece.stage, piece.expert]["model"], Path())]
    local = 1 + max(int(m[1]) for name in names if (m := re.search(r"\.local_experts\.(\d+)\.", name)))
    return replace(piece, name=f"{match[1]}{piece.expert * local + int(match[2])}{match[3]}", expert=0)


def _layers_before(states: Mapping[tuple[int, int, int], dict[str, Any]], folder: Path) -> dict[int, int]:
    """Layers are numbered from 0 on every stage: how many stand on the stages before each."""
    held: dict[int, set[int]] = {}
    for (_, stage, _), state in states.items():
        numbers = (re.search(r"decoder\.layers\.(\d+)\.", name) for name, _ in _flat(state.get("model"), folder))
        held.setdefault(stage, set()).update(int(match[1]) for match in numbers if match)
    return {stage: sum(len(held[earlier]) for earlier in held if earlier < stage) for stage in held}


def _flat(model: Any, folder: Path, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    if not isinstance(model, dict):
        raise InputError(f"{folder} holds no 'model' of one piece (interleaved pipeline stages are not read here).")
    for key, value in model.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, folder, f"{name}.")
        elif isinstance(value, Stored) and not name.endswith("_extra_state"):
            for pattern, new in CLASSIC:
                name = re.sub(f"^{pattern}", new, name)
            yield name, value


def _cuts(vocabulary: int) -> ShardSpec:
    return ShardSpec(
        replicated=[r".*layernorm\.", r".*\.layer_norm_(weight|bias)$", r".*\.(linear_proj|linear_fc2)\.bias$", r".*\.router\."],
        shard=[
            ShardOf(pattern=r".*\.(linear_proj|linear_fc2)\.weight$", dim=1),
            ShardOf(pattern=r"(embedding\.word_embeddings|output_layer)\.weight$", vocab=vocabulary),
        ],
        fused=[FusedOf(pattern=r".*\.linear_fc1\.(weight|bias)$", parts=2)],
        pipeline_replicated=[r"embedding\.word_embeddings\.weight$"],
        strict=False,
    )


def _translation(heads: int, groups: int, interleaved: bool) -> Any:
    def translate(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match is None:
            yield NAMES.get(name, name), tensor
            return
        layer, inner = f"model.layers.{match[1]}.", match[2]
        if fused := re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", inner):
            query, key, value = unfused_qkv(tensor, heads, groups)
            if interleaved:
                query, key = (halves(part.reshape(part.shape[0], -1), count).reshape(part.shape) for part, count in ((query, heads), (key, groups)))
            yield from ((f"{layer}self_attn.{letter}_proj.{fused[1]}", part) for letter, part in zip("qkv", (query, key, value), strict=True))
        elif fused := re.fullmatch(r"mlp\.linear_fc1\.(weight|bias)", inner):
            yield from ((f"{layer}mlp.{half}_proj.{fused[1]}", part) for half, part in zip(("gate", "up"), tensor.chunk(2), strict=True))
        else:
            yield layer + LAYER[inner] if inner in LAYER else name, tensor

    return translate


def _arguments(state: Mapping[str, Any]) -> dict[str, Any]:
    found = state.get("args")
    return dict(found.state) if isinstance(found, Inert) and isinstance(found.state, dict) else {}


def _sizes(arguments: Mapping[str, Any], cells: Mapping[tuple[int, int, int], Path]) -> tuple[int, int, int]:
    """Ranks of each axis: recorded, or as many as there are folders."""
    if arguments.get("virtual_pipeline_model_parallel_size"):
        raise InputError("Interleaved pipeline stages (virtual_pipeline_model_parallel_size) are not read here; save with one stage for each rank.")
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    seen = [max(cell[axis] for cell in cells) + 1 for axis in range(3)]
    tensor, stage, expert = (max(size, int(arguments.get(key) or 1)) for size, key in zip(seen, keys, strict=True))
    return tensor, stage, expert


def _config(arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json of a LLaMA-style model from Megatron's arguments."""
    if not (arguments.get("swiglu") and arguments.get("normalization") == "RMSNorm" and arguments.get("position_embedding_type") in ("rope", None)):
        raise InputError(f"{folder} does not record the arguments of a LLaMA-style model; give the model's config.json with --config.")
    try:
        vocabulary = int(arguments["vocab_size"])
        heads = int(arguments["num_attention_heads"])
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": int(arguments["hidden_size"]),
            "intermediate_size": int(arguments["ffn_hidden_size"]),
            "num_hidden_layers": int(arguments["num_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(arguments["num_query_groups"]) if arguments.get("group_query_attention") else heads,
            "rms_norm_eps": float(arguments.get("norm_epsilon") or 1e-5),
            "rope_theta": float(arguments.get("rotary_base") or 10000.0),
            "max_position_embeddings": int(arguments["max_position_embeddings"]),
            "vocab_size": vocabulary,
            "hidden_act": "silu",
            "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder}: Megatron's arguments lack a size ({error}); give the model's config.json with --config.") from None


def _iteration(folder: Path) -> Path:
    """The folder of the newest iteration, or the folder itself."""
    newest = folder / "latest_checkpointed_iteration.txt"
    if not newest.is_file():
        return folder
    text = newest.read_text().strip()
    path = folder / ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else text)
    if not path.is_dir():
        raise NotFoundError(f"{newest} names iteration '{text}', whose folder is not there.")
    return path


def _cell(match: re.Match[str]) -> tuple[int, int, int]:
    return int(match[1]), int(match[2] or 0), int(match[3] or 0)


def _file(path: Path) -> Path:
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise NotFoundError(f"{path} holds no {FILES[0]}, so the checkpoint is not complete.")
    return found
