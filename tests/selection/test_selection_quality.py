"""Documents chosen by an n-gram model, against counting by hand."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.data import corpora
from cairn.errors import InputError
from cairn.selection.quality import NGram, best_documents, likest


def by_hand(texts, text, order):
    """The formula, with strings and loops."""
    reference, text = "\n".join(texts).encode(), text.encode()

    def chance(history, c):
        if history is None:
            return 1 / 256
        shorter = history[1:] if history else None
        total = sum(reference[i : i + len(history)] == history for i in range(len(reference) - len(history)))
        kinds = len({reference[i + len(history)] for i in range(len(reference) - len(history)) if reference[i : i + len(history)] == history})
        seen = sum(reference[i : i + len(history) + 1] == history + c for i in range(len(reference) - len(history)))
        below = chance(shorter, c)
        return (seen + kinds * below) / (total + kinds) if total else below

    logs = [math.log2(chance(text[max(0, i - order + 1) : i], text[i : i + 1])) for i in range(len(text))]
    return -sum(logs) / len(logs)


KILOBYTE = ["the stone marks the trail and who comes after can walk it again. " * 8, "naïve 石 and rain, rain, rain; " * 14]


@pytest.mark.parametrize("text", ["the trail", "rain again 石", "zzz", "t", "the stone marks the trail and who"])
def test_it_is_what_counting_by_hand_gives(text):
    assert NGram(KILOBYTE, 5).bits(text) == pytest.approx(by_hand(KILOBYTE, text, 5), rel=1e-12)


@given(st.text(min_size=1, max_size=40))
def test_chances_are_chances(text):
    model = NGram(KILOBYTE, 3)
    assert 0 < model.bits(text) < 20
    assert model.bits(KILOBYTE[0]) < model.bits("qxj" + text[::-1] + "0189") or len(text) < 3


def test_the_chances_of_all_bytes_after_a_history_sum_to_one():
    model = NGram(["abacabadabacaba"], 3)
    for history in ("ab", "zz", "ba"):
        chances = [2 ** -(model.bits(history + chr(c)) * 3 - model.bits(history) * 2) for c in range(128)]
        assert sum(chances) + 128 * chances[0] == pytest.approx(1.0, rel=1e-9), "the other 128 bytes are as unseen as the first"


def test_the_best_are_kept_the_very_likest_and_repetitions_are_not(tmp_path):
    texts = ["AAAA " * 40, *(f"walk {i} on the trail " * 6 for i in range(10)), "%$#@ " * 40, "%$#@ " * 40]
    path, good = tmp_path / "c.jsonl", tmp_path / "good.txt"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    good.write_text("AAAA " * 400 + "walk on the trail " * 50)
    kept = [d.text for d in corpora.resolve(str(best_documents(str(path), str(good), keep=0.5, clip=0.01))).documents()]
    assert 4 <= len(kept) <= 8 and all("walk" in text for text in kept) and kept == sorted(kept, key=texts.index)
    assert best_documents(str(path), str(good), keep=0.5, clip=0.01).read_text() == "".join(json.dumps({"text": t}) + "\n" for t in kept)


def test_shares_are_of_bytes():
    assert likest([1.0, 2.0, 3.0, 4.0], [10, 10, 20, 60], keep=0.3, clip=0.1) == [1, 2]
    assert likest([4.0, 1.0], [10, 10], keep=0.5, clip=0.0) == [1]


def test_an_empty_reference_is_refused():
    with pytest.raises(InputError, match="no text to compare"):
        NGram([])
