"""Tagged words through the one loop: exact resumes, what padding and company change (nothing), measuring, bad input."""

import json

import numpy as np
import pytest
import torch

from cairn.checkpoint.format import read
from cairn.errors import CairnError, InputError, MismatchError, NotFoundError
from cairn.evaluation.measure import evaluate
from cairn.fields.words.families.gru_tagger import GruTaggerConfig
from cairn.fields.words.objectives.token_classification import TokenClassification
from cairn.fields.words.processor import FILE, HIDDEN, WordProcessor
from cairn.fields.words.sentence_sets import UNTAGGED, open_sentences
from cairn.merging.combine import average
from cairn.training.run import fork, resume, train
from cairn.training.sources import open_data


def losses(run):
    return [row["loss"] for row in run.metrics()]


@pytest.mark.parametrize("more", [[], ["objective.hidden=0.4"]])
def test_a_stop_and_a_resume_change_no_bit(more, word_recipe, tmp_path):
    whole = train(word_recipe, tmp_path / "whole", more)
    train(word_recipe, tmp_path / "cut", more, stop_at_step=7)
    again = resume(tmp_path / "cut")
    assert losses(again) == losses(whole) and again.newest().digest == whole.newest().digest
    assert losses(train(word_recipe, tmp_path / "one", [*more, "training.micro_batch=32"])) == pytest.approx(losses(whole), abs=1e-5)


def test_it_learns_and_is_measured_on_words_with_an_interval(word_recipe, tmp_path):
    run = train(word_recipe, tmp_path / "r", ["training.samples=40 steps", "optimizer.lr=2e-2"])
    found = {row.metric: row for row in evaluate(run.newest(), store=False)}
    assert found["accuracy"].value > 0.6 > found["accuracy"].chance and found["accuracy"].n > 40 and run.newest().unit == "samples"
    assert run.newest().config["label2id"] == {"name": 0, "noun": 1, "verb": 2} and (run.newest().path / FILE).exists()


def test_padding_and_company_change_no_answer(word_run):
    model, processor = word_run.newest().model(), WordProcessor.load(word_run.newest().path)
    rows = [[processor(word) for word in text.split()] for text in ("ab cde fgh", "stonenn", "rainvv andnn walkedvv onnn it??")]

    def said(some, words, pieces):
        padded = torch.tensor([[row[t] + [0] * (pieces - len(row[t])) if t < len(row) else [0] * pieces for t in range(words)] for row in some])
        with torch.no_grad():
            return model(padded, torch.tensor([len(row) for row in some]))

    together = said(rows, 9, 40)
    for number, row in enumerate(rows):
        assert torch.allclose(said([row], len(row), max(map(len, row)))[0], together[number, : len(row)], atol=1e-6)


def test_pieces_of_words_are_hashed_and_the_file_round_trips(tmp_path):
    processor = WordProcessor(64, (2, 3))
    assert processor("a") == WordProcessor.load(_written(tmp_path, processor))("a") and processor("a") != processor("b")
    assert len(processor("walk")) <= 9 and min(processor("walk")) > HIDDEN and max(processor("walk")) < processor.vocab_size
    for key, value in {"buckets": 0, "pieces": [3], "hash": "md5"}.items():
        (tmp_path / FILE).write_text(json.dumps(json.loads(processor.files()[FILE]) | {key: value}))
        with pytest.raises(MismatchError, match=key):
            WordProcessor.load(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(NotFoundError, match=FILE):
        WordProcessor.load(tmp_path)


def _written(folder, processor):
    (folder / FILE).write_bytes(processor.files()[FILE])
    return folder


def test_hidden_words_are_unseen_alone_count_and_are_drawn_anew(word_recipe):
    from cairn.training import recipe as recipes

    _, feed = open_data(recipes.load(word_recipe).data, 7)
    samples = feed.samples(np.arange(20))
    plain, some = TokenClassification().arrays(samples), TokenClassification(hidden=0.5).arrays(samples)
    unseen = (some["pieces"] == HIDDEN).any(-1)
    there = np.arange(unseen.shape[1]) < samples.inputs["lengths"][:, None]
    assert 0.3 < unseen[there].mean() < 0.7 and not unseen[~there].any()
    assert (some["weights"] == (unseen & (samples.tags != UNTAGGED))).all() and (plain["weights"] == (samples.tags != UNTAGGED)).all()
    assert (some["pieces"][~unseen] == plain["pieces"][~unseen]).all() and (
        TokenClassification(hidden=0.5).arrays(feed.samples(np.arange(20, 40)))["weights"]
    ).any()


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_the_losses_of_words_add_up_to_the_loss(hidden, word_recipe, word_run):
    objective = TokenClassification(hidden=hidden)
    _, feed = open_data(word_run.recipe.data, 7)
    batch = {name: torch.from_numpy(array) for name, array in objective.arrays(feed.samples(np.arange(12))).items()}
    model = word_run.newest().model()
    total, each = objective.loss(model, batch).total, objective.token_losses(model, batch)
    assert each.shape == batch["weights"].shape and torch.allclose((each * batch["weights"]).sum(), total, rtol=1e-5) and total > 0


def test_treebanks_are_read_and_averages_keep_the_processor(word_run, real_data, tmp_path):
    found = open_sentences("ud-en-ewt", "en_ewt-ud-dev.conllu", longest=5)
    assert len(found) > 1000 and np.diff(found.starts).max() == 5 and {"NOUN", "VERB"} <= set(found.classes) and "_" not in found.classes
    mean = average([word_run.path], tmp_path / "mean")
    assert (mean.path / FILE).read_bytes() == (word_run.newest().path / FILE).read_bytes() and evaluate(mean, store=False)[0].n > 10


def test_the_network_is_as_large_as_its_config_says():
    for layers in (1, 2):
        config = GruTaggerConfig(vocab_size=50, hidden_size=6, num_hidden_layers=layers)
        assert config.parameter_count() == sum(parameter.numel() for parameter in config.build(0).parameters())
        assert GruTaggerConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('{"words": ["a"], "tags": []}', "1 words and 0 tags"),
        ('{"words": "a", "tags": ["x"]}', "a line has 'words'"),
        ('{"words": ["a"], "tags": [3]}', "a tag is a text"),
        ("[1]", "not a JSON object"),
        ('{"words": ["a"', "not valid JSON"),
        ("", "holds no sentences"),
        ('{"words": ["a", "b"], "tags": ["x", "x"]}', "All words have one tag"),
    ],
)
def test_bad_sentences_are_named_before_anything_is_written(lines, sentence, word_recipe, tmp_path):
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(CairnError, match=sentence):
        train(word_recipe, tmp_path / "r", [f"data.sources.tagged.sentences={tmp_path / 'bad.jsonl'}", "data.held_out=0"])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective=causal-lm", "needs tokens, and the field 'words' gives tags and words"),
        ("model={name: vit}", "a 'vit' reads images, and the field 'words'"),
        ("training.tokens=1k", "counts samples"),
        ("data.sources.tagged.sentences=nowhere.jsonl", "There are no sentences at 'nowhere.jsonl'"),
        ("data.sources.tagged.sentences=ud-en-ewt", "has several files; say which"),
        ("data.pieces=[4, 2]", "shortest and the longest piece"),
    ],
)
def test_what_the_field_does_not_know_is_said(override, sentence, word_recipe, tmp_path):
    with pytest.raises(InputError, match=sentence):
        train(word_recipe, tmp_path / "r", [override])
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_of_other_tags_is_refused(word_run, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"words": ["a", "b"], "tags": ["noun", "comma"]}\n' * 3)
    with pytest.raises(MismatchError, match="tag 'comma', which the checkpoint does not know"):
        fork(word_run.newest(), tmp_path / "r", [f"data.sources.tagged.sentences={tmp_path / 'other.jsonl'}", "data.held_out=0"])
    assert read.open(word_run.path).config["model_type"] == "gru-tagger"
