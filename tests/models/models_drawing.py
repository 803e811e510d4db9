"""Hypothesis strategies for random architectures."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from cairn import catalog
from cairn.models.config import Architecture
from cairn.models.families.gpt import GPTFamily

CONTEXT = 48
"""Largest number of positions of a drawn model."""


def _scalings(pairs: int, long_only: bool = False) -> st.SearchStrategy[dict[str, Any] | None]:
    factor = st.sampled_from([1.5, 2.0, 8.0])
    original = st.sampled_from([8, 16])
    stretch = st.lists(st.floats(1.0, 4.0), min_size=pairs, max_size=pairs)
    if long_only:  # its factor is that of the lengths
        long = {"rope_type": st.just("longrope"), "short_factor": stretch, "long_factor": stretch, "original_max_position_embeddings": st.just(16)}
        return st.none() | st.fixed_dictionaries(long)
    return st.one_of(
        st.none(),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factor}),
        st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factor}),
        st.fixed_dictionaries(
            {"rope_type": st.just("yarn"), "factor": factor, "original_max_position_embeddings": original},
            optional={"beta_fast": st.just(16), "beta_slow": st.just(2), "attention_factor": st.just(1.2), "truncate": st.booleans()},
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("llama3"),
                "factor": factor,
                "low_freq_factor": st.just(1.0),
                "high_freq_factor": st.just(4.0),
                "original_max_position_embeddings": original,
            }
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("longrope"),
                "factor": factor,
                "short_factor": stretch,
                "long_factor": stretch,
                "original_max_position_embeddings": original,
            }
        ),
    )


FAMILIES: dict[str, type[Architecture]] = {name: catalog.get("architecture", name).implementation for name in catalog.names("architecture")}
DECODERS = {name: family for name, family in FAMILIES.items() if issubclass(family, Architecture | GPTFamily)}
FULL_ROPE = ("llama", "olmo2", "granite", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "mixtral", "qwen3_moe", "olmoe")
"""Families with one rope for all layers, in any of its variants."""


@st.composite
def _gpts(draw: st.DrawFn, kind: type[GPTFamily]) -> GPTFamily:
    heads, head = draw(st.integers(1, 4)), draw(st.sampled_from([8, 12]))
    sizes = dict(zip(SIZES_OF[kind.model_type], (heads * head, heads, draw(st.integers(1, 3)), CONTEXT, draw(st.integers(1, 70))), strict=True))
    values: dict[str, Any] = {
        **sizes,
        "vocab_size": draw(st.integers(5, 90)),
        "initializer_range": draw(st.sampled_from([0.02, 0.2])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if kind.model_type == "gpt_neox":
        share = draw(st.sampled_from([0.5, 1.0]))
        values |= {"use_parallel_residual": draw(st.booleans()), "attention_bias": draw(st.booleans()), "partial_rotary_factor": share}
    return kind(**values)


SIZES_OF = {
    "gpt_neox": ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "intermediate_size"),
    "gpt2": ("n_embd", "n_head", "n_layer", "n_positions", "n_inner"),
}
"""Names of width, heads, layers, positions and inner size."""


@st.composite
def architectures(draw: st.DrawFn, family: type[Architecture] | None = None) -> Architecture:
    """A small random architecture of any decoder, with any rope variant, grouping, tying, bias and windows that it may have."""
    kind = family or draw(st.sampled_from(list(DECODERS.values())))
    if issubclass(kind, GPTFamily):
        return draw(_gpts(kind))
    name = next(name for name, each in DECODERS.items() if each is kind)
    fields = kind.model_fields
    groups, share = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads = groups * share
    head = draw(st.sampled_from([4, 8, 10]))
    share_of_head = draw(st.sampled_from([0.5, 1.0])) if name == "phi3" and head != 10 else 1.0
    rotated = int(head * share_of_head)
    scaling = draw(_scalings(rotated // 2, long_only=name == "phi3")) if name in FULL_ROPE else None
    layers = draw(st.integers(1, 4))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(5, 90)),
        "hidden_size": heads * head,
        "intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        "rope_scaling": scaling,
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.02, 0.2])),
    }
    if "attention_bias" not in kind.unwritten:
        values["attention_bias"] = draw(st.booleans())
    if "mlp_bias" not in kind.unwritten:
        values["mlp_bias"] = draw(st.booleans())
    if name == "phi3":
        values |= {"partial_rotary_factor": share_of_head, "original_max_position_embeddings": 16}
    if "num_experts" in fields:
        count = draw(st.integers(1, 6))
        values |= {"num_experts": count, "num_experts_per_tok": draw(st.integers(1, count))}
        if "norm_topk_prob" not in kind.unwritten:
            values["norm_topk_prob"] = draw(st.booleans())
    if name == "qwen3_moe":
        values |= {"moe_intermediate_size": draw(st.integers(1, 30)), "decoder_sparse_step": draw(st.integers(1, 2))}
        values["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), max_size=1))
    if name in ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        other = draw(st.sampled_from([None, 6])) if scaling is None or scaling["rope_type"] != "longrope" else None
        values["head_dim"] = other or (head if name in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text") else None)
    if "sliding_window" in fields:
        values["sliding_window"] = draw(st.one_of(st.integers(1, 20) if name.startswith(("gemma", "olmo3")) else st.none() | st.integers(1, 20)))
        if "layer_types" not in kind.unwritten and values["sliding_window"] is not None:
            values["layer_types"] = draw(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers))
    if name == "smollm3":
        values["no_rope_layer_interval"] = draw(st.integers(1, 4))
    if name.startswith("gemma"):
        values |= {"query_pre_attn_scalar": draw(st.integers(1, 30)), "final_logit_softcapping": draw(st.sampled_from([None, 2.0, 30.0]))}
    if name == "gemma2":
        values["attn_logit_softcapping"] = draw(st.sampled_from([None, 1.0, 50.0]))
    if name == "gemma3_text":
        values["rope_local_base_freq"] = draw(st.sampled_from([50.0, 10000.0]))
    if name == "granite":
        factors = st.floats(0.1, 4.0)
        values |= {key: draw(factors) for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")}
    return kind(**values)
