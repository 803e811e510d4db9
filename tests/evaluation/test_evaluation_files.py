"""Files that tasks read: lines end at a line feed alone, what is no text is one sentence with its line, and what `data prepare` made is a corpus."""

import json

import pytest
from typer.testing import CliRunner

from cairn.cli.main import app
from cairn.errors import CairnError
from cairn.evaluation import items, measure, rows
from cairn.evaluation.measure import evaluate

GOOD = {"question": "a\u2028b\u0085c", "options": ["x", "y"], "answer": 0}


@pytest.fixture(params=["rows", "items"])
def load(request):
    """Both ways in which tasks read a file of items."""
    return (lambda path: [row for _, row in rows.read_rows(path)]) if request.param == "rows" else (lambda path: items.load(path, ["question"]))


def test_lines_end_at_a_line_feed_alone(load, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(GOOD, ensure_ascii=False) for _ in range(3)).encode() + b"\n\n")
    assert load(path) == [GOOD] * 3


@pytest.mark.parametrize(
    "bad",
    [b'{"question": "caf\xe9"}', b'{"question": "\\ud83d"}', b"{", b"[1]", b'{"question": "a"', b"[" * 10_000],
    ids=["latin-1", "surrogate", "brace", "list", "cut", "deep"],
)
def test_a_line_that_is_none_is_one_sentence_with_its_number(load, tmp_path, bad):
    path = tmp_path / "items.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(CairnError, match=r"items.jsonl, line 3"):
        load(path)


def test_a_list_that_is_none_names_its_file(tmp_path):
    path = tmp_path / "items.json"
    for bad in (b"{", b'["caf\xe9"]', b'[{"question": "\\ud83d"}]', b"[" * 10_000, b"{}", b"[]"):
        path.write_bytes(bad)
        with pytest.raises(CairnError, match=r"items.json"):
            items.load(path, ["question"])


# -- corpora of tasks on held-out text ------------------------------------------------------------------------------

TASKS = ["held-out", "next-token", "word-swap", "cloze", "next-line", "brackets", "known-names", "held-out-objective"]
OPTIONS = {"next-line": {"shortest": 3, "places": 4}, "known-names": {"names": r"^(\w+) ", "places": 4}, "brackets": {"places": 4}}


@pytest.mark.parametrize("name", TASKS)
def test_a_checkpoint_without_data_is_measured_on_a_text_as_its_error_advises(name, small_run, corpus_file, tmp_path):
    """A plain transformers directory knows of no run; the error says `corpus=`, and that works: a file, and a store that `data prepare` made."""
    import shutil

    folder = tmp_path / "plain"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(small_run.newest().path / file, folder / file)
    task = {"name": name, **OPTIONS.get(name, {})}
    with pytest.raises(CairnError, match="corpus=NAME_OR_PATH"):
        evaluate(folder, [task], store=False)
    by_file = evaluate(folder, [{**task, "corpus": str(corpus_file)}], store=False)
    done = CliRunner().invoke(app, ["data", "prepare", str(corpus_file), "-o", str(tmp_path / "store"), "--held-out", "0"])
    assert done.exit_code == 0, done.output
    by_store = evaluate(folder, [{**task, "corpus": str(tmp_path / "store")}], store=False)
    assert [(row.metric, row.value, row.n) for row in by_store] == [(row.metric, row.value, row.n) for row in by_file]
    assert [row.value for row in evaluate(small_run.newest(), [{**task, "corpus": {"store": str(tmp_path / "store")}}], store=False)] == [
        row.value for row in by_file
    ]


def test_scores_of_a_text_do_not_begin_with_an_end_where_the_tokenizer_says_otherwise(tmp_path):
    """Documents lie in stores behind an end of text; a tokenizer that begins texts with `<s>` is measured behind `<s>`."""
    import torch

    from cairn.data.text.tokenizer import Tokenizer
    from cairn.evaluation.engine import Engine
    from cairn.models.families.llama import Llama
    from cairn.options import configure
    from tests import tokenizer_kinds as kinds

    tokenizer = Tokenizer(kinds.metaspace(), kinds.config("metaspace"))
    model = Llama(
        vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, initializer_range=0.3
    ).build(seed=1)
    texts = ["First Citizen: hear me speak.", "Привет, мир"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "The quick brown fox jumps over the lazy dog " * 3]))
    length = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    (loss, bits) = configure("measurement", {"name": "held-out", "corpus": str(path), "sequences": 1, "sequence_length": length}).of(model.eval(), tokenizer)
    # Of each text every token and the end behind it, which the last one shares with the text that follows.
    wanted = [scored.logprob for scored in Engine(model, tokenizer).score([[1, *tokenizer.encode(text), 2] for text in texts])]
    assert loss.value == pytest.approx(-sum(wanted) / length, abs=1e-5)
    assert bits.value == pytest.approx(-sum(wanted) / sum(len(text.encode()) for text in texts) / torch.log(torch.tensor(2.0)).item(), rel=1e-4)
    assert measure.FORMAT == 2, "kept results of the old count are another protocol"
