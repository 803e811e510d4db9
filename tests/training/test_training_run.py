"""Runs: exact resume, refusals, batches that divide in any way, kills, interrupts, non-finite losses, two processes."""

import json
import math
import shutil
import signal
import time

import pytest
import torch

from cairn.checkpoint.format import read, verify
from cairn.errors import DivergedError, InputError, ResumeError
from cairn.training import recipe as recipes
from cairn.training.loggers import Logger, drop_rows_after, read_rows
from cairn.training.loop import Trainer
from cairn.training.parallel import World
from cairn.training.run import Run, fork, resume, train
from cairn.training.sources import fitted, open_data
from tests import faults, ready


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics()]


def trainer(recipe: dict, *overrides: str) -> Trainer:
    loaded = recipes.load(recipe, overrides)
    tokenizer, feed = open_data(loaded.data, loaded.seed)
    return Trainer(fitted(loaded, tokenizer).pinned(), tokenizer, feed, World(0, 1, torch.device("cpu")), Logger())


def test_a_run_learns_and_leaves_what_scripts_rely_on(small_run):
    rows = small_run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[-1]["loss"] < rows[0]["loss"] - 1
    assert {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"} <= set(rows[0])
    assert [path.name for path in small_run.checkpoints()] == [f"step-{step:08d}" for step in (5, 10, 15, 20)]
    assert small_run.recipe.plain()["schedule"]["horizon"] == "5120 tokens"
    assert small_run.newest().lineage.options["recipe"] == small_run.recipe.plain()


def test_transformers_opens_a_training_checkpoint_as_it_lies(small_run):
    from transformers import AutoModelForCausalLM

    checkpoint = small_run.newest()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert (theirs(ids).logits - checkpoint.model()(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("stop", [1, 7, 15, 19])
def test_a_resume_at_any_step_changes_no_bit(small_recipe, small_run, tmp_path, stop):
    train(small_recipe, tmp_path / "r", stop_at_step=stop)
    again = resume(tmp_path / "r")
    assert losses(again) == losses(small_run)
    assert again.newest().digest == small_run.newest().digest


def test_a_resume_with_document_masks_and_two_sources_is_exact(small_recipe, corpus_file, tmp_path):
    changes = [
        "data.documents=mask",
        f"data.sources.more={{corpus: {corpus_file}, weight: 0.3}}",
        "training.micro_batch=64",
        "callbacks=[{name: ema, decay: 0.5}]",
        "schedule={name: wsd, warmup: 2 steps}",
    ]
    whole = train(small_recipe, tmp_path / "whole", changes)
    train(small_recipe, tmp_path / "cut", changes, stop_at_step=9)
    again = resume(tmp_path / "cut")
    assert again.newest().digest == whole.newest().digest and "ema/lm_head.weight" in again.newest().ingredients


def test_accumulation_never_changes_the_gradient(small_recipe):
    """1 x 16 = 4 x 4 = 16 x 1 sequences, in float64 and float32."""
    for precision, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        found = []
        for micro_batch in (512, 128, 32):
            each = trainer(small_recipe, "training.batch=512", f"training.micro_batch={micro_batch}", f"training.precision={precision}")
            loss, _ = each.gradients(each.micro_batches(0))
            found.append((float(loss), torch.cat([p.grad.flatten() for p in each.model.parameters()])))
        for loss, gradient in found[1:]:
            assert loss == pytest.approx(found[0][0], rel=tolerance * 10)
            assert (gradient - found[0][1]).abs().max() <= tolerance


def test_a_mean_is_over_the_global_batch_even_where_windows_are_not_full(small_recipe):
    """With padding the micro-batches weigh differently; a mean of means would be wrong."""
    settings = ["data.packing=whole", "data.sequence_length=128", "training.batch=1024", "training.precision=float64"]
    whole, parts = (trainer(small_recipe, *settings, f"training.micro_batch={n}") for n in (1024, 128))
    assert float(parts.gradients(parts.micro_batches(0))[0]) == pytest.approx(float(whole.gradients(whole.micro_batches(0))[0]), rel=1e-12)
    weights = [micro_batch.weight for micro_batch in parts.micro_batches(0)]
    assert len(set(weights)) > 1 and sum(weights) < 1024


def test_only_matrices_decay(small_recipe):
    decayed, plain = trainer(small_recipe).optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0 and all(p.dim() == 1 for p in plain["params"])


def test_or_everything_but_the_embedding(small_recipe):
    """OLMo 2's groups: norms and biases decay too, the embedding does not, the head does."""
    each = trainer(small_recipe, "optimizer.decay=not-embeddings", "model.attention_bias=true")
    names = {id(p): name for name, p in each.model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in each.optimizer.param_groups)
    assert plain == {"model.embed_tokens.weight"}
    assert {"lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= decayed


def test_with_z_loss_the_cross_entropy_is_reported_beside(small_recipe, tmp_path):
    plain, z = (
        train(small_recipe, tmp_path / name, [f"objective={{name: causal-lm, z_loss: {c}}}", "training.tokens=1 steps"]) for name, c in (("a", 0), ("z", 0.01))
    )
    (before,), (after,) = plain.metrics(), z.metrics()
    assert "cross_entropy" not in before and after["cross_entropy"] == pytest.approx(before["loss"], rel=1e-6)
    # At the beginning all logits are nearly 0, so log Z is nearly the logarithm of the size of the vocabulary.
    assert after["loss"] - after["cross_entropy"] == pytest.approx(0.01 * math.log(257) ** 2, rel=0.02)


def test_bfloat16_keeps_float32_weights_and_learns(small_recipe, tmp_path):
    run = train(small_recipe, tmp_path / "r", ["training.precision=bfloat16"])
    assert losses(run)[-1] < losses(run)[0] - 1 and run.newest().tensors["model.norm.weight"].dtype == torch.float32


def test_compiling_changes_only_rounding_and_resumes_exactly(small_recipe, small_run, tmp_path):
    train(small_recipe, tmp_path / "c", ["training.compile=true", "training.tokens=6 steps"], stop_at_step=3)
    run = resume(tmp_path / "c")
    plain = train(small_recipe, tmp_path / "p", ["training.tokens=6 steps"])
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)


def test_auto_compile_is_decided_once_and_written_down(small_recipe, tmp_path):
    run = train(small_recipe, tmp_path / "r", ["training.compile=auto", "training.tokens=2 steps"])
    assert run.recipe.training.compile is False, "two steps never pay for a compiler"


# -- what the published code got wrong -----------------------------------------------------------------------------


def test_the_optimizer_is_part_of_a_checkpoint_and_must_be_given_up_by_name(small_recipe, small_run, tmp_path):
    shutil.copytree(small_run.path, tmp_path / "r")
    newest = read.list_checkpoints(tmp_path / "r")[-1]
    bare = tmp_path / "bare" / "checkpoints" / newest.name
    from cairn.checkpoint.saving import write

    full = read.open(newest)
    write.save(bare, model=full.tensors.load(), config=full.config, tokenizer=full.tokenizer, trainer=full.trainer, lineage=full.lineage)
    with pytest.raises(ResumeError, match="holds no optimizer state"):
        resume(tmp_path / "bare", ["training.tokens=25 steps"])
    run = resume(tmp_path / "bare", ["training.tokens=25 steps"], fresh=["optimizer"])
    assert "optimizer state: kept -> fresh" in run.newest().lineage.changed


def test_a_longer_run_does_not_stretch_the_learning_rate(small_recipe, small_run, tmp_path):
    shutil.copytree(small_run.path, tmp_path / "r")
    longer = resume(tmp_path / "r", ["training.tokens=30 steps"])
    rates = [row["learning_rate"] for row in longer.metrics()]
    assert rates[:20] == [row["learning_rate"] for row in small_run.metrics()]
    assert rates[20:] == pytest.approx([3e-4] * 10)
    assert "training.tokens: 20 steps -> 30 steps" in read.open(longer.checkpoints()[4]).lineage.changed


def test_false_means_false(small_recipe):
    assert recipes.load(small_recipe, ["training.deterministic=False"]).training.deterministic is False


def test_step_counts_of_the_optimizer_come_back(small_recipe, tmp_path):
    run = train(small_recipe, tmp_path / "r", stop_at_step=6)
    steps = {name: tensor.load().item() for name, tensor in run.newest().optimizer.items() if name.endswith("/step")}
    assert steps and set(steps.values()) == {6.0}


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("model.hidden_size=64", "model.hidden_size"),
        ("seed=8", "seed"),
        ("data.sequence_length=64", "data.sequence_length"),
        ("training.batch=512", "training.batch"),
    ],
)
def test_a_resume_can_not_become_another_run(small_run, change, word):
    with pytest.raises(ResumeError, match=rf"cannot change {word}.*cairn fork"):
        resume(small_run.path, [change])


def test_only_the_newest_checkpoint_is_resumed(small_run):
    with pytest.raises(ResumeError, match="not the newest"):
        resume(small_run.checkpoints()[0])


def test_a_run_directory_is_used_once(small_recipe, small_run):
    before = sorted(small_run.path.rglob("*"))
    with pytest.raises(InputError, match="not empty"):
        train(small_recipe, small_run.path)
    assert sorted(small_run.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("training.batch=100", "not a multiple of data.sequence_length"),
        ("training.micro_batch=96", "must be a multiple"),
        ("parallel.data=3", "cannot be shared"),
        ("training.tokens=10%", "in tokens or steps"),
        ("model.vocab_size=100", "smaller than the tokenizer"),
        ("optimizer.lrr=1", "Did you mean 'lr'"),
        ("data.sources={}", "at least one source"),
        ("parallel.data=2", "2 process"),
    ],
)
def test_impossible_recipes_are_refused_before_anything_is_made(small_recipe, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        train(small_recipe, tmp_path / "r", [change])
    assert not (tmp_path / "r").exists()


# -- non-finite, interrupts, kills -----------------------------------------------------------------------------------


def poisoned(recipe: dict, *overrides: str, at: int = 2) -> Trainer:
    """A trainer whose loss is not a number in the update `at`."""
    each = trainer(recipe, *overrides)
    honest = each.gradients

    def gradients(micro_batches):
        loss, parts = honest(micro_batches)
        return (torch.tensor(math.nan), parts) if each.progress.step == at else (loss, parts)

    each.gradients = gradients
    return each


def test_a_non_finite_loss_stops_before_the_update(small_recipe):
    each = poisoned(small_recipe)
    with pytest.raises(DivergedError, match="Step 3: loss nan"):
        for moment in each.run():
            weights = {name: p.clone() for name, p in each.model.named_parameters()}
            assert moment.step <= 2
    assert all(torch.equal(p, weights[name]) for name, p in each.model.named_parameters())


def test_or_is_skipped_and_counted(small_recipe):
    each = poisoned(small_recipe, "training.non_finite=skip")
    assert [moment.step for moment in each.run(5)] == [1, 2, 3, 4, 5]
    assert each.progress.skipped == 1 and {s["step"].item() for s in each.optimizer.state.values()} == {4.0}


def test_too_many_skips_in_a_row_stop(small_recipe):
    each = trainer(small_recipe, "training.non_finite=skip", "training.non_finite_limit=2")
    each.gradients = lambda micro_batches: (torch.tensor(math.inf), {})
    with pytest.raises(DivergedError, match="Step 3"):
        list(each.run())


def written(recipe: dict, folder) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return str(path)


def test_ctrl_c_saves_the_step_and_the_run_goes_on_exactly(small_recipe, small_run, tmp_path):
    slow = small_recipe | {"checkpoint": {"every": "1000 steps"}}
    words = ["training.tokens=2000 steps", "schedule.horizon=20 steps", "--run", str(tmp_path / "r")]
    process = ready.cairn("train", written(slow, tmp_path), *words)
    while process.poll() is None and len(list(read_rows(tmp_path / "r" / "metrics.jsonl"))) < 4:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and f"go on with: cairn resume {tmp_path / 'r'}" in error, error
    step = Run(tmp_path / "r").newest().step
    assert step == Run(tmp_path / "r").metrics()[-1]["step"] and step < 2000
    target = max(20, step)
    again = resume(tmp_path / "r", [f"training.tokens={target} steps"])
    assert losses(again)[:20] == losses(small_run)


def test_kills_at_random_moments_lose_nothing_that_was_saved(small_recipe, tmp_path):
    """SIGKILL while training and saving (a checkpoint every step): the newest checkpoint always opens and the end is bit-equal."""
    recipe = written(small_recipe | {"checkpoint": {"every": "1 steps"}}, tmp_path)
    whole = train(recipe, tmp_path / "whole", ["training.tokens=60 steps"])
    killed, run = 0, tmp_path / "r"
    command = ["train", recipe, "training.tokens=60 steps", "--run", str(run)]
    for delay in faults.moments(11, 4, 0.3):
        process = ready.cairn(*command)
        known, since = len(read.list_checkpoints(run)), []

        def moment(known=known, since=since, delay=delay) -> bool:
            if not since and len(read.list_checkpoints(run)) > known:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > delay

        killed += faults.kill_when(process, moment)
        assert all(verify.verify(path).sound for path in read.list_checkpoints(run)[-2:])
        command = ["resume", str(run)]
    assert killed >= 2
    again = resume(run)
    assert losses(again) == losses(whole) and again.newest().digest == whole.newest().digest


def test_a_torn_last_row_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    drop_rows_after(path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_old_checkpoints_go_when_asked(small_recipe, tmp_path):
    run = train(small_recipe, tmp_path / "r", ["checkpoint.keep=2", "checkpoint.also=[3 steps]"])
    assert [path.name for path in run.checkpoints()] == ["step-00000015", "step-00000020"]
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]


# -- forks ----------------------------------------------------------------------------------------------------------


def test_a_fork_keeps_everything_that_it_does_not_change(small_run, tmp_path):
    source = small_run.checkpoints()[1]
    branch = fork(source, tmp_path / "f")
    assert losses(branch) == losses(small_run)[10:] and branch.newest().digest == small_run.newest().digest
    assert read.open(branch.checkpoints()[0]).lineage.parents[0].digest == read.open(source).digest


def test_a_fork_says_what_it_changed(small_run, tmp_path):
    branch = fork(small_run.checkpoints()[1], tmp_path / "f", ["optimizer.lr=1e-3", "schedule.rewarm=4 steps"], fresh=["optimizer"])
    first = read.open(branch.checkpoints()[0])
    assert any(line.startswith("optimizer.lr: 0.003 -> 0.001") for line in first.lineage.changed)
    rates = [row["learning_rate"] for row in branch.metrics()]
    expected = [row["learning_rate"] / 3 for row in small_run.metrics()[10:]]
    assert rates == pytest.approx([rate * min(1, (i + 1) / 4) for i, rate in enumerate(expected)])


def test_a_fork_onto_other_data_begins_them_at_their_beginning(small_run, corpus_file, tmp_path):
    branch = fork(small_run.checkpoints()[1], tmp_path / "f", [f"data.sources={{other: {{corpus: {corpus_file}}}}}", "data.held_out=0.2"])
    assert branch.newest().trainer["position"] == 10 * 8 and branch.newest().step == 20


def test_a_checkpoint_without_training_state_is_forked_with_a_fresh_optimizer(small_run, small_recipe, tmp_path):
    from cairn.merging.combine import average

    average([small_run.path], tmp_path / "mean", last=2)
    with pytest.raises(ResumeError):
        fork(tmp_path / "mean", tmp_path / "no", recipe=small_recipe)
    branch = fork(tmp_path / "mean", tmp_path / "f", recipe=small_recipe, fresh=["optimizer"])
    assert branch.newest().step == 20 and losses(branch)[0] < losses(small_run)[0] - 1


# -- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_make_the_same_run_and_one_set_of_files(small_recipe, small_run, tmp_path):
    done = faults.cairn("train", written(small_recipe, tmp_path), "parallel.data=2", "training.micro_batch=64", "--run", str(tmp_path / "r"), "--json")
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "r")
    assert losses(run) == pytest.approx(losses(small_run), rel=1e-5)
    assert [row["step"] for row in run.metrics()] == list(range(1, 21)), "only the first process writes"
    assert all(verify.verify(path).sound for path in run.checkpoints())
    assert run.newest().trainer == small_run.newest().trainer


def test_a_run_changes_its_number_of_processes_on_the_way(small_recipe, small_run, tmp_path):
    train(small_recipe, tmp_path / "r", stop_at_step=10)
    done = faults.cairn("resume", str(tmp_path / "r"), "parallel.data=2", "--json")
    assert done.returncode == 0, done.stderr
    assert losses(Run(tmp_path / "r")) == pytest.approx(losses(small_run), rel=1e-5)
    assert "parallel.data: 1 -> 2" in read.open(Run(tmp_path / "r").checkpoints()[2]).lineage.changed
