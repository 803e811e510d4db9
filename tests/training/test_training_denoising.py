"""Denoising objectives: what a model reads, what counts, what is refused, and what moves between architectures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cairn.checkpoint.format import read
from cairn.data.text.feed import Samples
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5
from cairn.options import configure
from cairn.training.objectives import Setting
from cairn.training.run import fork, resume, train

DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384}
PAIR = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 384, "feed_forward_proj": "gated-gelu"}
KINDS = {"causal": Llama(**DECODER), "prefix": Llama(**DECODER, attention="prefix"), "cross": T5(**PAIR)}
OBJECTIVES = ["prefix-lm", "span-corruption", "mlm", "ul2"]


def fitted(objective, model, length=64, documents=False):
    objective = configure("objective", objective)
    return objective.fitted(Setting(byte_level().extended(objective.special_tokens()), model, length, documents))


def ids(text):
    return byte_level().encode(text)


def samples(n=6, length=64, documents=None):
    tokens = np.random.default_rng(0).integers(32, 127, (n, length + 1))
    keys = np.arange(n, dtype=np.uint64) * np.uint64(977)
    return Samples(tokens, documents, np.ones((n, length), np.float32), np.zeros(n, int), np.arange(n), keys)


def batch(objective, given):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in objective.arrays(given).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_that_of_the_targets_alone(name, kind):
    objective, model = fitted(name, KINDS[kind]), KINDS[kind].build(0)
    inputs = batch(objective, samples())
    loss = objective.loss(model, inputs)
    assert torch.isfinite(loss.total) and loss.total.item() / inputs["weights"].sum().item() == pytest.approx(np.log(384), rel=0.25)
    each = objective.token_losses(model, inputs)
    torch.testing.assert_close((each * inputs["weights"]).sum(), loss.total)
    changed = {**inputs, "targets": torch.where(inputs["weights"] > 0, inputs["targets"], 7)}
    torch.testing.assert_close(objective.loss(model, changed).total, loss.total)
    assert inputs["weights"].shape == inputs["targets"].shape and (inputs["weights"].sum(1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sequence_does_not_depend_on_its_neighbours(name, kind):
    objective, all_of_them = fitted(name, KINDS[kind]), samples()
    alone = Samples(all_of_them.tokens[3:4], None, all_of_them.weights[3:4], all_of_them.source[3:4], all_of_them.window[3:4], all_of_them.keys[3:4])
    for key, array in objective.arrays(alone).items():
        assert (array[0] == objective.arrays(all_of_them)[key][3]).all(), key


def test_a_mixture_of_the_one_t5_denoiser_is_span_corruption():
    row = {"rate": 0.15, "span": 3}
    mixture, plain = fitted({"name": "ul2", "denoisers": [row]}, KINDS["cross"]), fitted("span-corruption", KINDS["cross"])
    ours, theirs = mixture.arrays(samples()), plain.arrays(samples())
    assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)


def test_a_prefix_of_one_token_is_causal_language_modelling():
    given = samples()
    objective = fitted({"name": "prefix-lm", "split": "fixed", "rate": 0.999}, KINDS["prefix"])
    model, inputs = KINDS["prefix"].build(0), batch(objective, given)
    assert (inputs["prefix"] == 1).all() and (inputs["weights"] == 1).all()
    causal = configure("objective", "causal-lm")
    torch.testing.assert_close(objective.loss(model, inputs).total, causal.loss(model, batch(causal, given)).total)


def test_a_prefix_is_seen_both_ways_and_what_follows_is_not():
    model = KINDS["prefix"].build(0)
    from cairn.models import masks

    text = torch.from_numpy(samples(1, 11).tokens)
    for changed in range(12):
        other = text.clone()
        other[0, changed] += 1
        with torch.no_grad():
            a, b = (model(x, mask=masks.prefix(torch.tensor([5]))).logits for x in (text, other))
        moved = ((a - b).abs().amax(-1)[0] > 1e-7).tolist()
        assert moved == [True] * 12 if changed < 5 else moved == [i >= changed for i in range(12)]


def documents_of(*sizes, length=64):
    numbers = np.concatenate([np.full(size, i) for i, size in enumerate(sizes)])
    return np.concatenate([numbers, np.full(length + 1 - len(numbers), -1)])[None].astype(np.int32)


def marked():
    """Three documents behind an end-of-text each: with a marker, without one, with one; and padding."""
    text = [256, *ids("ask=>answer"), 256, *ids("no marker"), 256, *ids("b=>c"), 256]
    tokens = np.full((1, 65), 256)
    tokens[0, : len(text)] = text
    weights = np.zeros((1, 64), np.float32)
    weights[0, : len(text) - 1] = 1
    return Samples(tokens, documents_of(12, 10, 5), weights, np.zeros(1, int), np.zeros(1, int), np.zeros(1, np.uint64))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_and_answers_with_their_end_are_said(kind):
    objective = fitted({"name": "prefix-lm", "split": "marker", "marker": "=>"}, KINDS[kind], documents=True)
    arrays = objective.arrays(marked())
    said = arrays["targets"][0][arrays["weights"][0] > 0].tolist()
    assert said == [*ids("answer"), 256, *ids("c"), 256]
    if kind == "cross":
        assert all((arrays["input_documents"][0] == number).any() for number in arrays["documents"][0])  # every query has something to look at
        assert arrays["input_ids"][0][arrays["input_documents"][0] >= 0].tolist() == [*ids("ask=>"), 256, *ids("b=>"), 256]
        first = arrays["weights"][0] > 0
        assert arrays["decoder_input_ids"][0][first].tolist() == [256, *ids("answer"), 256, *ids("c")]
    else:
        assert arrays["weights"][0].nonzero()[0].tolist() == [*range(5, 12), 25, 26]
    loss = objective.loss(KINDS[kind].build(0), {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()})
    assert torch.isfinite(loss.total)


@pytest.mark.parametrize("kind", ["prefix", "cross"])
def test_documents_that_share_a_window_are_read_as_if_each_were_alone(kind):
    objective, model, whole = fitted("prefix-lm", KINDS[kind], documents=True), KINDS[kind].build(0), marked()

    def summed(only):
        inputs = batch(objective, whole)
        weights = inputs["weights"] * (inputs["documents"] == only)
        return objective.loss(model, {**inputs, "weights": weights}).total

    alone = marked()
    tokens = alone.tokens.copy()
    tokens[0, 12:22] = 65  # another second document: the first and the third do not notice
    tokens[0, 12] = 256
    before = [summed(0), summed(2)]
    whole = Samples(tokens, alone.documents, alone.weights, alone.source, alone.window, alone.keys)
    torch.testing.assert_close([summed(0), summed(2)], before)


@pytest.mark.parametrize(
    ("objective", "model", "setting", "message"),
    [
        ({"name": "span-corruption", "sentinels": 2}, "causal", {}, r"has 3 hidden spans of 3 tokens and there are 2 sentinels; set objective\.sentinels"),
        ("span-corruption", "causal", {"length": 5}, r"lengthen data\.sequence_length"),
        ("ul2", "causal", {"documents": True}, "reads documents one after the other; set data.documents=attend"),
        ("causal-lm", "cross", {}, "for decoders, and 't5' reads with an encoder"),
        ({"name": "prefix-lm", "split": "marker", "marker": "=>"}, "causal", {}, "takes each document for a prompt"),
    ],
)
def test_what_can_not_be_is_refused_in_one_sentence(objective, model, setting, message):
    with pytest.raises(InputError, match=message):
        fitted(objective, KINDS[model], **setting)


def recipe(small_recipe, kind):
    model = {"name": "t5", **PAIR} if kind == "cross" else {"name": "llama", **DECODER, "attention": kind}
    return {**small_recipe, "model": model, "data": {**small_recipe["data"], "sequence_length": 64}}


@pytest.mark.parametrize("kind", ["prefix", "cross"])
def test_a_kill_and_a_resume_change_no_bit_and_micro_batches_nothing(kind, small_recipe, tmp_path):
    callbacks = [
        {"name": "sample", "every": "3 steps", "new_tokens": 4},
        {"name": "evaluate", "every": "3 steps", "measurements": [{"name": "held-out", "sequences": 4}]},
    ]
    options = ["objective=ul2", "training.tokens=6 steps", f"callbacks={json.dumps(callbacks)}"]
    whole = train(recipe(small_recipe, kind), tmp_path / "whole", options)
    train(recipe(small_recipe, kind), tmp_path / "cut", options, stop_at_step=4)
    again = resume(tmp_path / "cut")
    assert again.newest().digest == whole.newest().digest and again.samples() == whole.samples() != []
    divided = train(recipe(small_recipe, kind), tmp_path / "divided", [*options, "training.micro_batch=64"])
    assert [row["loss"] for row in divided.metrics()] == pytest.approx([row["loss"] for row in whole.metrics()], rel=1e-4)
    assert any(key.startswith("loss/NLU/span3") for row in whole.metrics() for key in row)


def test_a_causal_checkpoint_goes_on_as_a_prefix_decoder_with_every_weight(small_recipe, tmp_path):
    base = train(recipe(small_recipe, "causal"), tmp_path / "base", ["training.tokens=4 steps"])
    there = fork(base.newest(), tmp_path / "prefix", ["model.attention=prefix", "objective=span-corruption"])
    before, after = base.newest(), there.newest()
    assert {n: t.load().numpy().tobytes() for n, t in before.tensors.items()} == {n: t.load().numpy().tobytes() for n, t in after.tensors.items()}
    assert after.tokenizer.vocab_size == 357 and before.config["vocab_size"] == after.config["vocab_size"]
    assert any("objective" in change for change in after.lineage.changed)
    back = fork(there.newest(), tmp_path / "back", ["model.attention=causal", "objective=causal-lm"]).newest()
    assert back.model_digest != before.model_digest and "attention" not in back.config  # the tokenizer has kept its sentinels
    with pytest.raises(InputError, match="leave room for the objective's special tokens"):
        fork(base.newest(), tmp_path / "no", ["objective.name=span-corruption", "objective.sentinels=500", "data.sequence_length=64"])


def test_transformers_opens_model_and_tokenizer(small_recipe, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = train(recipe(small_recipe, "cross"), tmp_path / "t5", ["objective=ul2", "training.tokens=1 steps"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.newest().path)
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert tokenizer("[NLU]a<extra_id_1>", add_special_tokens=False)["input_ids"] == [run.newest().tokenizer.backend.token_to_id("[NLU]"), *ids("a"), first - 1]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(run.newest().path)
    assert model.config.decoder_start_token_id == tokenizer.eos_token_id == json.loads((run.newest().path / "config.json").read_text())["pad_token_id"]
    some = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        theirs, ours = model(input_ids=some, decoder_input_ids=some).logits, read.open(run.path).model()(some, decoder_input_ids=some).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_sentinels_must_be_there_and_lie_side_by_side():
    objective = configure("objective", {"name": "span-corruption", "sentinels": 3})
    with pytest.raises(InputError, match="has no '<extra_id_2>'"):
        objective.fitted(Setting(byte_level(), KINDS["causal"], 64, False))
    with pytest.raises(InputError, match="must lie side by side"):
        objective.fitted(Setting(byte_level().extended(["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]), KINDS["causal"], 64, False))


def test_a_mixture_reports_the_loss_of_each_denoiser():
    objective, model, given = fitted("ul2", KINDS["prefix"]), KINDS["prefix"].build(0), samples(40)
    inputs = batch(objective, given)
    loss = objective.loss(model, inputs)
    weight = inputs["weights"].sum()
    figures = objective.figures({name: float(part / weight) for name, part in loss.parts.items()})
    assert len(figures) == len(set(inputs["denoiser"].tolist())) == 7
    for number, title in enumerate(figures):
        mine = inputs["denoiser"] == number
        alone = objective.loss(model, {name: tensor[mine] for name, tensor in inputs.items()}).total / inputs["weights"][mine].sum()
        assert figures[title] == pytest.approx(float(alone), rel=1e-4), title
