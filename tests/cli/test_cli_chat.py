"""`cairn chat` and `cairn generate` as typed: prompts from options, files and standard input."""

import io
import json

import pytest

from tests.generation.test_generation_chat import TEMPLATE


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE)
    return path


def test_a_conversation_over_standard_input(cairn, small_run, template, monkeypatch):
    words = ("chat", small_run.path, "--template", template, "--new-tokens", 5, "--temperature", 0)
    one = cairn(*words, "-m", "the way", "--json").document
    assert one["answer"] == one["messages"][-1]["content"] and cairn(*words, "-m", "the way").out == one["answer"] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("the way\n/new\nthe way\n\n" + "x" * 3000 + "\nthe way\n/quit\nthe way\n"))
    talked = cairn(*words)
    lines = talked.out.splitlines()
    assert talked.status == 0 and len(lines) == 3 and lines[0] == lines[1] == one["answer"]
    assert talked.err.count("cairn: The conversation has") == 1
    refused = cairn("chat", small_run.path, "-m", "the")
    assert refused.status == 2 and "carries no chat template" in refused.err and refused.err.count("\n") == 1


def test_prompts_from_everywhere(cairn, small_run, tmp_path, monkeypatch):
    words = ("generate", small_run.path, "--new-tokens", 6, "--temperature", 0)
    plain = cairn(*words, "--prompt", "the stone", "--json").document
    assert cairn(*words, "--prompt", "the stone").out == f"the stone{plain['text']}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("the stone\n"))
    assert cairn(*words, "--json").document == plain
    (tmp_path / "one.txt").write_text("the stone\n")
    assert cairn(*words, "--file", tmp_path / "one.txt", "--json").document == plain
    (tmp_path / "many.jsonl").write_text(json.dumps({"prompt": "the stone"}) + "\n\n" + json.dumps({"text": "a way"}) + "\n")
    many = cairn(*words, "--file", tmp_path / "many.jsonl", "--json").document
    assert many[0] == plain and many[1]["prompt"] == "a way"
    assert cairn(*words, "--file", tmp_path / "many.jsonl").out.split("\n\n")[0] == f"the stone{plain['text']}"
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n')
    for arguments, said in (
        (("--file", tmp_path / "bad.jsonl"), "line 1"),
        (("--file", tmp_path / "none.txt"), "no file"),
        (("--file", tmp_path / "one.txt", "--prompt", "x"), "not both"),
        (("--prompt", "x", "--chat"), "carries no chat template"),
    ):
        refused = cairn(*words, *arguments)
        assert refused.status == 2 and said in refused.err and refused.err.count("\n") == 1
