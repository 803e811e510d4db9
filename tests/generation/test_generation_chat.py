"""Chat: the template in front, every end token behind, pieces that add up to the answer, and Ctrl-C that keeps what was said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import cairn
from cairn.checkpoint.format import read
from cairn.errors import DamagedError, InputError, NotFoundError
from cairn.generation import chat as chats
from cairn.generation.sample import _settled, generate_texts

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def talker(small_run, tmp_path_factory) -> Path:
    """A small model whose directory carries a template."""
    folder = tmp_path_factory.mktemp("talk") / "model"
    cairn.export(small_run.newest(), folder)
    for name in ("manifest.json", "lineage.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_model_reads_the_template_and_the_answer_comes_in_pieces(talker: Path) -> None:
    opened = read.open(talker)
    ids = opened.tokenizer.encode("system: be\nuser: the stone\nassistant: ")
    (whole,) = generate_texts(opened.model(), opened.tokenizer, [ids], max_new_tokens=20, temperature=0)
    pieces: list[str] = []
    said = cairn.chat(talker, "the stone", system="be", new_tokens=20, temperature=0, told=pieces.append)
    assert said == whole.strip() and "".join(pieces) == whole and len(pieces) > 5
    assert (
        cairn.generate(talker, "the stone", chat=True, new_tokens=9, temperature=0)
        == cairn.generate(talker, ["the stone"], chat=True, new_tokens=9, temperature=0)[0]
    )


def test_what_has_been_said_is_read_again(talker: Path) -> None:
    talk = chats.Chat(talker, system="be", new_tokens=8, temperature=0)
    first, second = talk.ask("the way"), talk.ask("and")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    whole = [*talk.messages[:-1]]
    assert cairn.chat(talker, whole, new_tokens=8, temperature=0) == second and whole[2]["content"] == first
    talk.begin()
    assert talk.messages == [{"role": "system", "content": "be"}]


def test_an_answer_stops_at_every_end_token_of_every_file(talker: Path, tmp_path: Path) -> None:
    whole = cairn.chat(talker, "the stone", new_tokens=30, temperature=0)
    tokenizer = read.open(talker).tokenizer
    ends = sorted({tokenizer.encode(letter)[0] for letter in set(whole[3:6])})
    for name in ("config.json", "generation_config.json"):
        folder = shutil.copytree(talker, tmp_path / name)
        before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(before | {"eos_token_id": [256, *ends]}))
        cut = min(whole.index(letter) for letter in whole if tokenizer.encode(letter)[0] in ends)
        assert cairn.chat(folder, "the stone", new_tokens=30, temperature=0) == whole[:cut].strip()


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(talker: Path) -> None:
    talk, pieces = chats.Chat(talker, new_tokens=30, temperature=0), []

    def hear(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    answer = talk.ask("the stone", hear)
    assert answer == "".join(pieces).strip() and talk.messages[-1]["content"] == answer
    assert talk.ask("and", lambda piece: None) and len(talk.messages) == 4


def test_a_conversation_that_is_too_long_and_checkpoints_that_do_not_talk(talker: Path, small_run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="begin a new one"):
        cairn.chat(talker, "x" * 3000)
    with pytest.raises(InputError, match="carries no chat template"):
        cairn.chat(small_run.newest(), "the")
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    assert isinstance(cairn.chat(small_run.newest(), "the", template=tmp_path / "mine.jinja", new_tokens=3), str)
    with pytest.raises(NotFoundError, match="no chat template at"):
        cairn.chat(small_run.newest(), "the", template=tmp_path / "none.jinja")
    with pytest.raises(InputError, match="--chat"):
        cairn.generate(small_run.newest(), "the", template=tmp_path / "mine.jinja")


def test_where_templates_lie(talker: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(talker, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for found in (TEMPLATE, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": found}))
        assert cairn.chat(folder, "the stone", new_tokens=9, temperature=0) == cairn.chat(talker, "the stone", new_tokens=9, temperature=0)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(DamagedError, match="is not UTF-8"):
        cairn.chat(folder, "the")


def test_nothing_is_told_that_may_still_change(talker: Path) -> None:
    assert _settled("so\ufffd", []) == "so" and _settled("end Us", ["User:"]) == "end " and _settled("User", ["User"]) == "User"
    opened = read.open(talker)
    pieces: list[str] = []
    options = {"max_new_tokens": 40, "temperature": 0}
    ids = [opened.tokenizer.encode("the stone")]
    (whole,) = generate_texts(opened.model(), opened.tokenizer, ids, **options)
    stop = whole[6:9]
    (cut,) = generate_texts(opened.model(), opened.tokenizer, ids, stop=[stop], told=pieces.append, **options)
    assert "".join(pieces) == cut == whole[: whole.index(stop)]
    with pytest.raises(InputError, match="One text can be told"):
        generate_texts(opened.model(), opened.tokenizer, [*ids, *ids], told=pieces.append, **options)


def test_the_real_model_talks(smollm: Path) -> None:
    assert cairn.chat(smollm, "What is the capital of France?", temperature=0, new_tokens=12) == "The capital of France is Paris."
