"""The decoder equals transformers' models, and is a pure function of its weights and inputs."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models_drawing import CONTEXT, DECODERS, SIZES_OF, architectures

from cairn import catalog
from cairn.models import masks
from cairn.models.config import Architecture
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def theirs(a: Architecture, weights: dict[str, torch.Tensor]) -> Any:
    """The transformers model of the same weights; every name must fit."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**a.to_hf())
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    # transformers calls this head lm_head in memory and embed_out in files.
    weights = stacked({name.replace("embed_out.", "lm_head."): weight for name, weight in weights.items()})
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if a.tie_word_embeddings else set())
    return model


def stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as transformers has them in memory: all of a layer in one tensor, gate before up. Other tensors stay as they are."""
    found, experts = {}, {}
    for name, weight in weights.items():
        parts = name.replace("block_sparse_moe", "mlp").split(".")
        if "experts" not in parts:
            found[".".join(parts)] = weight
            continue
        *front, number, matrix, _ = parts
        experts.setdefault(".".join(front), {}).setdefault(int(number), {})[{"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix, matrix)] = (
            weight
        )
    for name, numbered in experts.items():
        ordered = [numbered[i] for i in range(len(numbered))]
        found[f"{name}.gate_up_proj"] = torch.stack([torch.cat((each["gate_proj"], each["up_proj"])) for each in ordered])
        found[f"{name}.down_proj"] = torch.stack([each["down_proj"] for each in ordered])
    return found


def shaken(a: Architecture, seed: int) -> Any:
    """A network whose biases and norms are not at their initial values either."""
    model = a.build(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(a: Architecture, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(a.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@given(architectures(), st.integers(1, CONTEXT), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_logits_equal_those_of_transformers(a: Architecture, length: int, seed: int) -> None:
    model = shaken(a, seed)
    ids = tokens(a, 2, length, seed)
    with torch.no_grad():
        ours, reference = model(ids).logits, theirs(a, model.state_dict())(ids).logits
    # Wide initialisations make logits beyond 1, whose rounding is relative.
    assert (ours - reference).abs().max() < 1e-5 * max(1.0, reference.abs().max().item())


def test_dynamic_rope_beyond_the_trained_length_equals_transformers() -> None:
    a = Llama(**{**SMALL, "max_position_embeddings": 16}, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    model, ids = a.build(0), tokens(a, 2, 40)
    with torch.no_grad():
        assert (model(ids).logits - theirs(a, model.state_dict())(ids).logits).abs().max() < 1e-5


def small(name: str) -> Any:
    """A small architecture of a family; where it has windows they are shorter than the texts."""
    family = DECODERS[name]
    if name in SIZES_OF:
        return family(vocab_size=61, tie_word_embeddings=True, **dict(zip(SIZES_OF[name], (32, 4, 2, 64, 40), strict=True)))
    window = {"sliding_window": 7} if "sliding_window" in family.model_fields else {}
    head = {"head_dim": 8} if name.startswith("gemma") else {}
    return family(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, **window, **head)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_gradients_equal_those_of_transformers(name: str) -> None:
    a = small(name)
    model, ids = a.build(3), tokens(a, 3, 20)
    reference = theirs(a, model.state_dict())
    (model(ids[:, :-1], targets=ids[:, 1:]).loss / (3 * 19)).backward()
    reference(ids, labels=ids).loss.backward()
    found = stacked({name: parameter.grad for name, parameter in model.named_parameters()})
    for key, parameter in reference.named_parameters():
        if key != "lm_head.weight" or not a.tie_word_embeddings:
            torch.testing.assert_close(
                found[key.replace("lm_head.", "embed_out.") if name == "gpt_neox" else key], parameter.grad, rtol=1e-4, atol=1e-6, msg=key
            )
    assert len(found) >= len(list(reference.parameters()))


def test_loss_is_the_weighted_sum_with_z_loss() -> None:
    a = Llama(**SMALL)
    model, ids = a.build(0), tokens(a, 2, 9)
    weights = torch.rand(2, 8)
    output = model(ids[:, :-1], targets=ids[:, 1:], weights=weights, z_loss=0.3, logits="all")
    nll = F.cross_entropy(output.logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(output.token_loss, nll)
    torch.testing.assert_close(output.loss, (weights * (nll + 0.3 * output.logits.logsumexp(-1) ** 2)).sum())
    assert not output.token_loss.requires_grad
    assert model(ids, logits="last").logits.shape == (2, 1, 61) and model(ids, targets=ids).logits is None
    torch.testing.assert_close(model.lm_head(model.hidden(ids)), model(ids).logits)


def test_documents_in_one_window_do_not_see_each_other() -> None:
    a = Llama(**SMALL)
    model, ids = a.build(0), tokens(a, 1, 20)
    documents = torch.tensor([[0] * 7 + [1] * 13])
    with torch.no_grad():
        packed = model(ids, mask=masks.document(documents)).logits
        # Rope is relative, so the second document alone gives the same logits from position 0.
        torch.testing.assert_close(packed[:, :7], model(ids[:, :7]).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(packed[:, 7:], model(ids[:, 7:]).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            packed, model(ids, mask=masks.document(documents), positions=torch.tensor([[*range(7), *range(13)]])).logits, rtol=0, atol=1e-5
        )
        assert (packed - model(ids).logits).abs().max() > 1e-3


def test_the_future_and_masked_documents_get_no_gradient() -> None:
    a = Olmo2(**SMALL)
    model, ids = a.build(0), tokens(a, 1, 12)
    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(o) or o.retain_grad())
    model(ids, mask=masks.document(torch.tensor([[0] * 5 + [1] * 7]))).logits[0, 8].sum().backward()
    touched = seen[0].grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [False] * 5 + [True] * 4 + [False] * 3


def test_building_is_a_function_of_the_seed_alone() -> None:
    a = Llama(**SMALL)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = a.build(7).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = a.build(7).state_dict(), a.build(8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], first["model.layers.1.mlp.up_proj.weight"])
    # A parameter's values do not depend on what else the model has.
    deeper = Llama(**{**SMALL, "num_hidden_layers": 4}).build(7).state_dict()
    assert all(torch.equal(first[name], deeper[name]) for name in first)
    assert all(torch.equal(value, torch.ones_like(value)) for name, value in first.items() if "norm" in name)
    drawn = torch.cat([v.flatten() for v in first.values() if v.ndim == 2])
    assert abs(drawn.std().item() - 0.02) < 5e-4 and abs(drawn.mean().item()) < 5e-4


def test_tied_weights_stay_one_tensor_through_moves_copies_and_state_dicts() -> None:
    a = Llama(**SMALL, tie_word_embeddings=True)
    model = a.build(0)
    for moved in (model, copy.deepcopy(model).to(torch.float64), copy.deepcopy(model), a.meta_model().to_empty(device="cpu")):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight
    state = model.state_dict()
    assert "lm_head.weight" not in state and set(state) == {n for n, _ in model.named_parameters()}
    other = a.build(1)
    other.load_state_dict(state)
    torch.testing.assert_close(other.lm_head.weight, state["model.embed_tokens.weight"])
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_rope_tables_stay_float32_and_survive_empty_allocation() -> None:
    a = Llama(**SMALL)
    built = a.build(0, dtype=torch.bfloat16)
    assert built.model.rope.cos.dtype == torch.float32 and built.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(built.model.rope.sin, a.meta_model().to_empty(device="cpu").model.rope.sin, rtol=0, atol=0)
    assert not any("rope" in name for name in built.state_dict())


def steps(a: Architecture, backend: str, precision: torch.dtype) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Loss and gradients of one step of the same network, eager and compiled as one graph."""
    model, ids = a.build(0), tokens(a, 2, 32)
    documents = masks.document((torch.arange(32) // 9)[None].repeat(2, 1))
    inputs = {"mask": documents, "targets": ids, "weights": torch.linspace(0, 1, 64).view(2, 32), "z_loss": 1e-3}
    found = []
    for run in (model, torch.compile(model, dynamic=False, fullgraph=True, backend=backend)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            loss = run(ids, **inputs).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("family", [Llama, Olmo2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_traced_without_a_graph_break(family: type[Architecture], precision: torch.dtype) -> None:
    eager, traced = steps(family(**SMALL, num_key_value_heads=2), "aot_eager", precision)
    torch.testing.assert_close(eager, traced, **({"rtol": 1e-4, "atol": 1e-4} if precision is torch.float32 else {"rtol": 0.05, "atol": 0.2}))


@pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler for torch.compile")
def test_compiled_equals_eager() -> None:
    eager, compiled = steps(Llama(**{**SMALL, "num_hidden_layers": 1}, num_key_value_heads=2), "inductor", torch.float32)
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)


def test_a_truncated_start_never_leaves_its_bounds_and_is_the_normal_one_inside() -> None:
    """OLMo 2's: three standard deviations of 0.02, for every matrix, embedding and residual outputs alike."""
    a = Olmo2(**{**SMALL, "vocab_size": 4000, "hidden_size": 64})
    matrices = {name: p for name, p in a.build(3).named_parameters() if p.ndim == 2}
    assert max(p.abs().max().item() for p in matrices.values()) <= 0.06
    spread = torch.cat([p.flatten() for p in matrices.values()]).std().item()
    # Variance of a standard normal distribution truncated at 3: 1 - 2 * 3 * phi(3) / (Phi(3) - Phi(-3)).
    assert spread == pytest.approx(0.02 * 0.97333**0.5, rel=5e-3)
    wild = a.model_copy(update={"initializer_cutoff": None}).build(3)
    assert max(p.abs().max().item() for p in wild.parameters() if p.ndim == 2) > 0.06
    assert "initializer_cutoff" not in a.to_hf()


FAMILIES = [name for name in catalog.names("architecture") if issubclass(catalog.get("architecture", name).implementation, Architecture)]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_in_a_lower_precision_it_rounds_where_transformers_rounds(family: str, heads: int, length: int, precision: torch.dtype) -> None:
    """The same bits, so the same argmax: norms, angles of rope and attention round at the same places, family by family."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": heads, "head_dim": 16}
    if family == "olmoe":
        sizes["head_dim"] = None
    a = catalog.get("architecture", family).implementation(vocab_size=331, initializer_range=0.2, **sizes)
    ours = a.build(5)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    # Transformers' other ways to compute experts round elsewhere.
    loop = {"experts_implementation": "eager"} if a.routed else {}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**a.to_hf()), dtype=precision, **loop).eval()
    ours = ours.to(precision)
    theirs.load_state_dict(stacked(ours.state_dict()), strict=not a.tie_word_embeddings)
    ids = torch.randint(0, 331, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = ours(ids).logits, theirs(ids).logits
    assert torch.equal(one.argmax(-1), two.argmax(-1))
    # Capped attention is two products of matrices, whose sums of float16 depend on how heads that share keys are laid out.
    slack = 2**-8 if a.attention_cap is not None and precision == torch.float16 else 0
    torch.testing.assert_close(one, two, rtol=0, atol=slack)
