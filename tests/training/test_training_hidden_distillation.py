"""Distillation of hidden states: the distance, the layers, a projection that trains along, teachers of any family, and resumes."""

import json
import shutil

import pytest
import torch

from cairn.checkpoint.format import read
from cairn.errors import InputError, MismatchError, ResumeError
from cairn.training.distillation import state_distance, states_of, uniform_layers
from cairn.training.objectives.hidden_distillation import HiddenDistillation
from cairn.training.run import resume, train


def learning(run, **more):
    """Overrides by which a recipe learns from the newest checkpoint of a run."""
    objective = {"name": "hidden-distillation", "share": 0.8, **more}
    return [f"objective={json.dumps(objective)}", f"teacher={run.newest().path}", "training.tokens=12 steps"]


NARROW = ["model.hidden_size=16", "model.num_hidden_layers=1"]


def test_layers_are_mapped_evenly_and_the_last_learns_from_the_last():
    assert uniform_layers(2, 6) == [(0, 2), (1, 5)] and uniform_layers(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert uniform_layers(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)] and all(
        uniform_layers(s, t)[-1] == (s - 1, t - 1) for s in range(1, 9) for t in range(1, 9)
    )


def test_the_distance_is_the_mean_squared_difference_after_the_projection():
    mine, theirs, matrix = torch.randn(2, 3, 4), torch.randn(2, 3, 6), torch.randn(6, 4)
    by_hand = torch.stack([torch.stack([((matrix @ mine[b, t] - theirs[b, t]) ** 2).mean() for t in range(3)]) for b in range(2)])
    assert torch.allclose(state_distance(mine, theirs, matrix), by_hand, atol=1e-5)
    assert state_distance(mine, mine).abs().max() == 0 and state_distance(mine, 3 * mine, normalised=True).max() < 1e-6 < state_distance(mine, 3 * mine).min()


def test_states_are_those_that_transformers_shows(tmp_path):
    transformers = pytest.importorskip("transformers")
    from cairn.models.foreign import trainable

    model = trainable(transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=3, n_head=2)).eval())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        _, states = states_of(model, [1, 0, 1], lambda whole: whole(ids, mask=None).logits)
        shown = transformers.BloomForCausalLM.forward(model, ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], shown[2]) and torch.equal(states[1], shown[1]) and states[2] is states[0]
    assert not any(module._forward_hooks for module in model.blocks())


@pytest.mark.parametrize(("more", "options"), [(["model.num_hidden_layers=1"], {}), (NARROW, {"projection": "learned", "normalised": True})])
def test_it_learns_the_states_of_its_teacher_and_goes_on_bit_for_bit(more, options, small_run, small_recipe, tmp_path):
    asked = [*learning(small_run, **options), *more]
    whole = train(small_recipe, tmp_path / "whole", asked)
    rows = whole.metrics()
    assert rows[-1]["distance"] < rows[0]["distance"] and rows[-1]["loss"] == pytest.approx(0.2 * rows[-1]["cross_entropy"] + 0.8 * rows[-1]["distance"])
    train(small_recipe, tmp_path / "cut", asked, stop_at_step=7)
    again = resume(tmp_path / "cut")
    assert again.newest().digest == whole.newest().digest and [row["loss"] for row in again.metrics()] == [row["loss"] for row in rows]
    assert whole.recipe.objective.layers == [(0, 1)], "the recipe that is stored says which blocks it were"
    kept = whole.newest().ingredients
    assert (kept is not None and "learned/projection.0" in kept) == bool(options)
    if options:
        moments = whole.newest().optimizer
        assert moments["learned.projection.0/exp_avg"].shape == (32, 16) and not any("projection" in name for name in whole.newest().tensors)
        first = HiddenDistillation(**options, layers=[(0, 1)]).learned(whole.newest().model(), {"teacher": small_run.newest().model()}, 0)["projection.0"]
        assert first.shape == (32, 16) and not torch.equal(first, kept["learned/projection.0"].load())
        micro = train(small_recipe, tmp_path / "micro", [*asked, "training.micro_batch=64"])
        assert [row["loss"] for row in micro.metrics()] == pytest.approx([row["loss"] for row in rows], abs=2e-5)


def test_a_teacher_of_a_family_that_only_transformers_builds(small_run, small_recipe, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=small_run.newest().config["vocab_size"], hidden_size=24, n_layer=4, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_run.newest().path / name, tmp_path / "bloom" / name)
    options = {"name": "hidden-distillation", "projection": "learned", "layers": [[0, 0], [1, 3]]}
    run = train(small_recipe, tmp_path / "r", [f"objective={json.dumps(options)}", f"teacher={tmp_path / 'bloom'}", "training.tokens=4 steps"])
    assert run.newest().ingredients["learned/projection.1"].shape == (24, 32) and run.metrics()[-1]["distance"] < run.metrics()[0]["distance"]


@pytest.mark.parametrize(
    ("more", "options", "error", "sentence"),
    [
        (NARROW, {}, MismatchError, "hidden states have 16 numbers and the teacher's 32; set objective.projection=learned"),
        ([], {"layers": [[0, 7]]}, InputError, "names block 7 of the teacher, which has the blocks 0 to 1"),
        ([], {"layers": [[-1, 0]]}, InputError, "names block -1 of the student"),
        (["teacher={}"], {}, InputError, "learns from the teacher 'teacher', which the recipe does not name"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(more, options, error, sentence, small_run, small_recipe, tmp_path):
    with pytest.raises(error, match=sentence):
        train(small_recipe, tmp_path / "r", [*learning(small_run, **options), *more])
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_that_has_lost_the_projection_is_refused(small_run, small_recipe, tmp_path):
    run = train(small_recipe, tmp_path / "r", [*learning(small_run, projection="learned"), *NARROW, "training.tokens=2 steps"])
    opened = read.open(run.newest().path)
    from cairn.training.learned import Learned
    from cairn.training.parallel import joined

    with joined(run.recipe) as world:
        optimizer = run.recipe.optimizer.build(opened.model())
        mine = Learned({"projection.0": torch.zeros(32, 16)}, optimizer, world)
        mine.restore(opened)
        assert torch.equal(mine.parameters["projection.0"].detach(), opened.ingredients["learned/projection.0"].load())
        opened.__dict__["ingredients"] = None
        with pytest.raises(ResumeError, match=r"learned/projection\.0"):
            mine.restore(opened)


def test_two_processes_learn_the_projection_of_one(small_run, small_recipe, tmp_path):
    from tests.faults import torchrun

    asked = [*learning(small_run, projection="learned"), *NARROW, "training.tokens=4 steps"]
    script = tmp_path / "worker.py"
    script.write_text("import json, sys\nfrom cairn.training.run import train\ntrain(json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))\n")
    torchrun(2, script, json.dumps(small_recipe), str(tmp_path / "two"), json.dumps([*asked, "parallel.data=2"]))
    one, two = train(small_recipe, tmp_path / "one", asked).newest(), read.open(tmp_path / "two")
    found = [checkpoint.ingredients["learned/projection.0"].load() for checkpoint in (one, two)]
    moments = [checkpoint.optimizer["learned.projection.0/exp_avg"].load() for checkpoint in (one, two)]
    assert torch.allclose(*found, atol=1e-5) and torch.allclose(*moments, rtol=1e-3, atol=1e-7) and moments[0].abs().max() > 1e-5
