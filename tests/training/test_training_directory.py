"""The directory of a run: one owner, links, what is damaged or in the way, and advice that works when it is followed."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import yaml

import cairn
from cairn.checkpoint.format import read
from cairn.errors import DamagedError, DivergedError, InputError, InterruptedRun, Notice, ResumeError
from cairn.training import environment, loggers
from cairn.training.directory import OWNER, owned
from cairn.training.loop import Trainer
from cairn.training.run import fork, resume, train
from tests import faults


@pytest.fixture
def cut(small_recipe, small_run, tmp_path):
    """A run that stands at step 15, with three checkpoints."""
    shutil.copytree(small_run.path, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-00000020")
    return tmp_path / "r"


def follow(message: str) -> list[str]:
    """The command that a message quotes, as arguments."""
    found = re.search(r"`cairn ([^`]+)`", message)
    assert found, message
    return shlex.split(found[1])


# -- one owner -------------------------------------------------------------------------------------------------------


def test_a_run_has_one_owner_and_a_second_one_is_told_who(cut, small_recipe):
    with owned(cut):
        done = faults.cairn("resume", str(cut))
    assert done.returncode == 2 and f"is being trained by process {os.getpid()}" in done.stderr and "Traceback" not in done.stderr
    assert not (cut / OWNER).exists() and len(read.list_checkpoints(cut)) == 3


def test_a_lock_ends_with_its_process_however_that_ends(cut):
    code = "import sys, time\nfrom pathlib import Path\nfrom cairn.training.directory import owned\n"
    code += "with owned(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = faults.python(code, str(cut))
    assert process.line() == "held" and (cut / OWNER).exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert resume(cut).newest().step == 20 and not (cut / OWNER).exists()


def test_two_begin_in_one_directory_and_one_of_them_is_told(small_recipe, tmp_path):
    (tmp_path / "r").mkdir()
    with owned(tmp_path / "r"):
        done = faults.cairn("train", _written(small_recipe, tmp_path), "--run", str(tmp_path / "r"))
    assert done.returncode == 2 and "is being trained by" in done.stderr


# -- links and places --------------------------------------------------------------------------------------------------


def test_a_run_is_where_it_was_named_though_its_checkpoints_lie_elsewhere(cut, small_run, tmp_path):
    (tmp_path / "scratch").mkdir()
    (cut / "checkpoints").rename(tmp_path / "scratch" / "of-r")
    (cut / "checkpoints").symlink_to(tmp_path / "scratch" / "of-r")
    again = resume(cut)
    assert again.path == cut and [row["step"] for row in again.metrics()] == list(range(1, 21))
    assert again.newest().digest == small_run.newest().digest
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["of-r"]


def test_tidying_takes_a_link_away_and_not_what_it_leads_to(cut, tmp_path):
    oldest = read.list_checkpoints(cut)[0]
    oldest.rename(tmp_path / "kept")
    oldest.symlink_to(tmp_path / "kept")
    run = resume(cut, ["checkpoint.keep=2"])
    assert [path.name for path in run.checkpoints()] == ["step-00000015", "step-00000020"] and read.open(tmp_path / "kept").step == 5


def test_what_cannot_be_tidied_never_ends_a_run(cut, monkeypatch, capsys):
    monkeypatch.setattr("cairn.training.execution.remove", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "x")))
    run = resume(cut, ["checkpoint.keep=1", "training.tokens=30 steps"], quiet=False)
    assert run.newest().step == 30 and capsys.readouterr().err.count("old checkpoints stay") == 1


def test_what_cannot_be_seen_is_not_taken_for_nothing(cut, small_recipe, monkeypatch):
    """`--continue` on a run whose checkpoints cannot be read cuts nothing of its metrics."""
    before = (cut / loggers.METRICS).read_bytes()
    honest = os.listdir

    def listdir(path="."):
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(InputError, match="cannot be listed"):
        train(small_recipe, cut, go_on=True)
    assert (cut / loggers.METRICS).read_bytes() == before


def test_an_incomplete_checkpoint_in_the_way_is_set_aside_and_said(cut, small_run):
    newest = read.list_checkpoints(cut)[-1]
    (newest / "manifest.json").unlink()
    with pytest.warns(Notice, match="set aside as damaged-step-00000015"):
        again = resume(cut)
    assert again.newest().digest == small_run.newest().digest and newest.with_name("damaged-step-00000015").is_dir()


# -- damage ------------------------------------------------------------------------------------------------------------


def test_damage_in_any_file_of_the_newest_checkpoint_is_refused_with_the_older_sound_one(cut, small_run):
    """One byte of every file, at the beginning, in the middle and at the end; and a missing file."""
    newest, older = read.list_checkpoints(cut)[-1], read.list_checkpoints(cut)[-2]
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 1}:
            faults.flip(file, position)
            with pytest.raises(DamagedError, match=re.escape(f"{older} is sound")) as caught:
                resume(cut)
            assert str(newest) in str(caught.value), file.name
            file.write_bytes(whole)
        if file.name != "manifest.json":  # without one it is no checkpoint, and is set aside
            file.rename(file.with_suffix(".away"))
            with pytest.raises(DamagedError, match="is sound"):
                resume(cut)
            file.with_suffix(".away").rename(file)
    assert resume(cut).newest().digest == small_run.newest().digest


def test_the_advice_about_damage_works(cut, small_run, tmp_path):
    faults.flip(read.list_checkpoints(cut)[-1] / "optimizer.safetensors", 5000)
    with pytest.raises(DamagedError) as caught:
        resume(cut)
    done = faults.cairn(*follow(str(caught.value)))
    assert done.returncode == 0, done.stderr
    assert read.open(cut).digest == small_run.newest().digest and (cut / "checkpoints" / "damaged-step-00000015").is_dir()


# -- advice ------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_lost_before_its_first_checkpoint_is_begun_again_as_it_is_told(small_recipe, small_run, tmp_path):
    run = tmp_path / "r"
    train(small_recipe, run, stop_at_step=5)
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    with pytest.raises(ResumeError, match="no complete checkpoint yet") as first:
        resume(run)
    with pytest.raises(InputError, match="ended before its first checkpoint") as second:
        train(small_recipe, run)
    assert follow(str(first.value)) == follow(str(second.value))
    done = faults.cairn(*follow(str(first.value)))
    assert done.returncode == 0, done.stderr
    assert read.open(run).digest == small_run.newest().digest


def test_the_advice_after_a_divergence_works(small_recipe, tmp_path, monkeypatch):
    honest = Trainer.gradients

    def gradients(self, micro_batches):
        loss, parts = honest(self, micro_batches)
        return (loss * float("nan"), parts) if self.progress.step == 7 and self.recipe.optimizer.lr > 2e-3 else (loss, parts)

    monkeypatch.setattr(Trainer, "gradients", gradients)
    with pytest.raises(DivergedError, match="Step 8: loss nan") as caught:
        train(small_recipe, tmp_path / "r")
    source, words, run = re.search(r"cairn fork (\S+) (\S+) --run (\S+);", str(caught.value)).groups()
    assert fork(source, run, [words]).newest().step == 20
    source, words = re.search(r"cairn resume (\S+) (training\S+)\.$", str(caught.value)).groups()
    finished = resume(source, [words])
    assert finished.newest().step == 20 and finished.newest().trainer["skipped"] == 1


def test_a_disk_without_room_is_named_with_what_was_written(tmp_path, monkeypatch):
    logger = loggers.FileLogger(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"metrics\.jsonl could not be written: No space left on device"):
        logger.row({"step": 1})


# -- what may change bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "threads", "kernels"])
def test_what_may_change_bits_is_said_recorded_and_refused_when_asked(cut, monkeypatch, capsys, name):
    if name == "torch":
        honest = environment.versions
        monkeypatch.setattr(environment, "versions", lambda: {**honest(), name: "0.0"})
    else:
        machine = environment.hardware
        monkeypatch.setattr(environment, "hardware", lambda: {**machine(), name: "off"})
    with pytest.raises(ResumeError, match=f"cannot go on exactly here.*{name}: .* -> "):
        resume(cut, exact=True)
    run = resume(cut, quiet=False)
    assert f"{name}: " in capsys.readouterr().err
    assert any(line.startswith(f"{name}: ") for line in run.newest().lineage.changed)


def test_an_exact_resume_is_refused_with_kernels_off_and_made_as_before(cut, small_run):
    refused = faults.cairn("resume", str(cut), "--exact", CAIRN_NATIVE="0")
    assert refused.returncode == 2 and "kernels: " in refused.stderr and "-> off" in refused.stderr
    assert resume(cut, exact=True).newest().digest == small_run.newest().digest


def test_an_exact_resume_may_be_longer_and_not_otherwise(cut):
    with pytest.raises(ResumeError, match=r"training\.micro_batch"):
        resume(cut, ["training.micro_batch=64"], exact=True)
    assert resume(cut, ["training.tokens=22 steps", "checkpoint.keep=1"], exact=True).newest().step == 22


# -- the order of a step -------------------------------------------------------------------------------------------------


def test_the_state_is_saved_before_callbacks_look_at_it_and_they_look_again(small_recipe, tmp_path, monkeypatch):
    """A measurement that fails at the first checkpoint loses nothing; once it is mended, the run ends as though it never had."""
    recipe = {**small_recipe, "callbacks": [{"name": "evaluate", "every": "5 steps", "measurements": ["held-out"]}, {"name": "sample", "every": "5 steps"}]}
    whole = train(recipe, tmp_path / "whole")
    from cairn.training.callbacks import evaluate

    with monkeypatch.context() as patch:
        patch.setattr(evaluate._Evaluator, "observe", lambda *_: (_ for _ in ()).throw(InputError("cannot be measured")))
        with pytest.raises(InputError, match="cannot be measured"):
            train(recipe, tmp_path / "r")
    assert read.open(tmp_path / "r").step == 5
    again = resume(tmp_path / "r")
    assert again.newest().digest == whole.newest().digest
    keys = ("step", "loss", "held-out/loss")
    assert [[row.get(key) for key in keys] for row in again.metrics()] == [[row.get(key) for key in keys] for row in whole.metrics()]
    assert again.samples() == whole.samples() and "awaits" not in (again.path / loggers.METRICS).read_text()


def test_a_measurement_that_cannot_be_taken_is_refused_at_the_start(small_recipe, tmp_path):
    recipe = {**small_recipe, "data": {**small_recipe["data"], "held_out": 0.0}, "callbacks": ["evaluate"]}
    with pytest.raises(InputError, match="held"):
        train(recipe, tmp_path / "r")
    assert not (tmp_path / "r" / "checkpoints").exists() or not read.list_checkpoints(tmp_path / "r")
    assert not (tmp_path / "r" / loggers.METRICS).exists() or not (tmp_path / "r" / loggers.METRICS).read_text()


def test_a_schedule_that_starts_later_than_the_run_stands_is_refused(small_run, small_recipe, tmp_path):
    with pytest.raises(InputError, match=r"schedule\.start is 3840 tokens, and the run stands at 2560"):
        fork(small_run.checkpoints()[1], tmp_path / "f", ["schedule.start=15 steps"])
    with pytest.raises(InputError, match="the run stands at 0"):
        train(small_recipe, tmp_path / "t", ["schedule.start=1 steps"])
    assert not (tmp_path / "f").exists() and not (tmp_path / "t").exists()


def test_a_run_that_saves_without_a_copy_is_the_same_run(small_recipe, small_run, tmp_path):
    """YAML reads `off` as false."""
    train(small_recipe, tmp_path / "r", ["checkpoint.capture=off"], stop_at_step=7)
    assert resume(tmp_path / "r", ["checkpoint.capture=auto"]).newest().path.name == small_run.newest().path.name
    assert [row["loss"] for row in resume(tmp_path / "r").metrics()] == [row["loss"] for row in small_run.metrics()]


def test_config_says_the_precision_of_the_weights_that_are_there(small_recipe, tmp_path):
    run = train(small_recipe, tmp_path / "r", ["training.precision=float64", "training.tokens=1 steps"])
    assert run.newest().config["dtype"] == "float64" and str(run.newest().tensors["model.norm.weight"].dtype) == "torch.float64"


# -- interrupts ------------------------------------------------------------------------------------------------------------


def test_an_interrupt_says_what_is_saved_and_how_to_go_on(small_recipe, small_run, tmp_path, monkeypatch):
    honest = Trainer.update

    def update(self, micro_batches):
        if self.progress.step == 6:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # a launcher and a terminal: one wish
        return honest(self, micro_batches)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(InterruptedRun, match="the state of step 7 is saved in") as caught:
        train(small_recipe, tmp_path / "r")
    run = re.search(r"go on with: cairn resume (\S+)$", str(caught.value))[1]
    monkeypatch.undo()
    assert resume(run).newest().digest == small_run.newest().digest


def _written(recipe: dict, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


# -- one short document -------------------------------------------------------------------------------------------------


@pytest.fixture
def short(small_recipe, tmp_path):
    """A recipe on one short document: there is nothing to hold out."""
    (tmp_path / "one.txt").write_text("The stone on the trail marks the way that was walked before. " * 30)
    training = {**small_recipe["training"], "tokens": "2 steps", "batch": 64}
    return {**small_recipe, "data": {"sources": {"one": {"corpus": str(tmp_path / "one.txt")}}, "sequence_length": 32}, "training": training}


@pytest.mark.filterwarnings("ignore::cairn.errors.Notice")
def test_one_short_document_trains_and_what_needs_held_out_text_is_refused_with_the_remedy(short, tmp_path):
    with pytest.warns(Notice, match="Nothing can be measured on held-out text"):
        run = train(short, tmp_path / "run")
    for task in ("held-out", "next-token", "held-out-objective"):
        with pytest.raises(InputError, match=r"No held-out sequences.*corpus=NAME_OR_PATH.*data\.held_out"):
            cairn.evaluate(run.newest(), [{"name": task}])
    assert cairn.evaluate(run.newest(), [{"name": "held-out", "corpus": str(tmp_path / "one.txt"), "sequences": 2}])[0].value > 0


def test_a_callback_that_needs_held_out_text_is_refused_before_anything_is_written(short, tmp_path):
    with pytest.warns(Notice), pytest.raises(InputError, match="No held-out sequences"):
        train({**short, "callbacks": [{"name": "evaluate", "every": "1 steps", "measurements": ["held-out"]}]}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
