"""Generation: equal to transformers' greedy search, to the uncached model, and blind to its batch mates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cairn import catalog
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.generation.cache import KeyValueCache
from cairn.generation.sample import choose, generate, generate_text, probabilities
from cairn.models.config import Architecture
from cairn.models.families.llama import Llama
from cairn.randomness import uniform

SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]


FAMILIES = [each for name in catalog.names("architecture") if issubclass(each := catalog.get("architecture", name).implementation, Architecture)]


def network(family: type[Architecture] = Llama, **more: Any) -> Any:
    """A small model; where the family has windows they are shorter than the texts."""
    window = {"sliding_window": 7} if "sliding_window" in family.model_fields else {}
    head = {"head_dim": 8} if "query_pre_attn_scalar" in family.model_fields else {}
    return family(**SIZES, max_position_embeddings=64, initializer_range=0.3, **window, **head, **more).build(0).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family: type[Architecture], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = network(family)
    (tmp_path / "config.json").write_text(json.dumps(model.architecture.to_hf()))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loop = {"experts_implementation": "eager"} if model.architecture.routed else {}
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **loop)
    assert not any(told.values()), told
    found = generate(model, PROMPTS, max_new_tokens=24, temperature=0)
    for prompt, new in zip(PROMPTS, found, strict=True):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert prompt + new == wanted[0].tolist()
        assert generate(theirs, prompt, max_new_tokens=6, temperature=0) == new[:6]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(FAMILIES))
@settings(max_examples=40, deadline=None)
def test_cached_logits_equal_uncached_ones_however_the_text_is_cut(pieces: list[int], family: type[Architecture]) -> None:
    model = network(family)
    ids = torch.randint(53, (2, sum(pieces)), generator=torch.Generator().manual_seed(len(pieces)))
    cache = KeyValueCache(model.architecture, 2, sum(pieces), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        found = torch.cat([model(part, cache=cache).logits for part in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert cache.length == cache.capacity == sum(pieces)
    with pytest.raises(InputError, match="room for"), torch.no_grad():
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.3, "top_p": 0.8}])
def test_a_prompt_gets_the_same_text_alone_and_in_any_batch(options: dict[str, Any]) -> None:
    model = network()
    together = generate(model, PROMPTS, max_new_tokens=20, seed=[3, 4, 5], **options)
    torch.manual_seed(0)
    for prompt, seed, new in zip(PROMPTS, (3, 4, 5), together, strict=True):
        assert generate(model, prompt, max_new_tokens=20, seed=seed, **options) == new
    assert generate(model, PROMPTS[::-1], max_new_tokens=20, seed=[5, 4, 3], **options) == together[::-1]


def test_seeds_matter_and_the_global_generator_does_not() -> None:
    model, prompt = network(), [1, 2, 3]
    state = torch.get_rng_state()
    first = generate(model, prompt, max_new_tokens=20, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert generate(model, prompt, max_new_tokens=20, seed=1) == first
    assert generate(model, prompt, max_new_tokens=20, seed=2) != first


def test_a_sequence_ends_at_its_end_token_and_others_go_on() -> None:
    model = network()
    whole = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    end = whole[0][4]
    cut = generate(model, PROMPTS, max_new_tokens=20, temperature=0, end_ids=[end])
    assert cut == [new[: new.index(end)] if end in new else new for new in whole]


def test_the_distribution_is_the_one_asked_for() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    whole = torch.softmax(logits.double() / 0.5, -1)
    torch.testing.assert_close(probabilities(logits, 0.5), whole)
    top = probabilities(logits, 0.5, top_k=2)
    torch.testing.assert_close(top[0, :2], whole[0, :2] / whole[0, :2].sum())
    assert top[0, 2:].tolist() == [0, 0]
    # 0.865 alone reaches 0.8; 0.9 needs the second.
    assert (probabilities(logits, 0.5, top_p=0.8) > 0).tolist() == [[True, False, False, False]]
    assert (probabilities(logits, 0.5, top_p=0.9) > 0).tolist() == [[True, True, False, False]]
    draws = uniform(1, range(20000)).tolist()
    counts = torch.tensor(choose(logits.expand(20000, 4), draws, 1.0, None, None)).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.softmax(logits[0], -1), rtol=0, atol=0.012)
    assert choose(torch.tensor([[0.0, float("-inf"), 0.0]]), [0.5], 1.0, None, None) == [2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 63}, "at most 61 new"),
        ({"seed": [1, 2]}, "2 seeds"),
        ({"prompt": []}, "no tokens"),
        ({"prompt": [99]}, "vocabulary ends at 52"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        generate(network(), **{"prompt": [1, 2, 3], "max_new_tokens": 5, **options})


def test_text_in_text_out() -> None:
    tokenizer = byte_level()
    model = Llama(vocab_size=257, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.2).build(0)
    new = generate(model, tokenizer.prompt("abc"), max_new_tokens=8, temperature=0, end_ids=[tokenizer.eos_id])
    assert generate_text(model, tokenizer, "abc", max_new_tokens=8, temperature=0) == tokenizer.decode(new)
    begun = generate(model, [tokenizer.eos_id], max_new_tokens=3, seed=1, end_ids=[tokenizer.eos_id])
    assert generate_text(model, tokenizer, "", max_new_tokens=3, seed=1) == tokenizer.decode(begun)


# -- numbers that are none ------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("logits", [[NAN, 1.0, 2.0], [1.0, INF, 2.0], [-INF, -INF, -INF]])
def test_what_is_not_finite_is_no_token(logits: list[float], temperature: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        choose(torch.tensor([[0.0, 1.0, 2.0], logits]), [0.5, 0.5], temperature, None, None)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (2, None), (None, 0.9)])
def test_a_model_whose_numbers_are_none_writes_nothing(top_k: int | None, top_p: float | None) -> None:
    model = network()
    model.model.norm.weight.data[0] = NAN
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="not finite"):
            generate(model, [[1, 2], [3]], max_new_tokens=3, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-12])
def test_a_temperature_next_to_zero_takes_the_most_probable_token(temperature: float) -> None:
    logits = torch.tensor([[3.0, 5.0, -INF, 4.999], [-1e30, 0.0, 1e30, 2.0]])
    assert choose(logits, [0.999, 0.0], temperature, None, None) == [1, 2]


def test_a_temperature_without_end_is_refused() -> None:
    for wrong in (INF, NAN, -1.0):
        with pytest.raises(InputError, match="temperature"):
            generate(network(), [1], temperature=wrong)


def test_the_largest_draw_takes_a_token_that_has_a_probability() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, -INF, -INF]]).repeat(2, 1)
    assert choose(logits, [1 - 2**-53, 1.0], 1.0, None, None) == [2, 2]


def test_of_tied_tokens_the_first_is_taken() -> None:
    assert choose(torch.zeros(2, 7), [0.3, 0.9], 0, None, None) == [0, 0]


# -- ends -----------------------------------------------------------------------------------------------------------


def test_each_of_several_ends_ends_a_sequence() -> None:
    model = network()
    whole = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    ends = {whole[0][3], whole[1][5]}
    cut = [ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))] for ids in whole]
    assert generate(model, PROMPTS, max_new_tokens=20, temperature=0, end_ids=ends) == cut
