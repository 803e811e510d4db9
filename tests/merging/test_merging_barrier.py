"""The barrier between two checkpoints: closed forms, the ends, and a model whose units were renumbered."""

import json
import math
import sys

import pytest
import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.saving import write
from cairn.cli.main import main
from cairn.errors import InputError, MismatchError
from cairn.merging.barrier import barrier, between
from cairn.merging.target import Bench, objective


def test_a_bowl_has_no_barrier_and_a_double_well_has_its_own():
    bowl = barrier(lambda a: (a - 0.3) ** 2)
    assert bowl.height == 0 and bowl.shares[0] == 0 and bowl.shares[-1] == 1 and bowl.losses[0] == pytest.approx(0.09)
    # (a^2 - a)^2 is zero at both ends and 1/16 in the middle; a slope between the ends changes no barrier.
    for slope in (0.0, 0.5):
        well = barrier(lambda a, slope=slope: (a * a - a) ** 2 + slope * a + 2)
        assert well.height == pytest.approx(1 / 16)
    assert barrier(lambda a: a * (1 - a), points=3).height == pytest.approx(0.25)
    with pytest.raises(InputError, match="three points or more, not 2"):
        barrier(lambda a: a, points=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_the_loss_is_no_number_nothing_is_told(value):
    with pytest.raises(InputError, match=r"at share 0\.5 of the first is (nan|inf)"):
        barrier(lambda a: value if a == 0.5 else 1.0)


def test_checkpoints_of_other_shapes_have_no_line_between_them(small_run, goal, tmp_path):
    newest = small_run.newest()
    tensors = newest.tensors.load() | {"model.norm.weight": torch.ones(7)}
    other = write.save(tmp_path / "other", model=tensors, config=newest.config, tokenizer=newest.tokenizer, lineage=newest.lineage)
    with pytest.raises(MismatchError, match=r"model\.norm\.weight"):
        between(newest, other, goal)


@pytest.fixture
def goal(small_run, tmp_path):
    (tmp_path / "a.txt").write_text("the stone on the trail marks the way " * 40)
    return objective("held-out", small_run.newest(), select={"corpus": str(tmp_path / "a.txt"), "sequence_length": 32}, report=None)


def renumbered(checkpoint, out):
    """The same model with the units of its MLPs in reverse order."""
    tensors = checkpoint.tensors.load()
    for name in tensors:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = tensors[name].flip(0).contiguous()
        elif name.endswith("down_proj.weight"):
            tensors[name] = tensors[name].flip(1).contiguous()
    return write.save(out, model=tensors, config=checkpoint.config, tokenizer=checkpoint.tokenizer, lineage=checkpoint.lineage)


def test_the_ends_are_the_checkpoints_and_units_in_another_order_are_a_barrier(small_run, goal, tmp_path):
    first, last = read.open(small_run.checkpoints()[0]), small_run.newest()
    bench = Bench([first])
    found = between(last, first, goal, points=5)
    assert found.losses[0] == pytest.approx(bench.alone(first, goal.select).value, abs=1e-6)
    assert found.losses[-1] == pytest.approx(bench.alone(last, goal.select).value, abs=1e-6)
    same = between(last, last, goal, points=3)
    assert same.height < 1e-6
    other = renumbered(last, tmp_path / "renumbered")
    assert bench.alone(other, goal.select).value == pytest.approx(bench.alone(last, goal.select).value, abs=1e-4)
    assert between(last, other, goal, points=3).height > 100 * max(same.height, 1e-6)


def test_more_accuracy_is_less_loss(small_run, goal):
    from dataclasses import replace

    first, last = read.open(small_run.checkpoints()[0]), small_run.newest()
    turned = between(last, first, replace(goal, lower=False), points=3)
    assert turned.losses == [-value for value in between(last, first, goal, points=3).losses]


def test_the_command_line(small_run, goal, tmp_path, monkeypatch, capsys):
    first, last = small_run.checkpoints()[0], small_run.checkpoints()[-1]
    given = ["--measure", "held-out", f"select.corpus={tmp_path / 'a.txt'}", "select.sequence_length=32"]

    def cairn(*arguments):
        monkeypatch.setattr(sys, "argv", ["cairn", "merge", "barrier", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    code, out, _ = cairn(last, first, *given, "points=3", "--json")
    found = json.loads(out)
    assert code == 0 and found["shares"] == [0, 0.5, 1] and found == between(read.open(last), read.open(first), goal, points=3).plain()
    assert "barrier 0." in cairn(last, first, *given, "points=3")[1]
    for arguments, sentence in [
        ((last, *given), "takes two checkpoints"),
        ((last, first, *given, "share=1"), "takes two checkpoints"),
        ((last, first), "name it with --measure"),
        ((last, first, *given, "-o", tmp_path / "out"), "writes nothing"),
        ((last, first, *given, "points=many"), "whole number"),
        ((last, first, *given, "report.corpus=x"), "one set of data"),
        ((last, first, *given, "--base", first), "no --base"),
    ]:
        code, _, said = cairn(*arguments)
        assert code == 2 and sentence in " ".join(said.split()), said
    assert not (tmp_path / "out").exists()
