"""cairn audit: what it says, as tables, as one document, as files, and how it leaves."""

import json
from pathlib import Path

import pytest

QUESTIONS = Path(__file__).parent.parent / "conformance" / "questions.json"


def test_leakage_of_a_run_is_read_against_a_control(cairn, small_run, tmp_path):
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    found = cairn(
        "audit", "leakage", small_run.path, "--items", QUESTIONS, "--control", QUESTIONS, "--every", "2", "orders=6", "--out", out, "--plot", plot, "--json"
    ).document
    assert [each["step"] for each in found] == [10, 20] and all(each["a_auc"] == 0.5 and each["a_first"] == each["a_first_control"] for each in found)
    assert json.loads(out.read_text()) == found and plot.read_bytes().startswith(b"\x89PNG")
    last = found[-1]
    assert {"rank", "p", "q", "id"} == set(last["items"][0]) and [rate["threshold"] for rate in last["b_published"]] == [-0.2, -0.17, -0.15]
    table = cairn("audit", "leakage", small_run.newest().path, "--items", QUESTIONS, "--control", QUESTIONS, "orders=6")
    assert "of the control" in table.out and "a_first_control" in table.out
    assert "orders drawn by us" in cairn("audit", "leakage", small_run.newest().path, "--items", QUESTIONS, "orders=6").out


def test_leakage_beyond_a_reference_is_none_for_the_reference_itself(cairn, small_run):
    newest = small_run.newest().path
    found = cairn("audit", "leakage", newest, "--items", QUESTIONS, "--reference", newest, "orders=6", "--json").document
    assert {item["rank"] for item in found[0]["items"]} == {(6 + 1) / 12} and found[0]["b_flagged"] is None


def test_formats_prints_the_null_beside_the_spread_and_compares(cairn, small_run, tmp_path):
    first, last = small_run.checkpoints()[0], small_run.checkpoints()[-1]
    options = ("input=question", "output=answer", "options=options", "score=rank", "formats=5")
    found = cairn("audit", "formats", last, "--items", QUESTIONS, *options, "--compare", first, "--plot", tmp_path / "f.png", "--json").document
    assert found["n_formats"] == 5 and found["low"] <= found["default"] <= found["high"] and found["null"] > 0 and 0 <= found["order"]["flip"] <= 1
    assert (tmp_path / "f.png").exists()
    table = cairn("audit", "formats", last, "--items", QUESTIONS, *options, "--compare", first)
    assert "null" in table.out and "flips in" in table.out and "enumeration.number" in table.out
    refused = cairn("audit", "formats", last, "--items", QUESTIONS, *options, "--compare", first, "budget=4")
    assert refused.status == 2 and "leave out budget" in refused.err


def test_flips_can_be_a_gate(cairn, small_run, tmp_path):
    """The key is what the first checkpoint says: it is right everywhere, and whatever the last one says otherwise has flipped."""
    from cairn.checkpoint.format import read
    from cairn.evaluation.items import observe
    from cairn.evaluation.measurements.choice import ChoiceTask

    first, last = small_run.checkpoints()[0], small_run.checkpoints()[-1]
    said, later = (observe(read.open(path), ChoiceTask(path=QUESTIONS), store=False)["said"] for path in (first, last))
    keyed = tmp_path / "keyed.json"
    keyed.write_text(json.dumps([row | {"answer": answer} for row, answer in zip(json.loads(QUESTIONS.read_text()), said, strict=True)]))
    expected = [i for i, (a, b) in enumerate(zip(said, later, strict=True)) if a != b]
    call = ("audit", "flips", first, last, "--task", "choice", f"path={keyed}")
    found = cairn(*call, "--twin", first, "--plot", tmp_path / "flips.png", "--json").document
    assert (tmp_path / "flips.png").read_bytes().startswith(b"\x89PNG")
    assert expected and found["flipped"] == expected and found["old"] == 1 and found["negative"] == len(expected) / 8 and found["floor"] == 0
    assert cairn(*call, "--gate", "1").status == 0
    gated = cairn(*call, "--gate", "0.01")
    assert gated.status == 1 and "more than the gate" in gated.err


def test_stability_says_which_way_to_ask(cairn, small_run, tmp_path):
    found = cairn("audit", "stability", small_run.path, "--items", QUESTIONS, "--plot", tmp_path / "s.png", "--json").document
    assert [each["label"] for each in found["tasks"]] == ["choice/blank", "choice/letter"] and (tmp_path / "s.png").exists()
    assert "chosen:" in cairn("audit", "stability", small_run.path, "--items", QUESTIONS, "--ask", "blank").out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("leakage", "--items", "nowhere.jsonl"), "There is no file nowhere.jsonl"),
        (("leakage", "--items", str(QUESTIONS), "order=3"), "Did you mean 'orders'"),
        (("leakage", "--items", str(QUESTIONS), "options=choices"), "has no 'choices'"),
        (("formats", "--items", str(QUESTIONS)), "has no 'input'"),
        (("stability", "--items", str(QUESTIONS), "--ask", "shout"), "ask"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_status_2(cairn, small_run, arguments, sentence):
    answer = cairn("audit", arguments[0], small_run.path, *arguments[1:])
    said = answer.err.splitlines()[-1]
    assert answer.status == 2 and said.startswith("cairn: ") and sentence in said and "Traceback" not in answer.err
