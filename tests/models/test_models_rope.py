"""Angles of every rope variant equal those of transformers, below and beyond the lengths at which a variant changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cairn.models.families.llama import Llama
from cairn.models.rope import Rope, rotate

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
ORIGINAL = {"original_max_position_embeddings": 16}
VARIANTS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8, "truncate": False, **ORIGINAL},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)], **ORIGINAL},
]


@pytest.mark.parametrize("scaling", VARIANTS, ids=lambda s: s["rope_type"] if s else "default")
@pytest.mark.parametrize("length", [9, 16, 17, 64, 90])
@pytest.mark.parametrize("explicit", [False, True])
def test_angles_equal_those_of_transformers(scaling: dict[str, Any] | None, length: int, explicit: bool) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    a = Llama(**SIZES, rope_theta=1000.0, rope_scaling=scaling)
    positions = torch.arange(length)[None]
    wanted = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**a.to_hf()))(torch.zeros(1), positions)
    found = Rope(a)(length, positions=positions if explicit else None)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine[0, :, 0], theirs[0, :, :8], rtol=0, atol=2e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    rope = Rope(Llama(**SIZES))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(at: int, other: int) -> torch.Tensor:
        return (rotate(q, *rope(1, at)) * rotate(k, *rope(1, other))).sum()

    torch.testing.assert_close(rotate(q, *rope(1, 40)).norm(), q.norm())
    torch.testing.assert_close(product(30, 20), product(15, 5), rtol=1e-4, atol=1e-4)
    assert (product(30, 20) - product(30, 10)).abs() > 1e-3
