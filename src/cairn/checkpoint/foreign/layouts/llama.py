"""Meta's own LLaMA files: consolidated.00.pth, one for each tensor-parallel rank, beside params.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cairn.catalog import register
from cairn.checkpoint.foreign.layouts import Layout, Opening, TensorSource, by_rank, complete, read_json, whole
from cairn.checkpoint.foreign.pickles import Stored, structure, tensors_of
from cairn.checkpoint.foreign.spec import ShardOf, ShardSpec
from cairn.errors import DamagedError, InputError

FILE = re.compile(r"consolidated\.(\d+)\.pth")
NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight", "attention.wk.weight": "self_attn.k_proj.weight", "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight", "feed_forward.w1.weight": "mlp.gate_proj.weight", "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight", "attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
}  # fmt: skip
"""Meta's names and Hugging Face's, within a layer or outside of all."""


def halves(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix from Meta's order, which rotates neighbours (0, 1), (2, 3), ..., to the one that rotates the two
    halves of a head. `matrix` is (heads * size, inputs)."""
    size = matrix.shape[0] // heads
    return matrix.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(matrix.shape)


@register("layout", "llama")
class LlamaLayout(Layout):
    """Meta's LLaMA files, consolidated.*.pth with params.json."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(FILE.fullmatch(path.name) for path in folder.iterdir())

    def open(self, opening: Opening) -> TensorSource:
        folder = opening.folder
        files = by_rank((((int(m[1]),), path) for path in sorted(folder.iterdir()) if (m := FILE.fullmatch(path.name))), ("tensor",), folder)
        ways = max((rank for (rank,) in files), default=-1) + 1
        complete(files, (ways,), ("tensor",), folder)
        opening.needs_pickles(files[0,])
        ranks = [dict(tensors_of(structure(files[rank,]), files[rank,])) for rank in range(ways)]
        params = read_json(folder / "params.json")
        config = opening.config or _config(params, ranks, folder)
        slices = [whole(name, held, tensor=rank) for rank, tensors in enumerate(ranks) for name, held in tensors.items() if name != "rope.freqs"]
        left_out = [] if opening.config is not None else [f"max_position_embeddings is not recorded: {config['max_position_embeddings']} is written"]
        return TensorSource({"tensor": ways}, slices, recorded=_cuts(ranks, config), translate=_translation(config), config=config, left_out=left_out)


def _cuts(ranks: list[dict[str, Stored]], config: Mapping[str, Any]) -> ShardSpec:
    """Megatron's cuts; the embedding was cut along its width in the first two generations and along its rows since."""
    columns = [ShardOf(pattern=r".*(attention\.wo|feed_forward\.w2)\.weight$", dim=1)]
    if ranks[0]["tok_embeddings.weight"].shape[1] != config["hidden_size"]:
        columns.append(ShardOf(pattern=r"tok_embeddings\.weight$", dim=1))
    return ShardSpec(replicated=[r"norm\.weight$", r"layers\.\d+\.(attention_norm|ffn_norm)\.weight$"], shard=columns, strict=False)


def _translation(config: Mapping[str, Any]) -> Any:
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config.get("num_key_value_heads") or config["num_attention_heads"])}

    def translate(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        layer, inner = (m[1], m[2]) if (m := re.fullmatch(r"layers\.(\d+)\.(.*)", name)) else (None, name)
        new = NAMES.get(inner, inner)
        rotated = next((count for part, count in heads.items() if f".{part}." in new), None)
        yield new if layer is None else f"model.layers.{layer}.{new}", tensor if rotated is None else halves(tensor, rotated)

    return translate


def _config(params: dict[str, Any] | None, ranks: list[dict[str, Stored]], folder: Path) -> dict[str, Any]:
    """config.json from params.json and the shapes."""
    if params is None:
        raise InputError(f"{folder} has no params.json, so the sizes of the model are not known; give its config.json with --config.")
    if params.get("use_scaled_rope"):
        raise InputError(f"{folder}/params.json asks for scaled rope and does not record its factors; give the model's config.json with --config.")
    try:
        heads, ways = int(params["n_heads"]), len(ranks)
        inner = ranks[0]["layers.0.feed_forward.w1.weight"].shape[0] * ways
        embedding = ranks[0]["tok_embeddings.weight"].shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": int(params["dim"]),
            "intermediate_size": inner,
            "num_hidden_layers": int(params["n_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(params.get("n_kv_heads") or heads),
            "rms_norm_eps": float(params["norm_eps"]),
            "rope_theta": float(params.get("rope_theta") or 10000.0),
            "max_position_embeddings": int(params.get("max_seq_len") or 2048),
            "vocab_size": embedding[0] * (ways if embedding[1] == int(params["dim"]) else 1),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in ranks[0],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder}: params.json and the files do not describe a LLaMA model ({error}); give its config.json with --config.") from None
