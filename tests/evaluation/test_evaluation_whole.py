"""Scores of models that read a context in both directions: those of each request alone, whatever shares its pass."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.data.text.tokenizer import byte_level
from cairn.evaluation import measure
from cairn.evaluation.choices import Item, judged
from cairn.evaluation.engine import Engine
from cairn.evaluation.scoring import log_likelihoods
from cairn.models import masks
from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5
from cairn.training.run import train

PREFIX = Llama(vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2, attention="prefix")
PAIR = T5(vocab_size=300, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, eos_token_id=256, pad_token_id=256, decoder_start_token_id=256)
MODELS = [PREFIX.build(2).eval(), PAIR.build(2).eval()]
REQUESTS = st.lists(st.tuples(st.lists(st.integers(0, 255), max_size=9), st.lists(st.integers(0, 255), min_size=1, max_size=9)), min_size=1, max_size=7)


def alone(model, context: list[int], continuation: list[int]) -> float:
    """The sum of log-probabilities, from a pass for this request."""
    with torch.no_grad():
        if model.architecture.encoder_decoder:
            logits = model(torch.tensor([[*context, 256]]), decoder_input_ids=torch.tensor([[256, *continuation[:-1]]])).logits[0]
        else:
            ids = torch.tensor([[256, *context, *continuation[:-1]]])
            logits = model(ids, mask=masks.prefix(torch.tensor([len(context) + 1]))).logits[0, len(context) :]
        return float(logits.log_softmax(-1)[range(len(continuation)), continuation].sum())


@pytest.mark.parametrize("model", MODELS, ids=["prefix", "pair"])
@given(REQUESTS, st.sampled_from([1, 40, 8192]))
@settings(max_examples=25, deadline=None)
def test_every_request_scores_as_if_it_were_alone(model, requests, budget: int) -> None:
    sequences, starts = [[256, *a, *b] for a, b in requests], [len(a) + 1 for a, _ in requests]
    found = Engine(model, budget_tokens=budget).score(sequences, starts)
    assert [scored.logprob for scored in found] == pytest.approx([alone(model, a, b) for a, b in requests], abs=1e-4)
    assert [scored.tokens for scored in found] == [len(b) for _, b in requests]


def test_a_prefix_decoder_without_a_context_is_a_causal_one() -> None:
    causal = Llama(**{**PREFIX.model_dump(), "attention": "causal"}).build(2).eval()
    texts = [[256, *range(n)] for n in (3, 11, 40)]
    assert log_likelihoods(MODELS[0], texts) == pytest.approx(log_likelihoods(causal, texts), abs=1e-4)
    given_context = [log_likelihoods(model, texts, starts=[3, 9, 20]) for model in (MODELS[0], causal)]
    assert abs(given_context[0] - given_context[1]).max() > 1e-2


@pytest.mark.parametrize("model", MODELS, ids=["prefix", "pair"])
def test_ranks_do_not_depend_on_the_order_of_the_options(model) -> None:
    engine = Engine(model, byte_level())
    options = (" red", " a long green", " blue", " b")
    straight = [s.logprob for s in engine.loglikelihood([("The sky is", option) for option in options])]
    reverse = [s.logprob for s in Engine(model, byte_level()).loglikelihood([("The sky is", option) for option in options[::-1]])]
    assert straight == pytest.approx(reverse[::-1], abs=1e-5)
    accuracy = [
        judged("x", [Item("The sky is", part, part.index(" red"))], torch.tensor(s).numpy())[0].value
        for part, s in ((options, straight), (options[::-1], reverse))
    ]
    assert accuracy[0] == accuracy[1]


@pytest.mark.parametrize(
    "model",
    [
        {
            "name": "llama",
            "attention": "prefix",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 384,
        },
        {"name": "umt5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 384},
    ],
    ids=["prefix", "pair"],
)
def test_a_run_is_measured_and_writes(model, small_recipe, tmp_path) -> None:
    from cairn.generation.text import generate

    recipe = {**small_recipe, "model": model, "data": {**small_recipe["data"], "sequence_length": 64}, "objective": "span-corruption"}
    run = train(recipe, tmp_path / "run", ["training.tokens=3 steps"])
    tasks = [
        {"name": "held-out", "sequences": 8},
        {"name": "held-out-objective", "objective": "span-corruption", "sequences": 8, "task": "spans"},
        {"name": "held-out-objective", "objective": {"name": "prefix-lm", "split": "fixed"}, "sequences": 8, "task": "prefix"},
        {"name": "next-line", "places": 4, "shortest": 3},
    ]
    rows = measure.evaluate(run.newest(), tasks, store=False)
    losses = {row.task: row.value for row in rows if row.metric == "loss"}
    assert set(losses) == {"held-out", "spans", "prefix"} and all(3 < value < 8 for value in losses.values())
    text = generate(run.path, "the stone", new_tokens=8, temperature=0)
    assert text == generate(run.path, "the stone", new_tokens=8, temperature=0)


def test_an_objective_is_only_measured_where_its_tokens_have_room(small_run) -> None:
    from cairn.errors import InputError

    with pytest.raises(InputError, match="need 357 ids and the model has 257"):
        measure.evaluate(small_run.newest(), [{"name": "held-out-objective", "objective": "span-corruption"}], store=False)


def test_of_several_prompts_the_median_counts(small_run, tmp_path) -> None:
    rows = [{"ctx": f"the stone {i}", "endings": ["on the trail", "walked", "marks"], "label": i % 3} for i in range(12)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["{ctx}", "{ctx} and then", "After the rain:\n{ctx}"]
    one = [measure.evaluate(small_run.newest(), [{"name": "multiple-choice", "path": str(path), "context": prompt}], store=False) for prompt in prompts]
    single = sorted(next(row.value for row in found if row.metric == "accuracy") for found in one)
    found = measure.evaluate(small_run.newest(), [{"name": "rank-classification", "path": str(path), "prompts": prompts}], store=False)
    assert [row.value for row in found] == [single[1], single[0], single[2]] and {row.chance for row in found} == {1 / 3}
