"""Data ablations by merging: exact identities, nothing trained or measured twice, and what the agreement figures say."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from cairn.checkpoint.format import read
from cairn.cli.main import main
from cairn.errors import InputError, NotFoundError
from cairn.merging.ablate import AblationRow, BranchPool, agreement
from cairn.merging.combine import merge
from cairn.options import configure
from tests.merging.merge_drawing import drawn, family, saved, whole


@pytest.fixture
def parts(tmp_path):
    words = {"a": "stone on the trail ", "b": "rain comes before ", "c": "who walks again "}
    for name, text in words.items():
        (tmp_path / f"{name}.txt").write_text(text * 60)
    return {name: str(tmp_path / f"{name}.txt") for name in words}


def domain(path):
    return configure("measurement", {"name": "held-out", "corpus": path, "sequences": 4, "sequence_length": 32})


def test_a_branch_is_trained_once_and_a_loss_measured_once(small_run, parts, tmp_path):
    pool = BranchPool(small_run.newest(), tmp_path / "pool", ["data.held_out=0"])
    for name, path in parts.items():
        pool.add(name, path, steps=2, partition="ab" if name in "ab" else "c")
    assert pool.trainings == 3
    domains = {name: domain(path) for name, path in parts.items()}
    rows = pool.ablate(pool.candidates(2), domains)
    assert len(rows) == 9 and all(row.best_branch <= row.mean_of_branches for row in rows)
    known = pool.validate([row for row in rows if row.candidate == ("a", "b")], domains, steps=2)
    assert pool.trainings == 4 and all(row.truth is not None for row in known)

    again = BranchPool(small_run.newest(), tmp_path / "pool", ["data.held_out=0"])
    for name, path in parts.items():
        again.add(name, path, steps=2, partition="ab" if name in "ab" else "c")
    again._bench = None
    assert again.ablate(again.candidates(2), domains) == rows
    assert again.trainings == 0 and again._bench is None  # every loss was found under the digests
    assert again.weights(("a", "b", "c"), "macro") == [0.25, 0.25, 0.5] and again.weights(("a", "c"), "macro") == [0.5, 0.5]
    assert again.weights(("a", "b", "c")) == pytest.approx([1 / 3] * 3)
    again.validate([row for row in rows if row.candidate == ("a", "c")], domains, steps=2, weighting="macro")
    recipe = read.open(tmp_path / "pool/unions/a+c-macro").lineage.options["recipe"]
    assert {name: source["weight"] for name, source in recipe["data"]["sources"].items()} == {"a": 0.5, "c": 0.5}
    with pytest.raises(InputError, match="was trained for 2 steps, not 3"):
        BranchPool(small_run.newest(), tmp_path / "pool", ["data.held_out=0"]).add("a", parts["a"], steps=3)
    with pytest.raises(InputError, match="has a branch 'a' already"):
        again.add("a", parts["a"], steps=2)
    with pytest.raises(NotFoundError, match="no branch 'd'"):
        again.ablate([("a", "d")], domains)


def test_where_partitions_have_equally_many_units_macro_is_micro(small_run, parts, tmp_path):
    pool = BranchPool(small_run.newest(), tmp_path / "pool", ["data.held_out=0"])
    for name, path in {**parts, "d": parts["a"]}.items():
        pool.add(name, path, steps=1, partition="first" if name in "ab" else "second")
    domains = {"c": domain(parts["c"])}
    assert pool.ablate([("a", "b", "c", "d")], domains, "macro") == pool.ablate([("a", "b", "c", "d")], domains, "micro")
    (uneven,), (even,) = (pool.ablate([("a", "b", "c")], domains, weighting) for weighting in ("macro", "micro"))
    assert uneven.merge != even.merge


def test_the_command_line_takes_partitions_and_refuses_strangers(small_run, parts, tmp_path, monkeypatch, capsys):
    settings = [*(f"{name}={path}" for name, path in parts.items()), f"domain.c={parts['c']}", "train.data.held_out=0"]
    command = ["cairn", "ablate", str(small_run.newest().path), *settings, "--pool", str(tmp_path / "pool"), "--steps=1", "--size=3", "--sequences=4", "--json"]
    losses = {}

    def ended(*further):
        monkeypatch.setattr(sys, "argv", [*command, *further])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0

    for weighting in ("micro", "macro"):
        assert ended("partition.a=first", "partition.b=first", "--weighting", weighting) == 0
        losses[weighting] = json.loads(capsys.readouterr().out)["ranking"][0]["loss"]
    assert losses["micro"] != losses["macro"]
    assert ended("partition.e=first") == 2 and "no part 'e'" in capsys.readouterr().err


def test_branches_of_a_checkpoint_that_is_no_runs_are_refused(tmp_path, parts):
    pool = BranchPool(saved(tmp_path / "alone", drawn(0)), tmp_path / "pool")
    with pytest.raises(InputError, match="not the checkpoint of a run"):
        pool.add("a", parts["a"], steps=1)


def test_one_step_of_plain_descent_on_each_unit_averages_to_the_step_on_their_union():
    torch.manual_seed(0)
    seed = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    data, targets = torch.randn(12, 5).double(), torch.randn(12, 3).double()

    def stepped(rows):
        model = copy.deepcopy(seed)
        torch.nn.functional.mse_loss(model(data[rows]), targets[rows]).backward()
        return [p.detach() - 0.3 * p.grad for p in model.parameters()]

    branches = [stepped(slice(4 * k, 4 * k + 4)) for k in range(3)]
    for *parts, union in zip(*branches, stepped(slice(0, 12)), strict=True):
        assert (sum(parts) / 3 - union).abs().max() < 1e-12


def test_the_mean_of_a_union_is_the_weighted_mean_of_means(tmp_path):
    members = family(tmp_path, 5)
    a, b = merge("average", members[:2], tmp_path / "a"), merge("average", members[2:5], tmp_path / "b")
    union = merge("linear", [a, b], tmp_path / "ab", {"weights": [2, 3]})
    assert torch.allclose(whole(union), whole(merge("average", members[:5], tmp_path / "all")), atol=1e-6)
    assert torch.equal(whole(merge("average", [members[0]] * 4, tmp_path / "same")), whole(members[0]))


def test_agreement_is_scipys():
    generator = np.random.default_rng(0)
    names = [("x", "y"), ("x", "z"), ("y", "z"), ("x", "w"), ("y", "w"), ("z", "w")]
    rows = [AblationRow(c, d, *generator.normal(size=3), truth=generator.normal()) for c in names for d in "xyzw"]
    found = agreement(rows)
    each = [[(row.merge, row.truth) for row in rows if row.domain == d] for d in "xyzw"]
    inside, outside = ([[(row.merge, row.truth) for row in rows if row.domain == d and row.inside is where] for d in "xyzw"] for where in (True, False))
    assert found["pearson"] == pytest.approx(np.mean([stats.pearsonr(*zip(*pairs, strict=True))[0] for pairs in each]))
    assert found["pearson_outside"] == pytest.approx(np.mean([stats.pearsonr(*zip(*pairs, strict=True))[0] for pairs in outside]))
    assert found["pearson_inside"] == pytest.approx(np.mean([stats.pearsonr(*zip(*pairs, strict=True))[0] for pairs in inside]))
    for where, some in (("inside", inside), ("outside", outside)):
        assert found[f"error_{where}"] == pytest.approx(np.mean([abs(a - b) for pairs in some for a, b in pairs]))
    macro = np.mean(each, axis=0)
    assert found["spearman_macro"] == pytest.approx(stats.spearmanr(*macro.T)[0])
    assert found["regret"] == pytest.approx((macro[macro[:, 0].argmin(), 1] - macro[:, 1].min()) / np.ptp(macro[:, 1]))
    assert found["error"] == pytest.approx(np.mean([abs(row.merge - row.truth) for row in rows]))
