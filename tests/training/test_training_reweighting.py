"""Weights from losses: closed forms, the optimisation that they solve, and one global batch however it is divided."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.errors import InputError, ResumeError
from cairn.training.recipe import Recipe
from cairn.training.reweighting.loss_based import WEIGHTINGS, LossBased, loss_weights, relative
from cairn.training.run import resume, train
from tests.faults import torchrun
from tests.training.test_training_run import trainer

NAMES = sorted(WEIGHTINGS)
LOSSES = st.lists(st.floats(0, 20), min_size=2, max_size=40)
ON = ["reweighting={name: loss-based, warmup: 0 tokens}"]


@given(losses=LOSSES, weighting=st.sampled_from(NAMES), temperature=st.floats(0.05, 100))
def test_weights_are_a_distribution_that_follows_its_losses_about(losses, weighting, temperature):
    losses = torch.tensor(losses, dtype=torch.float64)
    found = loss_weights(losses, weighting, temperature)
    assert float(found.sum()) == pytest.approx(1) and bool((found >= 0).all())
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loss_weights(losses[order], weighting, temperature), found[order])
    if float(losses.max() - losses.min()) > 1e-3:  # not so close together that they count as equal
        assert torch.allclose(loss_weights(3.5 * losses + 2, weighting, temperature), found, atol=1e-9)


@pytest.mark.parametrize("weighting", NAMES)
def test_edges(weighting):
    assert loss_weights(torch.tensor([2.5]), weighting).tolist() == [1.0]
    assert torch.allclose(loss_weights(torch.full((8,), 3.7), weighting), torch.full((8,), 1 / 8, dtype=torch.float64))
    spread = torch.linspace(1, 5, 9)
    assert (loss_weights(spread, weighting, 1e6) - 1 / 9).abs().max() < 1e-6


def test_shapes_are_the_published_ones():
    losses = torch.linspace(0, 4, 9, dtype=torch.float64)  # relative losses -1 ... 1
    assert relative(losses).tolist() == torch.linspace(-1, 1, 9, dtype=torch.float64).tolist()
    by_name = {name: loss_weights(losses, name, 0.4) for name in NAMES}
    log = {name: (w.log() * 0.4 - w.log()[0] * 0.4) for name, w in by_name.items()}  # f, up to a constant
    assert torch.allclose(log["linupper"], torch.tensor([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert torch.allclose(log["upper"], torch.linspace(0, 1, 9, dtype=torch.float64))
    assert torch.allclose(log["quadratic"], 1 - torch.linspace(-1, 1, 9, dtype=torch.float64) ** 2)
    assert torch.allclose(log["extremes"], torch.linspace(-1, 1, 9, dtype=torch.float64).abs() - 1)


@pytest.mark.parametrize("weighting", ["linupper", "quadratic", "extremes"])
def test_the_closed_form_solves_the_optimisation_that_it_comes_from(weighting):
    """max over the simplex of sum w f(h) + r * entropy(w), by a solver that knows no closed form."""
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    for _ in range(7):
        losses, r = torch.from_numpy(rng.exponential(1.0, 6)), float(rng.uniform(0.3, 1.5))
        f = WEIGHTINGS[weighting](relative(losses)).numpy()
        found = scipy.minimize(
            lambda w: float(-(w @ f) + r * (w @ np.log(w))),  # noqa: B023
            np.full(6, 1 / 6),
            jac=lambda w: -f + r * (np.log(w) + 1),  # noqa: B023
            bounds=[(1e-9, 1)] * 6,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert np.abs(found.x - loss_weights(losses, weighting, r).numpy()).max() < 1e-6


def gradient(each):
    return torch.cat([p.grad.flatten() for p in each.model.parameters()])


def test_the_gradient_is_the_weighted_sum_of_those_of_the_sequences(small_recipe):
    """The weights carry none: each sequence's own gradient by an objective of its own, summed by hand."""
    each = trainer(small_recipe, *ON, "training.precision=float64")
    (micro_batch,) = each.micro_batches(0)
    loss, figures = each.gradients([micro_batch])
    found = gradient(each)
    losses, gradients = [], []
    for row in range(8):
        each.optimizer.zero_grad()
        one = each.model(micro_batch.inputs["input_ids"][row : row + 1], targets=micro_batch.inputs["targets"][row : row + 1]).loss / 32
        one.backward()
        losses.append(one.detach())
        gradients.append(gradient(each))
    weights = loss_weights(torch.stack(losses), "linupper", 0.4)
    assert (found - (weights[:, None] * torch.stack(gradients)).sum(0)).abs().max() < 1e-12
    assert loss == pytest.approx(float(torch.stack(losses).mean())) and figures["reweighting/loss"] == pytest.approx(float(weights @ torch.stack(losses)))
    assert figures["reweighting/ess"] == pytest.approx(float(1 / weights.square().sum())) and figures["reweighting/largest"] == float(weights.max())


@pytest.mark.parametrize("extra", ["reweighting.token_weighted=false", "reweighting.token_weighted=true"])
def test_accumulation_never_changes_the_gradient(small_recipe, extra):
    """1 x 16 = 4 x 4 = 16 x 1 sequences; windows that are not full, so that sequences differ in their tokens."""
    found = []
    for micro_batch in (16, 4, 1):
        sizes = ["data.packing=whole", "data.sequence_length=128", f"training.batch={16 * 128}", f"training.micro_batch={micro_batch * 128}"]
        each = trainer(small_recipe, *ON, extra, *sizes, "training.precision=float64")
        loss, figures = each.gradients(each.micro_batches(0))
        found.append((float(loss), dict(figures), gradient(each)))
    for loss, figures, grad in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-10) and figures == pytest.approx(found[0][1], rel=1e-9)
        assert (grad - found[0][2]).abs().max() < 1e-12


def test_equal_weights_by_tokens_are_the_plain_mean(small_recipe):
    settings = ["data.packing=whole", "data.sequence_length=128", "training.batch=1024", "training.precision=float64"]
    plain = trainer(small_recipe, *settings)
    weighted = trainer(small_recipe, *settings, "reweighting={name: loss-based, weighting: uniform, token_weighted: true}")
    losses = [float(each.gradients(each.micro_batches(0))[0]) for each in (plain, weighted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and (gradient(plain) - gradient(weighted)).abs().max() < 1e-12
    by_sequence = trainer(small_recipe, *settings, "reweighting={name: loss-based, weighting: uniform}")
    by_sequence.gradients(by_sequence.micro_batches(0))
    assert (gradient(plain) - gradient(by_sequence)).abs().max() > 1e-6


WORKER = """
import json, os, sys
import torch.distributed as dist
from cairn.training.run import train
dist.init_process_group("gloo")
recipe, folder, settings = json.loads(sys.argv[1])
for name, each in settings.items():
    train(recipe, f"{folder}/{name}", each)
os._exit(0)
"""


def test_two_processes_see_one_global_batch(small_recipe, tmp_path):
    """With the smallest and largest loss of a rank's own half, the curves part at the first step."""
    shared = [*ON, "training.tokens=6 steps", "training.precision=float64"]
    layouts = {"data": ["parallel.data=2"], "shard": ["parallel.shard=2"], "micro": ["parallel.data=2", "training.micro_batch=64"]}
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", json.dumps([small_recipe, str(tmp_path), {name: [*shared, *more] for name, more in layouts.items()}]))
    from cairn.training.run import Run

    alone = train(small_recipe, tmp_path / "alone", shared).metrics()
    for name in layouts:
        rows = Run(tmp_path / name).metrics()
        for key in ("loss", "grad_norm", "reweighting/ess", "reweighting/loss"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in alone], rel=1e-6), (name, key)


def test_warm_up_counts_all_the_same_and_what_is_logged_can_be_compared(small_recipe, corpus_file, tmp_path):
    settings = ["reweighting={name: loss-based, warmup: 25%}", f"data.sources.more.corpus={corpus_file}", "training.tokens=12 steps"]
    run = train(small_recipe, tmp_path / "run", settings)
    rows = run.metrics()
    assert [row["reweighting/ess"] == pytest.approx(8) for row in rows] == [True] * 3 + [False] * 9
    assert all(row["reweighting/share/more"] + row["reweighting/share/walks"] == pytest.approx(1) for row in rows)
    plain = train(small_recipe, tmp_path / "plain", settings[1:])
    assert [r["loss"] for r in rows[:4]] == pytest.approx([r["loss"] for r in plain.metrics()[:4]], rel=1e-5)  # the unweighted mean
    assert run.recipe.reweighting.warmup.value == 3 * 256


def test_what_can_not_be_reweighted_is_refused_and_a_resume_can_not_change_it(small_recipe, small_run, tmp_path):
    with pytest.raises(InputError, match="reweighting needs the loss of each token"):
        Recipe.parse({**small_recipe, "reweighting": "loss-based", "objective": {"name": "causal-lm", "z_loss": 1e-4}})
    with pytest.raises(ResumeError, match="cannot change reweighting"):
        resume(small_run.path, ["reweighting=loss-based"])
    assert Recipe.parse({**small_recipe, "reweighting": None}) == Recipe.parse(small_recipe)
    recipe = Recipe.parse({**small_recipe, "reweighting": "loss-based"})
    assert isinstance(recipe.reweighting, LossBased) and Recipe.parse(recipe.plain()) == recipe
