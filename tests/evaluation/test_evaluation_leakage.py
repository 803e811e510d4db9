"""The leakage audit: exact on models that are known, calibrated where nothing leaked."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig

from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.evaluation.items import encoded_from
from cairn.evaluation.measurements import leakage
from cairn.evaluation.measurements.leakage import Leakage, orders, outlier_scores, rank_shares
from cairn.evaluation.scoring import log_likelihoods

ITEMS = [{"question": f"item {i}", "options": [f"{word}{i}" for word in ("stone", "rain", "way", "trail")]} for i in range(12)]


@pytest.fixture
def audit(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ITEMS))
    return Leakage(path=path)


class Bytes(torch.nn.Module):
    """A model whose next byte depends on the last `context` bytes alone: with none it does not see any order."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context, self.config = context, PretrainedConfig(vocab_size=257)
        self.table = torch.nn.Parameter(torch.randn(4096, 257, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, use_cache=False):
        state = torch.zeros_like(input_ids)
        for back in range(self.context):
            state[:, back:] = (state[:, back:] * 31 + input_ids[:, : input_ids.shape[1] - back] + 1) % 4096
        return type("Output", (), {"logits": self.table[state]})


def test_all_orders_are_there_once_and_the_published_one_is_first():
    assert sorted(map(tuple, orders(4, 24).tolist())) == sorted(itertools.permutations(range(4)))
    drawn = orders(5, 24, seed=3)
    assert drawn[0].tolist() == list(range(5)) and len(set(map(tuple, drawn.tolist()))) == 24
    assert (np.sort(drawn, axis=1) == np.arange(5)).all()


def test_scores_are_the_option_block_given_all_before_it_wherever_a_label_stands(small_run, audit, tmp_path):
    """Recomputed text by text; a question that holds the label itself does not move the place."""
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": "which A: is A:", "options": ["on", "rain"]}) + "\n")
    model, tokenizer = small_run.newest().model(), byte_level()
    seen = audit.look(model, tokenizer)["items"][0]
    for way, score in zip(((0, 1), (1, 0)), seen, strict=True):
        options = ["on", "rain"]
        ids = [tokenizer.eos_id, *tokenizer.encode(f"\nwhich A: is A::\nA:{options[way[0]]}\nB:{options[way[1]]}\n")]
        start = 1 + len("\nwhich A: is A::\nA:")
        assert score == pytest.approx(log_likelihoods(model, [ids], starts=[start])[0], rel=1e-4)


def test_a_model_that_does_not_see_order_ties_everywhere_and_is_not_accused(audit):
    seen = audit.look(Bytes(0), byte_level())
    table = np.array(seen["items"])
    assert np.abs(table - table[:, :1]).max() < 1e-4
    found = audit.judge(seen)
    assert {item["rank"] for item in found["items"]} == {(24 + 1) / 48} and found["a_first"] == 0 and found["a_auc"] == 0.5
    assert (table >= table.max(axis=1, keepdims=True) - leakage.TIE).all(), "a rule that counts ties as leaked would accuse all of them"


def test_a_model_that_knows_the_published_order_is_caught(audit):
    table = np.random.default_rng(0).normal(size=(12, 24))
    table[:, 0] = 9
    found = audit.judge({"ids": list(range(12)), "items": table.tolist()})
    assert found["a_first"] == 1 and {item["rank"] for item in found["items"]} == {1 / 24} and found["a_p"] < 1e-3
    assert found["b_flagged"] is None, "without a control of its own scenario b says nothing"
    assert all(item["q"] <= 0.1 for item in found["items"])


def test_a_reference_takes_away_what_both_models_prefer(audit):
    table = np.random.default_rng(1).normal(size=(12, 24))
    preferred = table + 5 * np.eye(24)[0]
    seen, reference = ({"ids": list(range(12)), "items": each.tolist()} for each in (preferred, preferred - table))
    assert audit.judge(seen)["a_first"] == 1 and audit.judge(seen, reference)["a_first"] < 0.5
    with pytest.raises(InputError, match="same options"):
        audit.judge(seen, {"ids": [], "items": [[0.0]] * 12})


def test_the_best_of_a_row_stands_out_as_in_a_forest_of_many_trees():
    forests = pytest.importorskip("sklearn.ensemble")
    rows = np.random.default_rng(2).normal(size=(2, 24))
    for row, ours in zip(rows, outlier_scores(rows), strict=True):
        theirs = [forests.IsolationForest(n_estimators=120, random_state=state).fit(row[:, None]).decision_function([[row.max()]])[0] for state in range(2)]
        assert ours == pytest.approx(np.mean(theirs), abs=0.025)
    assert outlier_scores([[1.0] * 6])[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_t"])
def test_without_a_leak_calibrated_tests_keep_their_level_and_published_thresholds_do_not(draw, audit):
    chooser = np.random.default_rng(3)
    make = {"normal": chooser.normal, "laplace": chooser.laplace, "standard_t": lambda size: chooser.standard_t(3, size)}[draw]
    clean, control = (outlier_scores(make(size=(2000, 24))) for _ in range(2))
    assert (clean < np.quantile(control, 0.05)).mean() == pytest.approx(0.05, abs=0.015)
    assert (clean < -0.17).mean() > 0.3
    rejected = 0
    for _ in range(200):
        rows = [make(size=(40, 24)) for _ in range(2)]
        p = leakage._scenario_a(list(rows[0]), list(rows[1]), [0] * 40, list(range(40)))["a_p"]
        rejected += p < 0.05
    assert rejected / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_ranks_share_ties():
    assert rank_shares([[1.0, 2.0, 1.0, 0.0]]).tolist() == [2.5 / 4]
    assert rank_shares([[3.0, 2.0], [0.0, 2.0]], [0, 0]).tolist() == [0.5, 1.0]


def test_items_whose_options_repeat_are_left_out_and_named_when_none_is_left(audit, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": "q", "options": ["a", "a"]}) + "\n")
    with pytest.raises(InputError, match="all of them different"):
        audit.look(Bytes(1), byte_level())
    (tmp_path / "items.jsonl").write_text(json.dumps({"frage": "q", "options": ["a", "b"]}) + "\n")
    with pytest.raises(InputError, match="item 1 has no 'question'"):
        audit.look(Bytes(1), byte_level())


def test_a_border_inside_a_token_counts_to_what_follows():
    tokenizer = byte_level()
    ids, starts = encoded_from(tokenizer, [("ab", "c"), ("", "x"), ("ü", "b")])
    assert starts == [3, 1, 3] and ids[0] == [tokenizer.eos_id, *tokenizer.encode("abc")]
