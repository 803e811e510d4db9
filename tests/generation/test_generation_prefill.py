"""Prefilled caches against each prompt read alone, in every layer."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.errors import InputError
from cairn.generation.cache import KeyValueCache
from cairn.generation.prefill import plan, prefill
from cairn.generation.sample import generate
from cairn.models.families.llama import Llama
from cairn.models.families.mistral import Mistral
from cairn.models.families.olmo2 import Olmo2

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.3}
PROMPTS = [[1, 2, 3, 4, 5], [7], [1, 2, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 5], [1, 2, 3, 4, 5]]
WAYS = ("prepack", "pack", "pad", "one")
prompts_of = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=12)


def network(kind=Llama, groups=2):
    return kind(**SIZES, num_key_value_heads=groups, max_position_embeddings=64).build(seed=2).eval()


@pytest.mark.parametrize("batching", WAYS)
@pytest.mark.parametrize(("kind", "groups"), [(Llama, 4), (Llama, 2), (Olmo2, 1)])
def test_the_cache_of_every_layer_is_that_of_the_prompt_alone(batching, kind, groups):
    model = network(kind, groups)
    with torch.no_grad():
        filled = prefill(model, PROMPTS, 3, batching)
        for row, prompt in enumerate(PROMPTS):
            size = len(prompt) - 1
            alone = KeyValueCache(model.architecture, 1, max(size, 1), dtype=torch.float32, device="cpu")
            if size:
                model(torch.tensor([prompt[:-1]]), cache=alone)
            for kept, single in ((filled.cache.keys, alone.keys), (filled.cache.values, alone.values)):
                torch.testing.assert_close(kept[:, row, :, filled.length - size : filled.length], single[:, 0, :, :size], rtol=0, atol=1e-5)
    assert filled.length == max(map(len, PROMPTS)) - 1 and filled.cache.length == filled.length


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "top_k": 9}])
@pytest.mark.parametrize("kind", [Llama, functools.partial(Mistral, sliding_window=5)])
def test_all_ways_write_the_same(options, kind):
    model = network(kind)
    found = [generate(model, PROMPTS, max_new_tokens=12, batching=way, **options) for way in WAYS]
    assert all(each == found[0] for each in found) and found[0] == [generate(model, prompt, max_new_tokens=12, **options) for prompt in PROMPTS]


def test_prompts_of_one_token_have_nothing_to_read():
    model = network()
    with torch.no_grad():
        assert prefill(model, [[3], [4]], 2).processed == 0
    assert generate(model, [[3], [4]], max_new_tokens=4, temperature=0) == [generate(model, [p], max_new_tokens=4, temperature=0) for p in (3, 4)]


def test_a_way_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="one of prepack, pack, pad, one"):
        generate(network(), [[1, 2]], max_new_tokens=1, batching="padded")


@given(prompts_of)
@settings(max_examples=50)
def test_packing_reads_every_token_once_and_padding_to_the_longest(prompts):
    tokens = {way: sum(batch.tokens.size for batch in plan(prompts, way)) for way in WAYS}
    sizes = [len(prompt) - 1 for prompt in prompts]
    assert tokens["one"] == sum(sizes) <= tokens["pack"] <= max(tokens["pad"], sum(sizes))
    assert tokens["pad"] == max(sizes) * sum(size > 0 for size in sizes)
    for batch in plan(prompts, "pack"):
        assert all((batch.ends[row, path] == path[-1] + 1).all() for _, row, path in batch.places if len(path))


def test_a_sequence_that_is_told_to_stop_leaves_the_others_alone():
    model = network()
    whole = generate(model, PROMPTS, max_new_tokens=10, temperature=0)
    end = whole[0][3]
    cut = generate(model, PROMPTS, max_new_tokens=10, temperature=0, stop=lambda _, ids: ids[-1] == end)
    assert cut == [new[: new.index(end) + 1] if end in new else new for new in whole]
