"""config.json from the metadata of a GGUF file, and the other way round.

Nothing is guessed: metadata that ask for what a config.json cannot say, and a config.json that asks for what llama.cpp does not compute,
are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from cairn.checkpoint.foreign.gguf.families import ALIKE, FAMILIES, Family, shortest
from cairn.checkpoint.foreign.gguf.file import GGUFFile
from cairn.errors import DamagedError, InputError, MismatchError, suggestion

FREQUENCIES = "rope_freqs.weight"
"""Factors that slow the rotation of Llama 3.1 and later; the metadata do not say what they were made of."""
LONG = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
"""Factors of a long rope, which are values of config.json here and tensors there."""
OF_ROPE = frozenset({FREQUENCIES, *LONG.values()})
"""Tensors there that are part of config.json here."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all published models say that have such factors."""
LARGEST_GEMMAS = {("gemma2", 46), ("gemma3", 62)}
"""Architectures and layers for which llama.cpp scales scores by the width of the model over its heads instead of by the size of a head."""


def family_of(file: GGUFFile) -> Family:
    """The family that a file holds. Raises `DamagedError` or `InputError` where it is not known."""
    name = file.text("general.architecture")
    if name is None:
        raise DamagedError(f"{file.path} has no metadata 'general.architecture', so it is not known what model it holds.")
    if file.number("split.count", 1) != 1:
        raise InputError(
            f"{file.path} is one of {file.number('split.count')} files of a model; join them first: llama-gguf-split --merge FIRST_FILE WHOLE_FILE."
        )
    windowed = f"{name}.attention.sliding_window" in file.metadata
    routed = bool(file.number(f"{name}.expert_count", 0))
    alike = [family for family in FAMILIES if family.architecture == name and (windowed or not family.windowed)]
    found = next((family for family in alike if bool(family.experts) == routed), None)
    if found is None and alike and routed:
        raise InputError(f"{file.path} holds a mixture of {file.number(f'{name}.expert_count')} experts, and mixtures of '{name}' are not known here.")
    if found is None:
        raise InputError(f"{file.path} holds a model of the architecture '{name[:40]}', which is not known here.{suggestion(name, architectures())}")
    return found


def architectures() -> list[str]:
    """The architectures that are known, sorted."""
    return sorted({family.architecture for family in FAMILIES})


def config_of(file: GGUFFile, family: Family) -> dict[str, Any]:
    """The config.json of a file. Raises `CairnError` for metadata that are missing or that it cannot say."""
    config: dict[str, Any] = {"architectures": [family.hf_class], "model_type": family.model_type, **family.fixed}
    for key, there in family.keys.items():
        value = file.metadata.get(f"{family.architecture}.{there}")
        value = value if isinstance(value, bool) else file.number(f"{family.architecture}.{there}")
        if value is None and key not in ("num_key_value_heads", "head_dim", "n_inner") and key not in family.defaults:
            raise DamagedError(f"{file.path}: the metadata '{family.architecture}.{there}' are missing, without which the model is not known.")
        config[key] = shortest(value) if value is not None else family.defaults.get(key)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise DamagedError(f"{file.path} has no embedding 'token_embd.weight', so it holds no whole model.")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config |= {key: f"blk.0.{module}.bias" in file.tensors for key, module in family.biases.items()}
    if family.architecture == "gptneox":
        return config | _part_of_heads(file, config)
    if family.architecture == "gpt2":
        return config
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    if not heads or not config["hidden_size"]:
        raise DamagedError(f"{file.path}: the metadata say {heads} heads and a width of {config['hidden_size']}.")
    config["head_dim"] = config["head_dim"] or file.number(f"{family.architecture}.rope.dimension_count") or config["hidden_size"] // heads
    turned = file.number(f"{family.architecture}.rope.dimension_count", config["head_dim"])
    if family.architecture == "phi3":
        config |= {"partial_rotary_factor": turned / config["head_dim"], "sliding_window": config["sliding_window"] or None}
        config["original_max_position_embeddings"] = config["original_max_position_embeddings"] or config["max_position_embeddings"]
    elif turned != config["head_dim"]:
        raise InputError(
            f"{file.path}: {turned} of the {config['head_dim']} numbers of a head are rotated; for '{family.architecture}' only all of them are read."
        )
    if family.architecture in ("gemma2", "gemma3"):
        config["query_pre_attn_scalar"] = _scalar(family.architecture, config)
    pattern = file.metadata.get(f"{family.architecture}.attention.sliding_window_pattern")
    if family.windowed and isinstance(pattern, list) and len(pattern) == config["num_hidden_layers"]:
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    config["rope_parameters"] = {**_rope(file, family, config), "rope_theta": config["rope_theta"]}
    if "partial_rotary_factor" in config:
        config["rope_parameters"]["partial_rotary_factor"] = config["partial_rotary_factor"]
    return config


def _scalar(architecture: str, config: Mapping[str, Any]) -> int:
    """By what llama.cpp divides scores, before the root."""
    large = (architecture, config["num_hidden_layers"]) in LARGEST_GEMMAS
    return config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]


def _part_of_heads(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["hidden_size"] // (config["num_attention_heads"] or 1)
    turned = file.number("gptneox.rope.dimension_count", size)
    theta = shortest(file.number("gptneox.rope.freq_base", 10000.0))
    share = turned / size if size else 1.0
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    return {"rope_parameters": rope, "rotary_pct": share, "rotary_emb_base": theta}


def _rope(file: GGUFFile, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The variant of rope, without its base."""
    said = f"{family.architecture}.rope.scaling"
    kind, factor = file.text(f"{said}.type") or "none", file.number(f"{said}.factor")
    if FREQUENCIES in file.tensors:
        return _llama3(file, config)
    if family.architecture == "phi3" and set(LONG.values()) <= set(file.tensors):
        factors = {key: [shortest(value) for value in file.tensors[name].read().tolist()] for key, name in LONG.items()}
        return {"rope_type": "longrope", **factors, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    if kind == "none" or factor in (None, 1.0, 0.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(factor)}
    original = file.number(f"{said}.original_context_length")
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": shortest(factor), "original_max_position_embeddings": original}
    raise InputError(
        f"{file.path}: rope is scaled by the rule '{kind[:40]}', whose values a GGUF file does not tell whole; give the model's config.json with --config."
    )


def _llama3(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's rule where it makes exactly the factors of the file."""
    factors = file.tensors[FREQUENCIES].read()
    rope = {"rope_type": "llama3", "factor": shortest(float(factors.max())), **LLAMA3}
    if factors.numel() * 2 != config["head_dim"] or not torch.allclose(factors, llama3_factors(config["head_dim"], config["rope_theta"], rope), rtol=1e-4):
        raise InputError(f"{file.path}: '{FREQUENCIES}' are not the factors of any published rule; give the model's config.json with --config.")
    return rope


def llama3_factors(head: int, theta: float, rope: Mapping[str, Any]) -> torch.Tensor:
    """What Llama 3's rule divides each frequency by, shape (head / 2,)."""
    waves = 2 * math.pi * theta ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


# -- the other direction -----------------------------------------------------------------------------------------------


def family_for(config: Mapping[str, Any], where: object) -> Family:
    """The family as which a model can be written. Raises `MismatchError` where llama.cpp would compute another model."""
    name = str(config.get("model_type"))
    found = next((family for family in FAMILIES if family.model_type == ALIKE.get(name, name)), None)
    if found is None:
        known = sorted({family.model_type for family in FAMILIES} | set(ALIKE))
        raise InputError(f"{where} is of the family '{name[:40]}', which cannot be written as GGUF here.{suggestion(name, known)}")
    window = config.get("sliding_window")
    if (name in ALIKE or not found.looks_back) and window is not None and window < (config.get("max_position_embeddings") or 0):
        raise MismatchError(f"{where}: its layers look back at {window} positions, and a GGUF file of '{found.architecture}' cannot say that.")
    for key, value in found.fixed.items():
        if config.get(key) not in (value, None, False if value is None else value):
            raise MismatchError(f"{where}: config.json says {key}={config[key]!r}, and llama.cpp computes '{found.architecture}' with {value!r} alone.")
    return found


def metadata_of(config: Mapping[str, Any], described: Any, family: Family, where: object) -> dict[str, Any]:
    """The metadata that say what `config` does; `described` is its architecture in our catalog. Raises `MismatchError` for what they cannot say."""
    for key, value in family.fixed.items():
        if getattr(described, key, value) != value:
            raise MismatchError(f"{where}: its {key} is {getattr(described, key)!r}, and llama.cpp computes '{family.architecture}' with {value!r} alone.")
    values: dict[str, Any] = {}
    for key, there in family.keys.items():
        value = getattr(described, key, config.get(key))
        value = described.num_experts if key == "num_local_experts" else value
        value = described.key_value_heads if key == "num_key_value_heads" else described.inner_size if key == "n_inner" else value
        if key == "head_dim":
            value = described.head_size
            values |= {"attention.value_length": value, "rope.dimension_count": getattr(described, "rotary_size", value)}
        if value is not None:
            values[there] = value
    values["vocab_size"] = described.vocab_size
    if family.architecture == "gptneox":
        values |= {"rope.dimension_count": described.rotary_size, "rope.freq_base": described.rope_theta}
    elif family.architecture != "gpt2":
        values |= _rope_metadata(described, family, where)
        _refuse_other_layers(config, described, family, where)
    if family.windowed:  # llama.cpp knows the order by itself; other readers are told
        values["attention.sliding_window_pattern"] = [window is not None for window in described.windows]
    scalar = getattr(described, "query_pre_attn_scalar", None)
    sizes = {key: getattr(described, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    if scalar is not None and scalar != (wanted := _scalar(family.architecture, {**sizes, "head_dim": described.head_size})):
        raise MismatchError(
            f"{where}: scores are divided by the root of {scalar}, and llama.cpp divides those of such a '{family.architecture}' by that of {wanted}."
        )
    return {f"{family.architecture}.{key}": value for key, value in values.items()}


def _refuse_other_layers(config: Mapping[str, Any], described: Any, family: Family, where: object) -> None:
    """Raise `MismatchError` where layers differ from each other in another way than llama.cpp has it."""
    cls = type(described)
    plain = {key: value for key, value in config.items() if key not in ("layer_types", "no_rope_layers", "sliding_window_pattern", "no_rope_layer_interval")}
    usual = cls.from_hf(plain)
    layers = range(described.num_hidden_layers)
    same_turns = all(described.rotary_of(layer) == usual.rotary_of(layer) for layer in layers)
    if not same_turns or described.windows != usual.windows:
        raise MismatchError(f"{where}: its layers have windows or rotations in another order than llama.cpp computes for '{family.architecture}'.")


def _rope_metadata(described: Any, family: Family, where: object) -> dict[str, Any]:
    rope = described.rope_scaling
    kind = (rope or {}).get("rope_type", "default")
    if rope is None or kind == "llama3":
        return {}
    if kind == "longrope" and family.architecture == "phi3":
        return _long_metadata(described, rope, where)
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    told = {"rope_type", "factor", "original_max_position_embeddings"}
    if kind == "yarn" and rope.get("original_max_position_embeddings") and set(rope) <= told:
        original = int(rope["original_max_position_embeddings"])
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]), "rope.scaling.original_context_length": original}
    raise MismatchError(f"{where}: rope is scaled by the rule '{kind}' with values that a GGUF file of '{family.architecture}' cannot say.")


def _long_metadata(described: Any, rope: Mapping[str, Any], where: object) -> dict[str, Any]:
    original = int(rope.get("original_max_position_embeddings") or described.original_max_position_embeddings)
    stretch = described.max_position_embeddings / original
    if not set(rope) <= {"rope_type", *LONG, "original_max_position_embeddings", "factor"} or rope.get("factor", stretch) != stretch:
        raise MismatchError(f"{where}: its long rope has values that a GGUF file cannot say.")
    scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": scale}


def rope_tensors(described: Any, where: object) -> dict[str, torch.Tensor]:
    """What a GGUF file holds of a rope as tensors: the factors of Llama 3's rule, those of a long rope; none for other models."""
    rope = getattr(described, "rope_scaling", None)
    if rope is not None and rope.get("rope_type") == "longrope":
        return {name: torch.tensor(rope[key], dtype=torch.float32) for key, name in LONG.items()}
    if rope is None or rope.get("rope_type") != "llama3":
        return {}
    if any(rope.get(key, value) != value for key, value in LLAMA3.items()):
        raise MismatchError(f"{where}: rope is scaled by other values than {LLAMA3}, which a GGUF file cannot be told from; they cannot be written.")
    return {FREQUENCIES: llama3_factors(described.head_size, described.rope_theta, {**LLAMA3, **rope})}
