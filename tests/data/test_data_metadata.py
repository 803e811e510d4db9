"""Metadata in front of documents: masked to the token, encoded apart, packed exactly, gone in the cooldown."""

import json

import numpy as np
import pytest
import torch

from cairn.data.corpora import Document, resolve
from cairn.data.text.feed import SourceSpec, TextFeed
from cairn.data.text.metadata import Metadata, host
from cairn.data.text.packing import Complete, Whole
from cairn.data.text.tokenizer import byte_level, resolve_tokenizer
from cairn.data.text.tokens import Selection, Split, prepare
from cairn.errors import CairnError, InputError, ResumeError
from cairn.generation.text import generate
from cairn.training.run import fork, resume, train

WORDS = ["stone", "trail", "rain", "again", "before", "marks", "walk"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Four hundred documents from three hosts, some without one."""
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    rng = np.random.default_rng(0)
    hosts = ["https://docs.python.org/3/library", "http://plays.example.net:8080/hamlet", "en.wikipedia.org", None]
    rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(3, 20))), "url": hosts[i % 4]} for i in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://en.wikipedia.org/wiki/Cairn", "en.wikipedia.org"),
        ("http://User:secret@Example.COM:8080/a?b=c", "example.com"),
        ("docs.python.org/3/", "docs.python.org"),
        ("localhost", "localhost"),
        ("//cdn.example.net/x", "cdn.example.net"),
        ("https://bücher.example/katalog", "bücher.example"),
        ("https://[::1]:80/", "::1"),
        ("https://[broken/", ""),
        ("", ""),
    ],
)
def test_a_host_is_what_stands_between_scheme_and_path(url, expected):
    assert host(url) == expected


def test_transforms_and_what_is_not_known():
    page = Document("text", "pages:1", {"url": "https://a.b.example.org/x"})
    shown = {name: Metadata(transform=name).prefix(page, {}) for name in ("host", "domain", "suffix", "text", "hash")}
    assert shown["host"] == "URL: a.b.example.org\n\n" and shown["domain"] == "URL: example.org\n\n" and shown["suffix"] == "URL: org\n\n"
    assert shown["text"] == "URL: https://a.b.example.org/x\n\n" and len(shown["hash"]) == len("URL: \n\n") + 36
    assert Metadata(known=["b.org"]).prefix(page, {}) == "URL: unknown\n\n" and Metadata(template="A text.\n").prefix(page, {}) == "A text.\n"
    assert Metadata(field="source", transform="text").prefix(page, {"source": "web"}) == "URL: web\n\n"
    assert Metadata().prefix(Document("text", "x"), {}) is None and Metadata().prefix(Document("text", "x", {"url": ""}), {}) is None
    half = [Metadata(probability=0.5).prefix(Document(str(i), "x", {"url": "a.org"}), {}) is not None for i in range(1000)]
    assert 450 < sum(half) < 550
    with pytest.raises(InputError, match="is no template"):
        Metadata.parse({"template": "URL: {0}"})


def test_tokens_are_those_of_prefix_and_text_apart_and_held_out_texts_have_none(pages, tmp_path):
    """With a BPE, in which the prefix's last newline and the text would otherwise make other tokens."""
    tokenizer = resolve_tokenizer({"bpe": 300}, [str(pages)])
    store = prepare(str(pages), tokenizer, tmp_path / "store", held_out=0.1, selection=Selection(Metadata()))
    held = prepare(str(pages), tokenizer, tmp_path / "plain", held_out=0.1)
    assert np.array_equal(store.held_out.tokens, held.held_out.tokens) and store.held_out.prefixes is None and held.train.prefixes is None
    documents = [d for d in resolve(str(pages)).documents() if d.text]
    train = [d for d in documents if any(d.text == tokenizer.decode(each) for each in split_up(held.train))]
    expected = [[*tokenizer.encode(Metadata().prefix(d, {}) or ""), *tokenizer.encode(d.text)] for d in train]
    assert [each.tolist() for each in split_up(store.train)] == expected
    assert store.train.prefixes.tolist() == [len(tokenizer.encode(Metadata().prefix(d, {}) or "")) for d in train]


def split_up(split):
    """The documents of a split, without the end-of-text before each."""
    ends = [*split.starts[1:].tolist(), len(split.tokens)]
    return [np.asarray(split.tokens[begin + 1 : end]) for begin, end in zip(split.starts.tolist(), ends, strict=True)]


@pytest.mark.parametrize("packing", ["joined", "whole", "complete"])
def test_no_token_of_metadata_is_a_target_and_every_other_is(packing, pages, tmp_path):
    tokenizer = byte_level()
    store = prepare(str(pages), tokenizer, tmp_path / "with", held_out=0, selection=Selection(Metadata()))
    feed = TextFeed([SourceSpec("a", store)], 200, 0, packing=packing)
    samples = feed.samples(np.arange(feed.epoch_tokens["a"] // 200))
    front = tokenizer.encode("URL: ")
    for tokens, weights in zip(samples.tokens, samples.weights, strict=True):
        text = tokens.tolist()
        for place in range(1, 200):
            shown = text[place - 1] == tokenizer.eos_id and text[place : place + 5] == front
            if shown and place + 5 <= 200:
                assert not weights[place - 1 : place + 4].any()  # targets 'U', 'R', 'L', ':', ' '
    plain = prepare(str(pages), tokenizer, tmp_path / "without", held_out=0)
    if packing == "joined":
        masked = int(store.train.prefixes.sum())
        assert len(store.train.tokens) == len(plain.train.tokens) + masked
        assert int((samples.weights == 0).sum()) <= masked <= int((samples.weights == 0).sum()) + 200
    if packing == "whole":
        # Nothing is cut or left out: what is learned from is the same with and without metadata, end-of-texts included.
        other = TextFeed([SourceSpec("a", plain)], 200, 0, packing=packing)
        counts = [int(each.samples(np.arange(each.epoch_tokens["a"] // 200)).weights.sum()) for each in (feed, other)]
        assert abs(counts[0] - counts[1]) <= feed.epoch_tokens["a"] // 200


def test_complete_windows_begin_with_a_document_and_leave_out_exactly_the_overflow():
    lengths = [5, 4, 9, 2, 30, 3]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.uint64)
    split = Split(np.arange(sum(lengths)), starts, 0)
    packing = Complete(split, 9, padding=-1)  # windows of ten
    windows = packing.windows(np.arange(packing.count))
    assert [w[w >= 0].tolist() for w in windows.tokens] == [[*range(9)], [*range(9, 18)], [18, 19, *range(20, 28)], [50, 51, 52]]
    kept = sum(len(w[w >= 0]) for w in windows.tokens)
    assert kept == sum(lengths) - (30 - 8) and packing.count == 4
    assert all(int(w[0]) in starts.tolist() for w in windows.tokens)
    assert isinstance(packing, Whole)


@pytest.fixture(scope="module")
def recipe(small_recipe, pages):
    data = {"tokenizer": "byte", "sources": {"pages": {"corpus": str(pages)}}, "sequence_length": 32, "held_out": 0.1, "metadata": {"until": "75%"}}
    return {**small_recipe, "data": data}


def test_the_cooldown_reads_documents_of_its_own_without_metadata(recipe, tmp_path):
    run = train(recipe, tmp_path / "run")
    from cairn.training.sources import open_data

    pinned = run.recipe.data
    assert pinned.metadata.until.value == 15 * 256 and pinned.metadata.reserved == 0.25
    tokenizer, feed = open_data(pinned, 7)
    assert feed.switch == 15 * 8
    early, late = (feed.samples(np.arange(*span)) for span in ((0, 120), (120, 160)))
    assert (early.weights == 0).any() and (late.weights == 1).all()
    shown = [tokenizer.decode(row.tolist()) for row in late.tokens]
    assert not any("URL" in text for text in shown) and any("URL" in tokenizer.decode(row.tolist()) for row in early.tokens)
    first, second = ({tuple(d.tolist()[-40:]) for d in split_up(getattr(feed.sources[0], which).train)} for which in ("store", "after"))
    assert len(second) > 40 and not first & second
    assert np.array_equal(feed.samples(np.arange(110, 130)).tokens, np.concatenate([early.tokens[110:], late.tokens[:10]]))


def test_until_the_switch_a_run_is_the_one_that_never_switches(recipe, tmp_path):
    reserved = ["data.metadata.reserved=0.25"]
    whole = train(recipe, tmp_path / "whole", reserved)
    never = train(recipe, tmp_path / "never", [*reserved, "data.metadata.until=100%"])
    losses = [[row["loss"] for row in run.metrics()] for run in (whole, never)]
    rates = [[row["learning_rate"] for row in run.metrics()] for run in (whole, never)]
    assert losses[0][:15] == losses[1][:15] and losses[0][15] != losses[1][15] and rates[0] == rates[1]


@pytest.mark.parametrize("stop", [4, 15, 17])
def test_a_resume_in_either_stage_changes_no_bit(recipe, tmp_path, stop):
    more = ["data.packing=complete", "data.documents=mask"]
    whole = train(recipe, tmp_path / "whole", more)
    train(recipe, tmp_path / "cut", more, stop_at_step=stop)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest
    with pytest.raises(ResumeError, match="cannot change data"):
        resume(tmp_path / "cut", ["data.metadata.until=100%"])


def test_what_stands_in_an_earlier_document_changes_no_later_one(recipe, pages, tmp_path):
    model = train(recipe, tmp_path / "run", ["training.tokens=2 steps"]).newest().model(dtype=torch.float64)
    from cairn.models import masks

    store = prepare(str(pages), byte_level(), tmp_path / "store", held_out=0, selection=Selection(Metadata()))
    samples = TextFeed([SourceSpec("a", store)], 200, 0, packing="complete").samples(np.array([0]))
    ids, documents = (torch.from_numpy(np.ascontiguousarray(array[:, :-1])) for array in (samples.tokens, samples.documents))
    assert int(documents.max()) > 0
    other = torch.where(documents == 0, (ids + 1) % 200, ids)
    with torch.no_grad():
        both = [model(each, mask=masks.document(documents)).logits[documents > 0] for each in (ids, other)]
    assert torch.equal(*both)


def test_reweighting_and_metadata_together(recipe, tmp_path):
    """Sequences whose tokens are partly masked; a batch that is divided otherwise is the same batch."""
    settings = ["reweighting={name: loss-based, warmup: 0 tokens}", "training.tokens=6 steps", "training.precision=float64"]
    whole, parts = (train(recipe, tmp_path / name, [*settings, *more]) for name, more in (("whole", []), ("parts", ["training.micro_batch=64"])))
    for key in ("loss", "reweighting/ess", "grad_norm"):
        assert [row[key] for row in whole.metrics()] == pytest.approx([row[key] for row in parts.metrics()], rel=1e-6)
    train(recipe, tmp_path / "cut", settings, stop_at_step=5)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest


def test_a_model_is_asked_by_where_a_text_should_come_from(recipe, small_run, tmp_path):
    run = train(recipe, tmp_path / "run", ["training.tokens=3 steps"])
    found = {name: generate(run.path, "The", metadata=name, temperature=0, new_tokens=20) for name in (None, "docs.python.org")}
    by_hand = generate(run.path, "<|endoftext|>URL: docs.python.org\n\nThe", temperature=0, new_tokens=20)
    assert found["docs.python.org"] == by_hand and isinstance(found[None], str)
    with pytest.raises(InputError, match="was not trained with metadata"):
        generate(small_run.path, "The", metadata="docs.python.org")


def test_what_can_not_be_is_said(recipe, tmp_path, pages):
    store = prepare(str(pages), byte_level(), tmp_path / "store")
    with pytest.raises(InputError, match="name the corpus instead"):
        train(recipe, tmp_path / "run", [f"data.sources.pages.corpus={{store: {store.path}}}"])
    with pytest.raises(CairnError, match="Did you mean 'template'"):
        train(recipe, tmp_path / "run", ["data.metadata.templat=x"])
    assert not (tmp_path / "run").exists()
    plain = fork(train(recipe, tmp_path / "a", ["training.tokens=2 steps"]).newest(), tmp_path / "b", ["data.metadata=null", "training.tokens=3 steps"])
    assert plain.newest().trainer["position"] == 8 and any("data.metadata" in line for line in plain.newest().lineage.changed)
