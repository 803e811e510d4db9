"""Copies in the training data, counted against a plain search."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.evaluation.audits import audit, exposure

ids = st.lists(st.integers(0, 2), max_size=30)


@given(ids, st.lists(st.integers(0, 2), max_size=4), st.sampled_from([np.uint16, np.uint32]), st.integers(1, 40))
def test_occurrences_are_those_of_a_plain_search_whatever_the_chunk(tokens, pattern, dtype, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exposure, "_CHUNK", chunk)
        found = exposure.occurrences(np.array(tokens, dtype), pattern)
    expected = sum(tokens[i : i + len(pattern)] == pattern for i in range(len(tokens) - len(pattern) + 1)) if pattern else 0
    assert found == expected


def test_a_match_between_two_ids_is_none():
    assert exposure.occurrences(np.array([0x0100, 0x0001], np.uint16), [0x0101]) == 0
    assert exposure.occurrences(np.array([1, 2], np.uint16), [70000]) == 0


def test_an_audit_of_known_data_says_which_items_are_in_them(small_run, corpus_file, tmp_path):
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    rows = [{"question": texts[i][:60], "options": ["rain", "stone"]} for i in range(40)] + [{"question": "never written", "options": ["on", "way"]}]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = audit.leakage(small_run.newest(), {"path": path}, known=True, store=False)
    counts = [item["copies"] for item in found["items"]]
    assert counts[-1] == 0 and sum(count > 0 for count in counts[:-1]) >= 30, "held-out documents are not training data"
    assert found["agreement"]["with_copies"] + found["agreement"]["without"] == 41 and 0 <= found["agreement"]["auc"] <= 1
    assert exposure.agreement([0.1, 0.2], [1, 1])["auc"] is None
