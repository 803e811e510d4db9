"""What flows through a network, against networks whose signals are known."""

from __future__ import annotations

import math

import pytest
import torch

from cairn.models import masks
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2
from cairn.models.signals import signals

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("family", [Llama, Olmo2])
def test_blocks_that_do_nothing_let_nothing_grow(family) -> None:
    model = family(**SMALL, initializer_range=0.3).build(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    found = signals(model, *batch())
    assert found.activation_growth == 0 and found.gradient_growth == 0
    assert len(found.activations) == len(found.gradients) == 4 and len(found.attention) == 3


def test_norms_are_those_of_the_residual_stream_and_its_gradient() -> None:
    model, (ids, targets) = Llama(**SMALL, initializer_range=0.3).build(2), batch()
    found = signals(model, ids, targets)
    stream = [model.model.embed_tokens(ids)]
    plan, rope = masks.prepare(None, 2, 10, 10, ids.device), model.model.rope(10, 0, None)
    for layer in model.model.layers:
        stream.append(layer(stream[-1], rope, plan))
    loss, _ = model.lm_head(model.model.norm(stream[-1]), targets)
    gradients = torch.autograd.grad(loss, stream)
    assert found.activations == pytest.approx([h.norm(dim=-1).mean().item() for h in stream], rel=1e-5)
    assert found.gradients == pytest.approx([g.norm(dim=-1).mean().item() for g in gradients], rel=1e-5)
    assert found.activation_growth == pytest.approx(math.log(found.activations[3] / found.activations[0]) / 3)
    assert found.gradient_growth == pytest.approx(math.log(found.gradients[0] / found.gradients[3]) / 3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_largest_logit_is_that_of_what_attention_compares(monkeypatch) -> None:
    model, (ids, targets) = Llama(**SMALL, initializer_range=0.3).build(3), batch()
    found, seen = signals(model, ids, targets), []
    honest = masks.attend

    def attend(q, k, v, plan, scale=None, cap=None):
        seen.append(max(abs(float(q[b, h, i] @ k[b, h // 2, j])) / 8**0.5 for b in range(2) for h in range(4) for i in range(10) for j in range(i + 1)))
        return honest(q, k, v, plan, scale, cap)

    monkeypatch.setattr(masks, "attend", attend)
    with torch.no_grad():
        model(ids)
    assert found.attention == pytest.approx(seen, rel=1e-5) and found.largest_logit == max(found.attention)


def test_normalised_queries_do_not_care_how_large_their_matrix_is() -> None:
    """Up to the norm's epsilon, which is as good as none here."""
    for family, factor in ((Olmo2, 1.0), (Llama, 10.0)):
        model = family(**{**SMALL, "num_hidden_layers": 1, "rms_norm_eps": 1e-12}).build(4)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(100.0)
        before = signals(model, *batch()).largest_logit
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(10.0)
        assert signals(model, *batch()).largest_logit == pytest.approx(before * factor, rel=1e-4)
