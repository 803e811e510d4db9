"""The encoder-decoder equals transformers' T5 and UMT5, counts itself right, and reads what was read once."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cairn.models import masks
from cairn.models.config import architecture
from cairn.models.families.t5 import T5
from cairn.models.families.umt5 import UMT5

SMALL = {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}


@st.composite
def families(draw: st.DrawFn) -> T5:
    kind = draw(st.sampled_from([T5, UMT5]))
    return kind(
        vocab_size=draw(st.integers(5, 90)),
        d_model=draw(st.sampled_from([8, 20, 32])),
        d_kv=draw(st.sampled_from([4, 7])),
        d_ff=draw(st.integers(1, 60)),
        num_layers=draw(st.integers(1, 3)),
        num_decoder_layers=draw(st.sampled_from([None, 1, 2])),
        num_heads=draw(st.integers(1, 4)),
        relative_attention_num_buckets=draw(st.sampled_from([4, 8, 32])),
        relative_attention_max_distance=draw(st.sampled_from([20, 128])),
        layer_norm_epsilon=draw(st.sampled_from([1e-6, 1e-3])),
        feed_forward_proj=draw(st.sampled_from(["relu", "gated-gelu", "gated-silu"])),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def theirs(a: T5, weights: dict[str, torch.Tensor]) -> Any:
    """The transformers model of the same weights; every name must fit."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**a.to_hf())
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    if not a.tie_word_embeddings:  # transformers ties a model that it makes itself; what it loads from files it leaves apart
        model.lm_head.weight = torch.nn.Parameter(torch.empty(a.vocab_size, a.d_model))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    return model


def tokens(a: T5, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(a.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@given(families(), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_logits_equal_those_of_transformers(a: T5, inputs: int, targets: int, seed: int) -> None:
    model, read, said = a.build(seed), tokens(a, 2, inputs, seed), tokens(a, 2, targets, seed + 1)
    valid = torch.arange(inputs) < torch.tensor([[inputs], [max(1, inputs // 2)]])
    given_masks = {"encoder_mask": masks.padded(valid, within=masks.full()), "cross": masks.cross(valid)}
    with torch.no_grad():
        ours = model(read, decoder_input_ids=said, **given_masks).logits
        reference = theirs(a, model.state_dict())(input_ids=read, attention_mask=valid.long(), decoder_input_ids=said).logits
    # Logits of wide models are beyond 1, whose rounding is relative.
    assert (ours - reference).abs().max() < 1e-5 * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("family", [T5, UMT5])
def test_gradients_equal_those_of_transformers(family: type[T5]) -> None:
    a = family(**SMALL, feed_forward_proj="gated-gelu", pad_token_id=0, decoder_start_token_id=0)
    model, read, said = a.build(3), tokens(a, 3, 20), tokens(a, 3, 9, 1)
    reference = theirs(a, model.state_dict())
    before = torch.cat([torch.zeros(3, 1, dtype=torch.int64), said[:, :-1]], 1)
    (model(read, decoder_input_ids=before, targets=said).loss / 27).backward()
    reference(input_ids=read, labels=said).loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@given(families())
@settings(max_examples=40, deadline=None)
def test_parameters_and_config_by_closed_form(a: T5) -> None:
    assert a.parameter_count() == sum(p.numel() for p in a.meta_model().parameters())
    assert architecture(a.to_hf()).meta_model().state_dict().keys() == a.meta_model().state_dict().keys()
    assert architecture(a.to_hf()).scaled == a.scaled


@given(families(), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_operations_equal_those_that_torch_counts(a: T5, inputs: int, targets: int) -> None:
    model, read, said = a.build(0), tokens(a, 1, inputs), tokens(a, 1, targets)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(read, decoder_input_ids=said)
    counted = counter.get_total_flops()
    # What torch does not see inside of (scaled dot products on a CPU) is added by hand.
    attention = 4 * a.num_heads * a.d_kv * (a.num_layers * inputs**2 + a.num_hidden_layers * (targets**2 + inputs * targets))
    assert a.pair_flops(inputs, targets, causal=False) in (counted, counted + attention)


def test_published_sizes() -> None:
    grid = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
    assert T5(**grid).parameter_count() == 11_003_736_064  # "What Language Model Architecture ...", the comment in its configuration
    assert T5().parameter_count() == 60_506_624  # t5-small
    small_1_1 = T5(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    assert small_1_1.parameter_count() == 76_961_152


@pytest.mark.parametrize("family", [T5, UMT5])
def test_initial_weights_have_the_spread_that_transformers_gives_them(family: type[T5]) -> None:
    a = family(vocab_size=400, d_model=96, d_kv=32, d_ff=160, num_layers=1, num_heads=5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = a.build(0)
    reference = dict(theirs(a, copy.deepcopy(model.state_dict())).apply(lambda m: None).named_parameters())
    transformers = pytest.importorskip("transformers")
    fresh = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**a.to_hf()))
    for name, parameter in fresh.named_parameters():
        if parameter.ndim == 2 and parameter.numel() > 10_000:
            assert model.state_dict()[name].std() == pytest.approx(parameter.std().item(), rel=0.05), name
    assert torch.equal(a.build(0).shared.weight, reference["shared.weight"])


@pytest.mark.parametrize("family", [T5, UMT5])
def test_what_was_read_is_read_once_and_the_rest_comes_from_the_cache(family: type[T5]) -> None:
    from cairn.generation.cache import KeyValueCache

    a = family(**SMALL)
    model, read, said = a.build(0).eval(), tokens(a, 2, 17), tokens(a, 2, 9, 1)
    cache = KeyValueCache(a, 2, 9, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        whole = model(read, decoder_input_ids=said).logits
        seen = model.remember(model.encode(read))
        steps = [model(None, decoder_input_ids=said[:, [i]], read=seen, cache=cache).logits for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-5)


def test_packed_pairs_read_as_if_each_were_alone() -> None:
    a = T5(**SMALL)
    model, read, said = a.build(0), tokens(a, 1, 20), tokens(a, 1, 12, 1)
    of_read, of_said = torch.tensor([[0] * 8 + [1] * 9 + [-1] * 3]), torch.tensor([[0] * 5 + [1] * 7])
    packed = {
        "encoder_mask": masks.document(of_read, within=masks.full()),
        "mask": masks.document(of_said),
        "cross": masks.cross(of_read >= 0, of_said, of_read),
    }
    with torch.no_grad():
        together = model(read, decoder_input_ids=said, **packed).logits
        alone = [model(read[:, a:b], decoder_input_ids=said[:, c:d]).logits for a, b, c, d in ((0, 8, 0, 5), (8, 17, 5, 12))]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=2e-5)


def test_a_checkpoint_of_transformers_opens_and_ours_opens_there(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    from cairn.checkpoint.format import read

    for tied in (True, False):
        a = T5(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=tied, pad_token_id=0, decoder_start_token_id=0)
        folder = tmp_path / str(tied)
        folder.mkdir()
        model = a.build(5)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(a.to_hf()))
        ids, said = tokens(a, 1, 6), tokens(a, 1, 4)
        with torch.no_grad():
            opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
            there = opened(input_ids=ids, decoder_input_ids=said).logits
            torch.testing.assert_close(there, read.open(folder).model()(ids, decoder_input_ids=said).logits, rtol=0, atol=1e-5)
        if tied:
            opened.save_pretrained(tmp_path / "theirs")
            with torch.no_grad():
                back = read.open(tmp_path / "theirs").model()(ids, decoder_input_ids=said).logits
            torch.testing.assert_close(there, back, rtol=0, atol=1e-5)


def test_the_embedding_under_its_other_names_is_passed_over(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from cairn.checkpoint.format import read
    from cairn.errors import MismatchError

    a = T5(**SMALL)
    weights = a.build(5).state_dict()
    more = {name: weights["shared.weight"].clone() for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
    (tmp_path / "config.json").write_text(json.dumps(a.to_hf()))
    save_file({**weights, **more}, tmp_path / "model.safetensors")
    assert torch.equal(read.open(tmp_path).model().shared.weight, weights["shared.weight"])
    save_file({**weights, "strange.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match=r"'strange\.weight'"):
        read.open(tmp_path).model()


def test_bfloat16_autocast_stays_near_float32() -> None:
    a = T5(**SMALL)
    model, ids, said = a.build(0), tokens(a, 2, 8), tokens(a, 2, 5)
    plain = model(ids, decoder_input_ids=said, targets=said).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids, decoder_input_ids=said, targets=said).loss
    low.backward()
    assert low.item() == pytest.approx(plain.item(), rel=0.05)
    assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [T5, UMT5])
@pytest.mark.parametrize("tied", [True, False])
def test_kept_in_a_lower_precision_it_rounds_where_transformers_rounds(family: type[T5], tied: bool, precision: torch.dtype) -> None:
    """The same bits, so the same argmax."""
    transformers = pytest.importorskip("transformers")
    kind = "relu" if tied else "gated-gelu"
    a = family(vocab_size=331, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4, feed_forward_proj=kind, tie_word_embeddings=tied)
    ours = a.build(5).to(precision).eval()
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**a.to_hf()), dtype=precision).eval()
    if not tied:  # transformers ties a model that it makes itself; what it loads from files it leaves apart
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    drawn = torch.Generator().manual_seed(0)
    ids, told = (torch.randint(0, 331, (2, length), generator=drawn) for length in (23, 9))
    with torch.no_grad():
        one, two = ours(ids, decoder_input_ids=told).logits, theirs(input_ids=ids, decoder_input_ids=told).logits
    assert torch.equal(one.argmax(-1), two.argmax(-1))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
