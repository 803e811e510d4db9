"""Writers of other programs' folders, made from a checkpoint of ours: what DeepSpeed, Megatron-LM and Meta would have saved."""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import math
import sys
import types
from collections import OrderedDict

import torch

from cairn.checkpoint.foreign.patterns import Fused, Replicated, Shard, flat_param_split

STEP = 20.0


def state_of(checkpoint):
    """Weights and moments in float32: {key: {name: tensor}}, the key of a weight being ''."""
    state = {"": {name: lazy.load() for name, lazy in checkpoint.tensors.items()}}
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = {name: checkpoint.optimizer[f"{name}/{key}"].load() for name in state[""]}
    return state


def tensor_cut(name, rows):
    """Megatron's cut of a parameter with a Hugging Face name."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return Shard(1)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return Shard(vocab=rows)  # padded until it can be cut evenly
    return Replicated() if "norm" in name else Shard(0)


def cut(state, ways):
    """The state of each tensor-parallel rank."""
    ranks = [{key: {} for key in state} for _ in range(ways)]
    for key, tensors in state.items():
        for name, tensor in tensors.items():
            for rank, piece in enumerate(tensor_cut(name, len(tensor)).split(name, tensor, ways)):
                ranks[rank][key][name] = piece.clone()
    return ranks


@contextlib.contextmanager
def deepspeed_classes():
    """The three classes that DeepSpeed pickles, under its names, for as long as a file is written."""
    address = type("fragment_address", (), {"__module__": "deepspeed.utils.tensor_fragment"})
    scaler = type("LossScaler", (), {"__module__": "deepspeed.runtime.fp16.loss_scaler"})
    stage = enum.IntEnum("ZeroStageEnum", {"disabled": 0, "one": 1, "two": 2, "three": 3}, module="deepspeed.runtime.zero.config")
    names = [f"deepspeed{rest}" for rest in ("", ".utils", ".utils.tensor_fragment", ".runtime", ".runtime.fp16", ".runtime.fp16.loss_scaler")]
    names += ["deepspeed.runtime.zero", "deepspeed.runtime.zero.config"]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules |= {name: types.ModuleType(name) for name in names}
    for made in (address, scaler, stage):
        setattr(sys.modules[made.__module__], made.__name__, made)
    try:
        yield address, scaler, stage
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


def staged(state, stages):
    """The state of each pipeline stage: layers in turn, the embedding first, norm and head last."""
    if stages == 1:
        return [state]
    last = {"model.norm.weight": stages - 1, "lm_head.weight": stages - 1, "model.embed_tokens.weight": 0}
    where = {name: last[name] if name in last else int(name.split(".")[2]) for name in state[""]}
    return [{key: {name: tensor for name, tensor in tensors.items() if where[name] == stage} for key, tensors in state.items()} for stage in range(stages)]


def deepspeed(folder, state, *, stage, data, tensors=1, stages=1, universal=None, mappings=True, step=STEP):
    """A DeepSpeed folder of ZeRO stage 0 to 3 over data x tensor x pipeline ranks, with `latest` beside; two parameter groups, padded."""
    tag = folder / "global_step20"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step20")
    for rank, held in enumerate(held for part in staged(state, stages) for held in cut(part, tensors)):
        names = list(held[""])
        groups = [names[::2], names[1::2]]
        shapes = [OrderedDict((name, held[""][name].shape) for name in group) for group in groups]
        model = {"module": held[""], "param_shapes": shapes, "buffer_names": [], "shared_params": {}, "mp_world_size": tensors * stages, "dp_world_size": data}
        model |= {
            "global_steps": int(step),
            "global_samples": 160,
            "ds_version": "0.19.8",
            "checkpoint_parallel_dimensions": {"pp_degree": stages, "tp_degree": tensors},
        }
        model |= {"frozen_param_shapes": None, "frozen_param_fragments": None, "universal_checkpoint_info": universal}
        if stage < 3:
            torch.save(model, tag / f"mp_rank_{rank:02d}_model_states.pt")
        for replica in range(data if stage else 0):
            with deepspeed_classes() as classes:
                flat = _flat_3 if stage == 3 else _flat_1
                folded = flat(held, groups, replica, data, classes, step)
                if not mappings:
                    folded.pop("param_slice_mappings")
                torch.save({"optimizer_state_dict": folded, "ds_version": "0.19.8"}, tag / f"bf16_zero_pp_rank_{replica}_mp_rank_{rank:02d}_optim_states.pt")
            if stage == 3:
                empty = model | {"module": {name: torch.empty(0) for name in names}}
                torch.save(empty, tag / f"zero_pp_rank_{replica}_mp_rank_{rank:02d}_model_states.pt")
    return folder


def _flat_1(held, groups, replica, data, classes, step):
    """Each group end to end in one buffer, padded to an even number of items a rank."""
    address, scaler, stages = classes
    masters, states, mappings = [], {}, []
    for number, group in enumerate(groups):
        local = math.ceil(sum(held[""][name].numel() for name in group) / (2 * data)) * 2

        def mine(key, group=group, local=local):
            flat = torch.cat([held[key][name].reshape(-1) for name in group])
            return torch.cat([flat, torch.full((local * data - len(flat),), 9.0)])[replica * local : (replica + 1) * local].clone()

        masters.append(mine(""))
        states[number] = {"step": torch.tensor(step), "exp_avg": mine("exp_avg"), "exp_avg_sq": mine("exp_avg_sq")}
        places, start = OrderedDict(), 0
        for name in group:
            begin, end = max(start, replica * local), min(start + held[""][name].numel(), (replica + 1) * local)
            if begin < end:
                places[name] = address()
                places[name].__dict__.update(numel=end - begin, start=begin - replica * local)
            start += held[""][name].numel()
        mappings.append(places)
    return {
        "loss_scaler": scaler(), "zero_stage": stages(1), "partition_count": [data] * len(groups), "single_partition_of_fp32_groups": masters,
        "base_optimizer_state": {"state": states, "param_groups": [{"lr": 0.1}] * len(groups)}, "param_slice_mappings": mappings,
    }  # fmt: skip


def _flat_3(held, groups, replica, data, classes, step):
    """Each parameter cut in equal padded stretches; a rank's stretches of a group lie one after another."""
    _, scaler, stages = classes

    def mine(key, group):
        return torch.cat([flat_param_split(held[key][name], data)[replica].reshape(-1) for name in group])

    states = {n: {"step": torch.tensor(step), **{key: mine(key, group) for key in ("exp_avg", "exp_avg_sq")}} for n, group in enumerate(groups)}
    return {
        "zero_stage": stages(3), "loss_scaler": scaler(), "partition_count": data, "fp32_flat_groups": [mine("", group) for group in groups],
        "optimizer_state_dict": {"state": states, "param_groups": []}, "param_slice_mappings": None,
    }  # fmt: skip


def neighbours(matrix, heads):
    """Rows in Meta's order, which rotates neighbours: the inverse of what an import does, item by item."""
    size = len(matrix) // heads
    order = [head * size + (i // 2) + (i % 2) * (size // 2) for head in range(heads) for i in range(size)]
    return matrix[order]


def meta(folder, weights, config, ways, *, params=None):
    """Meta's folder of a LLaMA model over `ways` ranks; the embedding is cut along its width, as in the first two generations."""
    folder.mkdir()
    parts = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo"}
    parts |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    parts |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}
    ranks = [{"rope.freqs": torch.ones(4)} for _ in range(ways)]
    for name, tensor in weights.items():
        new = name.removeprefix("model.")
        for old, part in parts.items():
            new = new.replace(old, part)
        for letter, heads in (("wq", config["num_attention_heads"]), ("wk", config["num_key_value_heads"])):
            tensor = neighbours(tensor, heads) if new.endswith(f"{letter}.weight") else tensor
        rule = Shard(1) if new == "tok_embeddings.weight" else tensor_cut(name, len(tensor))
        for rank, piece in enumerate(rule.split(new, tensor, ways)):
            ranks[rank][new] = piece.clone()
    for rank, tensors in enumerate(ranks):
        torch.save(tensors, folder / f"consolidated.{rank:02d}.pth")
    sizes = {"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"], "vocab_size": -1}
    sizes |= {"n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"], "multiple_of": 32}
    (folder / "params.json").write_text(json.dumps(sizes | (params or {})))
    return folder


def megatron(folder, weights, config, *, tensors, stages, padded, classic=False, tied=False):
    """A Megatron-LM folder over tensor x pipeline ranks, of the core or the classic model; the vocabulary padded to `padded` rows."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    each, layers = heads // groups, config["num_hidden_layers"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    arguments = argparse.Namespace(
        tensor_model_parallel_size=tensors, pipeline_model_parallel_size=stages, swiglu=True, normalization="RMSNorm", position_embedding_type="rope",
        hidden_size=config["hidden_size"], ffn_hidden_size=config["intermediate_size"], num_layers=layers, num_attention_heads=heads, num_query_groups=groups,
        group_query_attention=True, norm_epsilon=config["rms_norm_eps"], max_position_embeddings=config["max_position_embeddings"],
        vocab_size=config["vocab_size"], padded_vocab_size=padded, untie_embeddings_and_output_weights=not tied, rotary_base=10000,
    )  # fmt: skip
    iteration = folder / "iter_0000020"
    (folder).mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("20\n")

    def ranks_of(rule, tensor):
        return rule.split("w", tensor, tensors)

    def vocabulary(tensor):
        return ranks_of(Shard(0), torch.cat([tensor, torch.full((padded - len(tensor), tensor.shape[1]), 7.0)]))

    for stage in range(stages):
        models = [{} for _ in range(tensors)]

        def put(name, pieces, models=models):
            for model, piece in zip(models, pieces, strict=True):
                model[name] = piece.clone()

        if stage == 0:
            put("embedding.word_embeddings.weight", vocabulary(weights["model.embed_tokens.weight"]))
        for local, layer in enumerate(range(stage * layers // stages, (stage + 1) * layers // stages)):
            there, here = f"decoder.layers.{local}.", f"model.layers.{layer}."
            q, k, v = (weights[f"{here}self_attn.{letter}_proj.weight"].unflatten(0, (groups, -1, size)) for letter in "qkv")
            assert q.shape[1] == each
            fused = torch.cat([q, k, v], 1).flatten(0, 2)
            put(f"{there}self_attention.linear_qkv.weight", ranks_of(Shard(0), fused))
            put(f"{there}self_attention.linear_proj.weight", ranks_of(Shard(1), weights[f"{here}self_attn.o_proj.weight"]))
            gate_up = torch.cat([weights[f"{here}mlp.gate_proj.weight"], weights[f"{here}mlp.up_proj.weight"]])
            put(f"{there}mlp.linear_fc1.weight", ranks_of(Fused(2), gate_up))
            put(f"{there}mlp.linear_fc2.weight", ranks_of(Shard(1), weights[f"{here}mlp.down_proj.weight"]))
            put(f"{there}self_attention.linear_qkv.layer_norm_weight", [weights[f"{here}input_layernorm.weight"]] * tensors)
            put(f"{there}mlp.linear_fc1.layer_norm_weight", [weights[f"{here}post_attention_layernorm.weight"]] * tensors)
        if stage == stages - 1:
            put("decoder.final_layernorm.weight", [weights["model.norm.weight"]] * tensors)
            if not tied or stages > 1:
                put("output_layer.weight", vocabulary(weights["model.embed_tokens.weight" if tied else "lm_head.weight"]))
        for rank, model in enumerate(models):
            path = iteration / (f"mp_rank_{rank:02d}" if stages == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            path.mkdir(parents=True)
            content = _classic(model) if classic else model | {"decoder.layers.0.self_attention.linear_qkv._extra_state": None}
            torch.save({"args": arguments, "checkpoint_version": 3.0, "iteration": 20, "model": content, "optimizer": {}}, path / "model_optim_rng.pt")
    return folder


def _classic(model):
    """The nested names of the classic model."""
    nested: dict = {"language_model": {"encoder": {}}}
    for name, tensor in model.items():
        if name.startswith("embedding."):
            nested["language_model"]["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif name.startswith("output_layer."):
            nested["language_model"]["output_layer"] = {"weight": tensor}
        else:
            old = name.removeprefix("decoder.").replace("final_layernorm", "final_norm").replace("linear_qkv.layer_norm_weight", "X")
            old = old.replace("self_attention.X", "input_norm.weight").replace("mlp.linear_fc1.layer_norm_weight", "post_attention_norm.weight")
            old = old.replace("linear_qkv", "query_key_value").replace("linear_proj", "dense").replace("linear_fc1", "dense_h_to_4h")
            nested["language_model"]["encoder"][old.replace("linear_fc2", "dense_4h_to_h")] = tensor
    return nested
