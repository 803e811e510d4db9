"""BERT and RoBERTa equal transformers' models, train on masked tokens, and are never scored as if they were causal."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import cairn
from cairn.errors import InputError, MismatchError
from cairn.evaluation.reading import way_of
from cairn.generation.sample import generate
from cairn.models.anatomy import anatomy
from cairn.models.config import architecture
from cairn.models.families.bert import BertFamily
from cairn.models.families.roberta import RobertaFamily
from cairn.models.families.transformers import Transformers

FAMILIES = [BertFamily, RobertaFamily]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "max_position_embeddings": 40}


@st.composite
def encoders(draw: st.DrawFn) -> BertFamily:
    heads, size = draw(st.integers(1, 4)), draw(st.sampled_from([2, 5, 8]))
    return draw(st.sampled_from(FAMILIES))(
        vocab_size=draw(st.integers(8, 70)),
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 50)),
        max_position_embeddings=40,
        type_vocab_size=draw(st.integers(1, 3)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 1e-3])),
        initializer_range=draw(st.sampled_from([0.02, 0.3])),
        pad_token_id=draw(st.integers(0, 5)),
    )


def shaken(a: BertFamily, seed: int):
    """A network whose biases and norms are not at their initial values either."""
    model, generator = a.build(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def theirs(a: BertFamily, weights):
    """The transformers model of the same weights; every name must fit, and what is tied is tied."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**a.to_hf())
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    head = "cls.predictions" if a.model_type == "bert" else "lm_head"
    assert not unexpected and set(missing) <= {f"{head}.decoder.weight", f"{head}.decoder.bias"}
    with torch.no_grad():
        model.get_submodule(f"{head}.decoder").bias.copy_(weights[f"{head}.bias"])
    return model


@given(encoders(), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_logits_counts_and_operations_are_those_of_transformers(a: BertFamily, length: int, seed: int) -> None:
    model, generator = shaken(a, seed), torch.Generator().manual_seed(seed)
    ids = torch.randint(a.vocab_size, (2, length), generator=generator)  # padding's own id among them
    with torch.no_grad():
        ours, reference = model(ids).logits, theirs(a, model.state_dict())(ids).logits
    assert (ours - reference).abs().max() < 1e-5 * max(1.0, reference.abs().max().item())
    assert a.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    assert architecture(a.to_hf()).to_hf() == a.to_hf()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        a.meta_model()(torch.zeros(1, length, dtype=torch.int64))
    assert counter.get_total_flops() == a.matmul_flops(length)


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_of_the_positions_that_are_asked_for_and_its_gradients_are_those_of_transformers(kind) -> None:
    a = kind(vocab_size=61, **SIZES)
    model = shaken(a, 1)
    reference = theirs(a, model.state_dict())
    ids = torch.randint(6, 61, (3, 20), generator=torch.Generator().manual_seed(0))
    weights = (torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    found = model(ids, targets=ids, weights=weights)
    (found.loss / weights.sum()).backward()
    wanted = reference(ids, labels=torch.where(weights > 0, ids, -100))
    wanted.loss.backward()
    torch.testing.assert_close(found.loss / weights.sum(), wanted.loss)
    known = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected = known[name].grad
        if name in ("cls.predictions.bias", "lm_head.bias"):  # theirs has it twice
            expected = sum(g for key, p in known.items() if key.endswith("decoder.bias") or key == name for g in [p.grad] if g is not None)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)
    each = model(ids, targets=ids, each=True).token_loss
    torch.testing.assert_close(found.token_loss, each.detach() * weights)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_checkpoint_of_transformers_opens_here_and_one_from_here_there(kind, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    a = kind(vocab_size=61, **SIZES)
    torch.manual_seed(0)
    reference = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**a.to_hf())).eval()
    reference.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(8, 28)[None]
    opened = cairn.open(tmp_path / "theirs").model()
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(a.to_hf()))
    save_file(opened.state_dict(), tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    back, told = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    parts = anatomy(opened)
    assert len(parts.blocks) == 2 and parts.tied and all(len(block.matrices()) == 6 for block in parts.blocks)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoder_is_never_scored_or_continued_as_a_causal_model(kind, small_recipe, tmp_path) -> None:
    a = kind(vocab_size=300, **SIZES)
    model = a.build(0).eval()
    for act in (lambda: way_of(model), lambda: generate(model, [[5, 6]], max_new_tokens=1)):
        with pytest.raises(InputError, match="reads a text in both directions"):
            act()
    recipe = {**small_recipe, "model": {"name": a.model_type, **SIZES}, "callbacks": []}
    for objective in ("causal-lm", "prefix-lm", "span-corruption"):
        with pytest.raises(InputError, match="use objective=mlm"):
            cairn.train(recipe, tmp_path / objective, [f"objective={objective}"])
    with pytest.raises(MismatchError, match="is_decoder"):
        kind.from_hf({**a.to_hf(), "is_decoder": True})


def test_positions_before_a_text_are_counted_and_other_encoders_are_no_causal_models(small_recipe, tmp_path) -> None:
    recipe = {**small_recipe, "model": {"name": "roberta", **SIZES, "max_position_embeddings": 33}, "objective": "mlm", "callbacks": []}
    with pytest.raises(InputError, match="less the 2 before a text"):
        cairn.train(recipe, tmp_path / "run")
    with pytest.raises(MismatchError, match="no causal language model"):
        Transformers.from_hf({"model_type": "electra", "architectures": ["ElectraForMaskedLM"], "vocab_size": 9})


@pytest.mark.parametrize("kind", FAMILIES)
def test_masked_tokens_are_learned_and_a_run_is_resumed(kind, small_recipe, tmp_path) -> None:
    recipe = {**small_recipe, "model": {"name": kind.model_type, **SIZES}, "objective": "mlm", "callbacks": [], "checkpoint": {"every": "6 steps"}}
    settings = ["training.tokens=12 steps", "optimizer.lr=1e-2", "training.compile=false"]
    whole = cairn.train(recipe, tmp_path / "whole", settings)
    losses = [row["loss"] for row in whole.metrics()]
    assert losses[-1] < losses[0]
    run = cairn.train(recipe, tmp_path / "run", settings, stop_at_step=6)
    assert cairn.resume(run.path).newest().digest == whole.newest().digest
    transformers = pytest.importorskip("transformers")
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(whole.newest().path)).__name__ == kind.hf_class
