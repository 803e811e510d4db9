"""cairn grow."""

import pytest


def test_the_command_line_grows_and_says_whether_the_function_stayed(cairn, small_run, tmp_path):
    answer = cairn("grow", "zero", small_run.path, "factor=2", "-o", tmp_path / "large", "--check", "--json")
    assert answer.status == 0 and answer.document["path"] == str(tmp_path / "large") and "logits differ by at most 0" in answer.err
    listed = cairn("log", tmp_path / "large", "--json").document[0]
    assert listed["act"] == "operation: zero" and "model.num_hidden_layers: 2 -> 4" in listed["changed"]


def test_when_to_grow_with_its_accounting(cairn):
    found = cairn("grow", "when", "--params", "7B", "--tokens", "2T", "--json").document
    assert found["growth_tokens"] == pytest.approx(11.11e9, rel=1e-3) and found["small_share"] < 0.01


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stack", "-o", "x"], "Name one checkpoint"),
        (["stak", "CKPT", "-o", "x"], "There is no growth 'stak'"),
        (["stack", "CKPT", "fctor=2", "-o", "x"], "Did you mean 'factor'"),
        (["when", "--params", "7B"], "cairn grow when --params 7B --tokens 2T"),
        (["when", "--params", "much", "--tokens", "2T"], "not an amount"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(cairn, small_run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    answer = cairn("grow", *[str(small_run.path) if item == "CKPT" else item for item in arguments])
    assert answer.status == 2 and sentence in answer.err and not list(tmp_path.iterdir())
