"""Teachers: frozen ones and averages of the student, exact losses, kills, moved and wrong teachers, several processes."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from cairn.checkpoint.format import read
from cairn.errors import InputError, MismatchError, NotFoundError, ResumeError
from cairn.training.directory import Run
from cairn.training.distillation import distilled, divergence
from cairn.training.recipe import Recipe
from cairn.training.run import fork, resume, train
from tests.training.test_training_parallel import layout, work

STEPS = "training.tokens=26 steps"


def distill(teacher, **options):
    return [f"objective={json.dumps({'name': 'distillation', **options})}", f"teacher={json.dumps(teacher)}", STEPS]


@pytest.fixture(scope="module")
def newest(small_run):
    return read.open(small_run.checkpoints()[-1])


@pytest.fixture(scope="module")
def oldest(small_run):
    return read.open(small_run.checkpoints()[0])


def test_losses_are_those_of_plain_references():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 11, (2, 5), generator=generator)
    plain = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    losses, entropy, apart = distilled(teacher, student, targets, 0.25, 3.0)
    assert torch.allclose(apart, plain, atol=1e-12) and torch.allclose(entropy, F.cross_entropy(student.transpose(1, 2), targets, reduction="none"))
    assert torch.allclose(losses, 0.75 * entropy + 0.25 * 9 * plain, atol=1e-12)
    assert divergence(teacher, teacher + 5).abs().max() < 1e-12, "logits mean the same up to a constant"


def test_a_student_that_is_its_own_teacher_learns_what_it_would_without(small_run, newest, tmp_path):
    """At the first step the divergence is 0, and so is its gradient: the loss is (1 - share) times the cross-entropy."""
    plain = fork(newest, tmp_path / "plain", [STEPS], fresh=["optimizer"])
    taught = fork(newest, tmp_path / "taught", distill(str(newest.path), share=0.25), fresh=["optimizer"])
    first, row = plain.metrics()[0], taught.metrics()[0]
    assert row["divergence"] == pytest.approx(0, abs=1e-6) and row["cross_entropy"] == pytest.approx(first["loss"], rel=1e-5)
    assert row["loss"] == pytest.approx(0.75 * first["loss"], rel=1e-5) and row["grad_norm"] == pytest.approx(0.75 * first["grad_norm"], rel=1e-3)
    assert all(row["divergence"] > 0 for row in taught.metrics()[1:])


def test_a_student_comes_to_say_what_its_teacher_says(newest, oldest, tmp_path):
    run = fork(oldest, tmp_path / "run", distill(str(newest.path), share=1.0), fresh=["optimizer"])
    rows = [row["divergence"] for row in run.metrics()]
    assert rows[-1] < 0.5 * rows[0]
    told = run.newest().lineage.options["teachers"]["teacher"]
    assert told["digest"] == newest.digest and told["model_digest"] == newest.model_digest
    assert run.newest().trainer["teachers"] == {"teacher": newest.model_digest}


@pytest.mark.parametrize("begin", [None, "newest"])
def test_an_average_of_the_student_is_in_the_checkpoint_and_goes_on_exactly(begin, newest, oldest, tmp_path):
    teacher = {"ema": 0.9} | ({"checkpoint": str(newest.path)} if begin else {})
    settings = [*distill(teacher), "checkpoint.every=1 steps"]
    whole = fork(oldest, tmp_path / "whole", settings, fresh=["optimizer"])
    fork(oldest, tmp_path / "cut", settings, fresh=["optimizer"], stop_at_step=13)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest
    average = {name: tensor.load() for name, tensor in (newest if begin else oldest).tensors.items()}
    for path in whole.checkpoints():
        for name, tensor in read.open(path).tensors.items():
            average[name] = average[name].lerp(tensor.load(), 0.1)
    kept = whole.newest().ingredients
    assert set(kept) == {f"teachers/teacher/{name}" for name in average}
    assert all(torch.allclose(kept[f"teachers/teacher/{name}"].load(), value, atol=1e-6) for name, value in average.items())


def test_an_average_of_an_adapter_keeps_the_adapter_alone(newest, tmp_path):
    settings = [*distill({"ema": 0.5}), 'adapter={"name": "lora", "rank": 2, "dropout": 0.1}']
    whole = fork(newest, tmp_path / "whole", settings)
    fork(newest, tmp_path / "cut", settings, stop_at_step=23)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest
    assert set(whole.newest().ingredients) == {f"teachers/teacher/{name}" for name in whole.newest().stored}
    assert whole.metrics()[0]["divergence"] == pytest.approx(0, abs=1e-3) and whole.metrics()[-1]["divergence"] > 0


def test_a_teacher_may_be_an_adapter(adapter_run, newest, tmp_path):
    run = fork(newest, tmp_path / "run", distill(str(adapter_run.checkpoints()[-1])), fresh=["optimizer"])
    assert run.metrics()[0]["divergence"] > 0


def test_a_teacher_that_moved_is_found_and_another_one_is_refused(small_run, newest, oldest, tmp_path):
    place = tmp_path / "teacher"
    shutil.copytree(newest.path, place)
    settings = distill(str(place))
    whole = fork(oldest, tmp_path / "whole", settings, fresh=["optimizer"])
    fork(oldest, tmp_path / "cut", settings, fresh=["optimizer"], stop_at_step=11)
    shutil.rmtree(place)
    shutil.copytree(oldest.path, place)
    with pytest.raises(ResumeError, match=f"taught by the model {newest.model_digest[:12]}"):
        resume(tmp_path / "cut")
    shutil.rmtree(place)
    with pytest.raises(NotFoundError, match="teacher"):
        resume(tmp_path / "cut")
    shutil.copytree(newest.path, tmp_path / "cut" / "checkpoints" / "kept")
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest
    with pytest.raises(ResumeError, match="change teacher"):
        resume(tmp_path / "whole", [f"teacher={oldest.path}"])


def test_a_teacher_of_other_words_or_none_at_all_is_refused(small_run, small_recipe, newest, tmp_path):
    from cairn.data.text.tokenizer import byte_level

    with pytest.raises(InputError, match="is a run, whose newest checkpoint may change"):
        fork(newest, tmp_path / "a", distill(str(small_run.path)), fresh=["optimizer"])
    with pytest.raises(MismatchError, match=r"has \d+ ids, the model in training 300"):
        train(small_recipe, tmp_path / "b", [*distill(str(newest.path)), "model.vocab_size=300"])
    with pytest.raises(NotFoundError, match="nowhere"):
        train(small_recipe, tmp_path / "c", distill("nowhere"))
    other = tmp_path / "other"
    shutil.copytree(newest.path, other)
    for name in ("manifest.json", "lineage.json", "trainer.json"):
        (other / name).unlink()
    words = json.loads(byte_level().files()["tokenizer.json"])
    words["model"]["vocab"] = dict(zip(words["model"]["vocab"], reversed(words["model"]["vocab"].values()), strict=True))
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(MismatchError, match="has another vocabulary"):
        train(small_recipe, tmp_path / "d", distill(str(other)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"objective": "distillation"}, r"learns from the teacher 'teacher', which the recipe does not name: teacher=CHECKPOINT"),
        ({"teacher": "runs/a"}, r"learns from no teacher 'teacher'; it knows none"),
        ({"objective": "compatible", "teacher": {"old": "a"}}, r"teacher 'new', which the recipe does not name: teacher\.new=CHECKPOINT"),
        ({"objective": "compatible", "teacher": {"old": "a", "new": "b", "odd": "c"}}, r"no teacher 'odd'; it knows old, new"),
        ({"objective": "distillation", "teacher": {"ema": 1.5}}, r"teacher\.teacher\.ema"),
        ({"objective": "distillation", "teacher": {"teacher": {}}}, r"a teacher is a checkpoint, or with ema"),
        ({"objective": "distillation", "teacher": 3}, r"teacher is a checkpoint"),
        ({"objective": "distillation", "teacher": {"teacher": {"chekpoint": "a"}}}, r"Did you mean 'checkpoint'"),
    ],
)
def test_recipes_with_teachers_that_do_not_fit_are_refused(settings, sentence, small_recipe):
    with pytest.raises(InputError, match=sentence):
        Recipe.parse({**small_recipe, **settings}, "recipe")


def test_the_three_ways_to_write_a_teacher_round_trip(small_recipe):
    for written in ("runs/a", {"checkpoint": "runs/a"}, {"teacher": "runs/a"}, {"teacher": {"checkpoint": "runs/a"}}):
        recipe = Recipe.parse({**small_recipe, "objective": "distillation", "teacher": written})
        assert recipe.plain()["teacher"] == {"teacher": {"checkpoint": "runs/a", "ema": None}}
        assert Recipe.parse(recipe.plain()) == recipe and recipe.overridden(["teacher.teacher.ema=0.9"]).teacher["teacher"].ema == 0.9


@pytest.mark.parametrize("teacher", ["frozen", "average"])
def test_several_processes_have_the_loss_curve_of_one(teacher, newest, oldest, tmp_path):
    settings = [
        *distill(str(newest.path) if teacher == "frozen" else {"ema": 0.8}),
        "training.precision=float64",
        "checkpoint.every=100%",
        "training.tokens=9 steps",
    ]
    alone = fork(oldest, tmp_path / "alone", settings, fresh=["optimizer"])
    layouts = ["2x1x1", "1x2x1"]
    work(tmp_path, 2, *(["fork", str(oldest.path), [*layout(each), *settings], {"run": str(tmp_path / each), "fresh": ["optimizer"]}] for each in layouts))
    for each in layouts:
        rows = [[row[key] for run in (Run(tmp_path / each), alone) for row in run.metrics()] for key in ("loss", "divergence")]
        for figures in rows:
            half = len(figures) // 2
            assert figures[:half] == pytest.approx(figures[half:], rel=1e-6, abs=1e-9), each
        for name, tensor in (Run(tmp_path / each).newest().ingredients or {}).items():
            assert torch.allclose(tensor.load(), alone.newest().ingredients[name].load(), rtol=0, atol=1e-8)
