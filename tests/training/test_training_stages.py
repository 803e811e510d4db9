"""Recipes of several stages: each stage is what it would be alone, a kill at any moment loses nothing that was finished."""

import json
import shutil
import uuid

import pytest

from cairn.checkpoint.format import read
from cairn.checkpoint.format.summary import log, summary
from cairn.errors import InputError, ResumeError
from cairn.merging.combine import average
from cairn.training import recipe as recipes
from cairn.training import stages
from cairn.training.run import Run, fork, resume, train
from tests import faults, ready


def stage(run: Run, number: int, name: str) -> Run:
    return Run(run.path / "stages" / f"{number}-{name}")


def test_each_stage_is_what_it_would_be_if_made_by_hand(staged, staged_run, tmp_path):
    trunk = train({key: value for key, value in staged.items() if key != "stages"}, tmp_path / "trunk").newest()
    ends = []
    for seed in (42, 666):
        changes = ["schedule.name=linear", "schedule.warmup=0", "schedule.final=0", "schedule.start=now", "schedule.horizon=8 steps"]
        ends.append(fork(trunk, tmp_path / f"{seed}", ["optimizer.lr=now", "training.tokens=20 steps", f"seed={seed}", *changes]).newest())
    soup = average([end.path for end in ends], tmp_path / "soup")
    assert stage(staged_run, 1, "web").newest().digest == trunk.digest
    assert [stage(staged_run, n, f"anneal-{seed}").newest().digest for n, seed in ((2, 42), (3, 666))] == [end.digest for end in ends]
    assert ends[0].model_digest != ends[1].model_digest, "two orders of the data"
    assert staged_run.newest().path.name == "4-soup" and staged_run.newest().model_digest == soup.model_digest


def test_an_anneal_begins_at_the_rate_where_the_trunk_stands_and_falls_to_zero(staged_run):
    trunk, anneal = stage(staged_run, 1, "web"), stage(staged_run, 2, "anneal-42")
    next_rate = trunk.recipe.learning_rate(12 * 256)
    rates = [row["learning_rate"] for row in anneal.metrics()]
    assert 0 < next_rate < 3e-3 and rates == pytest.approx([next_rate * (1 - step / 8) for step in range(8)], rel=1e-12) and rates[0] == next_rate
    assert anneal.recipe.learning_rate(20 * 256) == 0.0
    steps = {tensor.load().item() for name, tensor in anneal.newest().optimizer.items() if name.endswith("/step")}
    assert steps == {20.0}, "the moments are the trunk's, and went on"
    assert anneal.newest().trainer["position"] == 8 * 8, "the data are read from the beginning of another order"
    assert [path.name for path in anneal.checkpoints()] == ["step-00000016", "step-00000020"], "percents are shares of the stage"


def test_the_descent_names_every_stage(staged_run):
    entries = log(staged_run.path)
    assert [entry["stage"] for entry in entries if entry["generation"] == 0] == ["soup"]
    assert {entry["stage"] for entry in entries} == {"soup", "anneal-42", "anneal-666", "web"} and all(entry["here"] for entry in entries)
    assert entries[0]["act"] == "operation: average" and summary(staged_run.path)["stage"] == "soup"
    first = read.open(stage(staged_run, 3, "anneal-666").checkpoints()[0])
    assert {"stage: web -> anneal-666", "seed: 7 -> 666"} <= set(first.lineage.changed)
    branch = stages.recipes.load(first.lineage.options["recipe"])
    assert branch.stages == [] and branch.stage == "anneal-666"


def test_a_run_of_stages_is_read_like_a_run(staged_run):
    names = [path.relative_to(staged_run.path / "stages").parts[0] for path in staged_run.checkpoints()]
    assert names == ["1-web"] * 2 + ["2-anneal-42"] * 2 + ["3-anneal-666"] * 2 + ["4-soup"]
    rows = staged_run.metrics()
    assert [row["stage"] for row in rows] == ["web"] * 12 + ["anneal-42"] * 8 + ["anneal-666"] * 8
    assert [row["state"] for row in stages.progress(staged_run.path)] == ["finished"] * 4
    with pytest.raises(InputError, match="several stages"):
        average([staged_run.path], staged_run.path / "no", last=2)


@pytest.mark.parametrize("stop", [5, 12, 15])
def test_a_stop_in_any_stage_and_a_resume_change_no_bit(staged, staged_run, tmp_path, stop):
    train(staged, tmp_path / "r", stop_at_step=stop)
    standing = [row["state"] for row in stages.progress(tmp_path / "r")]
    assert standing == {5: ["under way"], 12: ["finished"], 15: ["finished", "under way"]}[stop] + ["to come"] * (4 - (2 if stop == 15 else 1))
    again = resume(tmp_path / "r")
    assert [read.open(a).digest for a in again.checkpoints() if a.name[5:] not in f"{stop:08d}"] == [
        read.open(b).digest for b in staged_run.checkpoints() if b.name[5:] not in f"{stop:08d}"
    ]
    assert [row["loss"] for row in again.metrics()] == [row["loss"] for row in staged_run.metrics()]


def test_what_is_finished_is_not_done_again(staged, staged_run, tmp_path):
    shutil.copytree(staged_run.path, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "stages" / "4-soup")
    shutil.rmtree(tmp_path / "r" / "stages" / "3-anneal-666")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "stages").rglob("*") if path.is_file()}
    again = train(staged, tmp_path / "r", go_on=True)
    assert again.newest().digest == staged_run.newest().digest
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())


def test_a_kill_at_the_beginning_of_a_stage(staged, staged_run, tmp_path):
    """SIGKILL before a stage has a checkpoint of its own, or just after; --continue and resume go on without what was finished."""
    (tmp_path / "recipe.yaml").write_text(json.dumps(staged))
    run, metrics = tmp_path / "r", tmp_path / "r" / "stages" / "2-anneal-42" / "metrics.jsonl"
    process = ready.cairn("train", str(tmp_path / "recipe.yaml"), "--run", str(run))
    assert faults.kill_when(process, metrics.exists), "killed before it came to its end"
    trunk = {path: path.stat().st_mtime_ns for path in (run / "stages" / "1-web").rglob("*") if path.is_file()}
    again = train(staged, run, go_on=True)
    assert all(path.stat().st_mtime_ns == moment for path, moment in trunk.items())
    assert again.newest().model_digest == staged_run.newest().model_digest
    assert [row["loss"] for row in again.metrics()] == [row["loss"] for row in staged_run.metrics()]


def test_two_processes_run_every_stage(staged, staged_run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(staged))
    done = faults.cairn("train", str(tmp_path / "recipe.yaml"), "parallel.data=2", "training.micro_batch=64", "--run", str(tmp_path / "r"), "--json")
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in json.loads(done.stdout)["stages"]] == ["finished"] * 4
    assert [row["loss"] for row in Run(tmp_path / "r").metrics()] == pytest.approx([row["loss"] for row in staged_run.metrics()], rel=1e-4)


def test_how_it_goes_on_may_change_and_what_it_is_may_not(staged, tmp_path):
    train(staged, tmp_path / "r", stop_at_step=5)
    with pytest.raises(ResumeError, match=r"optimizer\.lr cannot be changed"):
        resume(tmp_path / "r", ["optimizer.lr=1"])
    with pytest.raises(ResumeError, match="another recipe"):
        train(staged, tmp_path / "r", ["stages.1.set.seed=3"], go_on=True)
    with pytest.raises(InputError, match="not empty"):
        train(staged, tmp_path / "r")
    again = resume(tmp_path / "r", ["training.micro_batch=64"])
    assert all(Run(path).recipe.training.micro_batch == 64 for path in read.list_stages(again.path)[:3])


def test_training_goes_on_from_an_operation_with_a_fresh_optimizer_asked_for_by_name(staged, tmp_path):
    last = {"name": "after", "from": "soup", "set": {"training.tokens": "2 steps", "schedule": "constant"}}
    bare = last | {"fresh": ["optimizer"], "set": {"training.tokens": "2 steps"}}
    for missing, sentence in ((last, r"fresh: \[optimizer\]"), (bare, "set a schedule")):
        with pytest.raises(InputError, match=sentence):
            train(staged | {"stages": [*staged["stages"], missing]}, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    run = train(staged | {"stages": [*staged["stages"], last | {"fresh": ["optimizer"]}]}, tmp_path / "r")
    assert run.newest().step == 2 and [entry["act"] for entry in log(run.path)][:2] == ["run: fork", "operation: average"]


def test_training_goes_on_from_an_average_that_keeps_the_moments(staged, tmp_path):
    *runs, soup = staged["stages"]
    kept = soup | {"operation": {"name": "average", "moments": "averaged"}}
    last = {"name": "after", "from": "soup", "set": {"training.tokens": "2 steps", "optimizer.lr": 1e-3, "schedule": "constant"}}
    run = train(staged | {"stages": [*runs, kept, last]}, tmp_path / "r")
    anneal, after, combined = stage(run, 3, "anneal-666"), stage(run, 5, "after"), read.open(read.list_stages(run.path)[3])
    assert [entry["act"] for entry in log(run.path)][:2] == ["run: fork", "operation: average"] and summary(combined)["stage"] == "soup"
    assert combined.tokens == anneal.newest().tokens and after.newest().step == anneal.newest().step + 2
    assert {tensor.load().item() for name, tensor in after.newest().optimizer.items() if name.endswith("/step")} == {22.0}
    assert after.recipe.seed == 666 and after.newest().trainer["position"] == anneal.newest().trainer["position"] + 2 * 8
    bare = {"name": "both", "from": ["soup", "anneal-42"], "operation": {"name": "average", "moments": "averaged"}}
    with pytest.raises(InputError, match="stage 'both' is to keep optimizer state, and 'soup' leaves none"):
        train(staged | {"stages": [*runs, soup, bare]}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_is_there_takes_the_place_of_a_stage(staged, staged_run, small_run, tmp_path):
    trunk = stage(staged_run, 1, "web").newest()
    there = {"name": "web", "checkpoint": str(trunk.path)}
    run = train(staged | {"stages": [there, *staged["stages"][1:]]}, tmp_path / "r")
    assert run.newest().model_digest == staged_run.newest().model_digest
    assert [row["act"] for row in stages.progress(run.path)] == ["checkpoint", "run: fork", "run: fork", "operation: average"]
    assert [path.name for path in read.list_stages(run.path)] == ["2-anneal-42", "3-anneal-666", "4-soup"]
    assert trunk.digest in {entry["digest"] for entry in log(run.path)}


def test_of_an_imported_checkpoint_the_rate_is_that_of_the_recipe_at_its_end(staged, staged_run, tmp_path):
    """Weights alone: no tokens are counted and no moments are there, so both are said; the anneal begins where the trunk would stand."""
    from cairn.checkpoint.foreign.export import export

    bare = export(stage(staged_run, 1, "web").newest(), tmp_path / "bare")
    whole = staged | {"stages": [{"name": "web", "checkpoint": str(bare.path)}, *staged["stages"][1:]]}
    with pytest.raises(InputError, match=r"'web', which leaves no optimizer state: write fresh"):
        train(whole, tmp_path / "r")
    whole["stages"][1:3] = [each | {"fresh": ["optimizer"]} for each in whole["stages"][1:3]]
    run = train(whole, tmp_path / "r")
    rates = [row["learning_rate"] for row in run.metrics() if row["stage"] == "anneal-42"]
    assert rates == [row["learning_rate"] for row in staged_run.metrics() if row["stage"] == "anneal-42"]
    assert [row["tokens"] for row in stages.progress(run.path)][1] == 8 * 256


def test_a_stage_may_change_the_size_of_a_step(staged, tmp_path):
    wider = {"name": "wider", "from": "web", "set": {"training.batch": 512, "training.tokens": "3 steps", "schedule": "constant"}}
    run = train(staged | {"stages": [{"name": "web"}, wider]}, tmp_path / "r")
    assert run.newest().tokens == 12 * 256 + 3 * 512 and run.newest().step == 15


def test_a_percent_of_a_stage_is_of_that_stage(staged):
    """Also in a change of its mixture; the parent's changes stay where they were."""
    changes = [{"at": at, "weights": {"walks": 1.0}} for at in ("3 steps", "50%")]
    later = {"name": "later", "from": "web", "set": {"training.tokens": "8 steps", "schedule": "constant", "data.mixture": changes}}
    first, second = stages.plan(recipes.load({**staged, "stages": [{"name": "web"}, later]}))
    assert [change.at.units(256) for change in second.recipe.data.mixture] == [3 * 256, (12 + 4) * 256] and second.begins == first.ends == 12 * 256


def test_checkpoints_of_stages_may_lie_in_a_store(staged, staged_run, tmp_path):
    run = train(staged, tmp_path / "r", [f"checkpoint.store=memory://{uuid.uuid4().hex}"])
    assert run.newest().model_digest == staged_run.newest().model_digest
    assert [str(path).startswith("memory://") for path in run.checkpoints()] == [True] * 6 + [False]


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({"name": "x", "from": "webb"}, "begins from 'webb', which is no stage before it. Did you mean 'web'"),
        ({"name": "web"}, "two stages are called 'web'"),
        ({"name": "../x"}, "stages.4.name"),
        ({"name": "x", "from": ["web", "anneal-42"]}, "name an operation"),
        ({"name": "x", "from": "web"}, "has no length"),
        ({"name": "x", "operation": "average"}, "the stages that it works on"),
        ({"name": "x", "from": ["web"], "operation": "avrage"}, "stage 'x': There is no operation 'avrage'. Did you mean 'average'"),
        ({"name": "x", "from": "web", "set": {"training.tokens": "1 steps", "optimizer.lrr": 1}}, "stage 'x': .*Did you mean 'lr'"),
        ({"name": "x", "set": {"optimizer.lr": "now"}}, "goes on with none"),
        ({"name": "x", "checkpoint": "nowhere", "from": "web"}, "there already"),
        ({"name": "x", "checkpoint": "nowhere"}, "no checkpoint or run at nowhere"),
        ({"name": "x", "form": "web"}, "unknown key 'stages.4.form'. Did you mean 'from'"),
        ({"name": "x", "from": "web", "set": {"training.tokens": "1 steps", "parallel.data": 2}}, "run in the same processes"),
    ],
)
def test_impossible_stages_are_refused_before_anything_is_made(staged, tmp_path, stage, sentence):
    with pytest.raises(InputError, match=sentence):
        train(staged | {"stages": [*staged["stages"], stage]}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_recipe_of_stages_round_trips_and_is_not_forked_into(staged, staged_run, small_run, tmp_path):
    recipe = recipes.load(staged)
    assert recipes.Recipe.parse(recipe.plain()) == recipe == staged_run.recipe
    assert recipe.plain()["stages"][1]["from"] == ["web"]
    with pytest.raises(InputError, match="trained from its beginning"):
        fork(small_run.newest(), tmp_path / "f", recipe=staged)
    branch = fork(staged_run.checkpoints()[3], tmp_path / "b", ["training.tokens=21 steps"])
    assert branch.recipe.stage is None, "a branch plays no part in the larger recipe"


def test_estimates_say_what_every_stage_does(staged):
    rows = stages.estimates(recipes.load(staged))
    assert [row["stage"] for row in rows] == ["web", "anneal-42", "anneal-666", "soup"]
    assert [row.get("steps") for row in rows] == [12, 8, 8, None] and rows[1]["begins"] == 12 * 256
    assert rows[1]["learning_rate"][0] == pytest.approx(rows[0]["learning_rate"][1], rel=0.2) and rows[3]["act"] == "operation: average"
