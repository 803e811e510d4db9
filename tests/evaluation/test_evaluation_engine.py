"""The engine against each text read alone, by our models and by several families of transformers."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.evaluation.engine import Engine, engine_of, share
from cairn.generation import prepack
from cairn.models.families.gemma2 import Gemma2
from cairn.models.families.llama import Llama
from cairn.models.families.mistral import Mistral
from cairn.models.families.olmo2 import Olmo2

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
texts_of = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=25)


def ours(kind=Llama, **more):
    return kind(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512, **more}).build(seed=1).eval()


def foreign(name):
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    make = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**small, intermediate_size=64, max_position_embeddings=512),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=260,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            init_std=0.3,
            word_embed_proj_dim=32,
            max_position_embeddings=512,
        ),
        "bloom": lambda: transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        "gemma2": lambda: transformers.Gemma2Config(
            **small, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, max_position_embeddings=512
        ),
        "mamba": lambda: transformers.MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3),
    }[name]
    return transformers.AutoModelForCausalLM.from_config(make()).eval()


def alone(model, ids, start):
    """Log-probabilities of ids[start:], the text read by itself as far as it must be, and whether each is the most probable."""
    if len(ids) < 2:
        return [], []
    with torch.no_grad():
        ids_in = torch.tensor([ids[:-1]])
        logits = (model(ids_in) if hasattr(model, "architecture") else model(input_ids=ids_in, use_cache=False)).logits[0].double()
    logs = logits.log_softmax(-1)
    return [logs[i - 1, ids[i]].item() for i in range(start, len(ids))], [logits[i - 1].argmax().item() == ids[i] for i in range(start, len(ids))]


def requests(seed=0, count=40, longest=60):
    """Texts of which many share beginnings, some are equal and one has a single token."""
    chooser = np.random.default_rng(seed)
    trunks = [chooser.integers(0, 256, chooser.integers(0, longest)).tolist() for _ in range(6)]
    found = [trunks[chooser.integers(6)] + chooser.integers(0, 256, chooser.integers(1, 12)).tolist() for _ in range(count)]
    found += [found[0], [*found[1][:-1], 7], [5]]
    starts = [int(chooser.integers(1, max(2, len(text)))) for text in found]
    return found, starts


def check(model, engine, texts, starts):
    for text, start, scored in zip(texts, starts, engine.score(texts, starts), strict=True):
        logs, greedy = alone(model, text, start)
        assert scored.logprob == pytest.approx(math.fsum(logs), abs=1e-5 * max(1, len(logs), abs(math.fsum(logs))))
        assert (scored.greedy, scored.tokens) == (all(greedy), len(text) - start if len(text) > 1 else 0)


@pytest.mark.parametrize("kind", [Llama, Olmo2, functools.partial(Mistral, sliding_window=6), functools.partial(Gemma2, head_dim=8, sliding_window=6)])
@pytest.mark.parametrize(("budget", "rows"), [(1, 1), (100, 16), (8192, 128)])
def test_every_answer_is_that_of_the_text_alone(kind, budget, rows):
    model = ours(kind)
    check(model, Engine(model, budget_tokens=budget, row_tokens=rows), *requests())


@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}])
def test_rope_that_depends_on_length_is_given_the_length_of_each_text(scaling):
    model = ours(rope_scaling=scaling | {"original_max_position_embeddings": 24}, max_position_embeddings=24 if scaling["rope_type"] == "dynamic" else 96)
    check(model, Engine(model), *requests())


@pytest.mark.parametrize(("family", "packs"), [("gpt2", True), ("gpt_neox", True), ("gemma2", True), ("opt", None), ("bloom", False), ("mamba", False)])
def test_families_of_transformers_are_packed_where_that_is_right_and_only_there(family, packs):
    model = foreign(family)
    engine = Engine(model)
    assert packs is None or engine.way.packs == packs
    check(model, engine, *requests(count=20, longest=40))


def test_a_family_that_ignores_the_mask_is_found_out():
    """A model that looks at everything before it, whatever it is told, must not be packed."""
    model = foreign("gpt2")
    deaf = model.transformer.forward
    model.transformer.forward = lambda *a, attention_mask=None, **k: deaf(*a, **k)
    engine = Engine(model)
    assert not engine.way.packs
    check(model, engine, *requests(count=10))


def test_neighbours_and_order_change_nothing():
    model = ours()
    texts, starts = requests()
    first = Engine(model).score(texts, starts)
    backwards = Engine(model).score(texts[::-1], starts[::-1])[::-1]
    others = Engine(model).score([texts[0], *requests(seed=9)[0]], [starts[0], *requests(seed=9)[1]])
    assert [s.logprob for s in backwards] == pytest.approx([s.logprob for s in first], abs=1e-4)
    assert others[0].logprob == pytest.approx(first[0].logprob, abs=1e-4)


@given(texts_of)
@settings(max_examples=60)
def test_trees_hold_every_text_once_and_no_distinct_beginning_twice_in_a_run(texts):
    forest = prepack.trees(texts)
    assert sorted(i for tree in forest for i in tree.texts) == list(range(len(texts)))
    for tree in forest:
        for number, path in zip(tree.texts, tree.paths, strict=True):
            assert tree.tokens[path].tolist() == texts[number] and tree.depths[path].tolist() == list(range(len(texts[number])))
            for place, column in enumerate(path):
                ancestors = [k for k in range(len(tree)) if k <= column < tree.ends[k]]
                assert ancestors == path[: place + 1].tolist()
    beginnings = {tuple(text[: i + 1]) for text in texts for i in range(len(text))}
    assert prepack.distinct(texts) == len(beginnings) <= sum(map(len, forest))


@given(texts_of, st.integers(1, 60), st.integers(1, 40), st.booleans())
@settings(max_examples=60)
def test_batches_hold_every_tree_once_within_the_budget(texts, budget, rows, pack):
    forest = prepack.trees(texts)
    found = list(prepack.batches(forest, budget, rows, pack=pack))
    places = [(text, batch.tokens[row, path].tolist()) for batch in found for text, row, path in batch.places]
    assert sorted(places) == [(i, text) for i, text in enumerate(texts)]
    assert all(batch.tokens.size <= max(budget, batch.tokens.shape[1]) for batch in found)
    for batch in found:
        assert (batch.ends > np.arange(batch.tokens.shape[1])).all()  # every position sees itself: no softmax over nothing
        assert pack or len(batch.places) == 0 or all(len({row for t, row, _ in batch.places if t in tree.texts}) <= 1 for tree in forest)


def test_few_tokens_are_read_beyond_the_distinct_beginnings():
    texts, _ = requests(count=300)
    model = ours()
    engine = Engine(model)
    engine.score(texts)
    distinct = prepack.distinct([text[:-1] for text in texts])
    assert distinct <= engine.processed <= 1.12 * distinct < 0.8 * sum(len(text) - 1 for text in texts)
    before = engine.processed
    engine.score(texts[:50])
    assert engine.processed == before


def test_words_are_split_as_in_the_harness_and_begin_a_document():
    model, tokenizer = ours(), byte_level()
    engine = Engine(model, tokenizer)
    pairs = [("a stone ", "marks"), ("a stone", " marks"), ("", "way"), ("x", "y")]
    sequences, starts = engine.encode(pairs)
    assert sequences[0] == sequences[1] == [tokenizer.eos_id, *tokenizer.encode("a stone marks")] and starts[0] == starts[1] == 8
    assert engine.loglikelihood(pairs) == engine.score(sequences, starts)
    assert engine.encode([("ab", "c")], begin=False) == ([tokenizer.encode("abc")], [2])
    assert starts[2] == 1


def test_a_long_context_is_cut_on_its_left_and_a_long_continuation_refused():
    model = ours(max_position_embeddings=16)
    text = np.random.default_rng(0).integers(0, 256, 40).tolist()
    assert Engine(model).score([text], [38])[0].logprob == pytest.approx(sum(alone(model, text[-17:], 15)[0]), abs=1e-4)
    with pytest.raises(InputError, match="rolling"):
        Engine(model).score([text], [2])
    pieces = [(text[:17], 1), (text[16:33], 1), (text[23:], 10)]
    found = Engine(model).score_rolling([text, [3]])
    assert found[0].logprob == pytest.approx(sum(sum(alone(model, *piece)[0]) for piece in pieces), abs=1e-4)
    assert found[0].tokens == 39 and found[1] == (0.0, True, 0)


def test_token_scores_are_the_terms_of_the_sum():
    model = ours()
    texts, starts = requests(count=5)
    for text, start, terms in zip(texts, starts, Engine(model).token_scores(texts, starts), strict=True):
        assert terms.tolist() == pytest.approx(alone(model, text, start)[0], abs=1e-4)


@pytest.mark.parametrize("model", [ours(), foreign("gpt2")], ids=["ours", "gpt2"])
def test_generation_stops_where_it_is_told_and_does_not_depend_on_company(model):
    tokenizer = byte_level()
    prompts = ["a stone on the trail", "a stone", "x", "the way that was walked before"]
    engine = Engine(model, tokenizer)
    whole = engine.generate(prompts, max_new_tokens=12)
    assert [Engine(model, tokenizer, budget_tokens=1).generate([p], max_new_tokens=12)[0] for p in prompts] == whole
    stop = whole[0][5]
    assert engine.generate(prompts, max_new_tokens=12, stop=[stop]) == [text.split(stop)[0] for text in whole]


def test_a_shared_engine_lasts_as_long_as_its_model_and_others_are_fresh():
    model, other = ours(), ours()
    assert share(model) is engine_of(model) is engine_of(model)
    assert engine_of(other) is not engine_of(other)
