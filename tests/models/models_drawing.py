"""Hypothesis strategies for random architectures."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from cairn.models.config import Architecture
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2

CONTEXT = 48
"""Largest number of positions of a drawn model."""


def _scalings(pairs: int) -> st.SearchStrategy[dict[str, Any] | None]:
    factor = st.sampled_from([1.5, 2.0, 8.0])
    original = st.sampled_from([8, 16])
    stretch = st.lists(st.floats(1.0, 4.0), min_size=pairs, max_size=pairs)
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


@st.composite
def architectures(draw: st.DrawFn, family: type[Architecture] | None = None) -> Architecture:
    """A small random architecture of either family, with any rope variant, grouping, tying and bias."""
    kind = family or draw(st.sampled_from([Llama, Olmo2]))
    groups, share = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads = groups * share
    head = draw(st.sampled_from([4, 8, 10]))
    scaling = draw(_scalings(head // 2))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(5, 90)),
        "hidden_size": heads * head,
        "intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        "rope_scaling": scaling,
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.02, 0.2])),
    }
    if kind is Llama:
        values["mlp_bias"] = draw(st.booleans())
        values["head_dim"] = draw(st.sampled_from([None, 6])) if scaling is None or scaling["rope_type"] != "longrope" else None
    return kind(**values)
