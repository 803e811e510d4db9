"""Many processes, one run: every layout computes what one process computes, and resumes what any other has left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cairn.checkpoint.format import read, summary, verify
from cairn.training.parallel import GradientSums
from cairn.training.run import Run, fork, train
from tests.faults import torchrun

STEPS = 8
"""benchmarks/layouts.py runs a hundred, in more layouts."""
WORKER = """
import json, os, sys
import torch.distributed as dist
from cairn.training.run import fork, resume, train
dist.init_process_group("gloo")  # once for all jobs: a run that finds a group uses it
for act, source, settings, options in json.loads(sys.argv[1]):
    {"train": train, "fork": fork, "resume": resume}[act](source, *([options.pop("run")] if act != "resume" else []), settings, **options)
os._exit(0)
"""


def work(tmp_path, processes, *jobs):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(processes, tmp_path / "worker.py", json.dumps(jobs))


def layout(text):
    return [f"parallel.{key}={value}" for key, value in zip(("data", "shard", "tensor"), text.split("x"), strict=True)]


@pytest.fixture(scope="module")
def recipe(small_recipe):
    """Accumulation, clipping, document masks and a callback with tensors are on; nothing divides by 3 or 4 that need not."""
    changed = {
        "model": {**small_recipe["model"], "hidden_size": 56, "intermediate_size": 84, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {**small_recipe["data"], "documents": "mask"},
        "training": {"tokens": f"{STEPS} steps", "batch": 12 * 32, "micro_batch": 32, "clip": 0.5, "precision": "float64", "compile": False},
        "checkpoint": {"every": f"{STEPS} steps", "also": ["2 steps"]},
        "callbacks": [{"name": "ema", "decay": 0.9}],
    }
    return {**small_recipe, **changed}


@pytest.fixture(scope="module", params=["float64", "float32"])
def alone(request, recipe, tmp_path_factory):
    """The same by one process."""
    precision = request.param
    return precision, train(recipe, tmp_path_factory.mktemp("alone") / precision, [f"training.precision={precision}"])


def gap(run, reference, key="loss"):
    ours, theirs = ([row[key] for row in each.metrics()] for each in (run, reference))
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("processes", "layouts"), [(2, ["2x1x1", "1x2x1", "1x1x2"]), (3, ["1x3x1"]), (4, ["1x2x2", "2x2x1"])])
def test_every_layout_has_the_loss_curve_of_one_process(processes, layouts, alone, recipe, tmp_path):
    precision, reference = alone
    if (precision, processes) == ("float32", 2):
        pytest.skip("two processes add up in one order; three and four say what float32 does")
    tolerance = {"float64": 1e-9, "float32": 1e-5}[precision]
    jobs = [["train", recipe, [*layout(each), f"training.precision={precision}"], {"run": str(tmp_path / each)}] for each in layouts]
    work(tmp_path, processes, *jobs)
    for each in layouts:
        run = Run(tmp_path / each)
        assert gap(run, reference) < tolerance and gap(run, reference, "grad_norm") < 100 * tolerance, each
        newest, wanted = run.newest(), reference.newest()
        assert verify.verify(newest.path).sound
        for stem in ("tensors", "optimizer", "ingredients"):
            ours, theirs = getattr(newest, stem), getattr(wanted, stem)
            assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
            assert all(torch.allclose(ours[name].load(), theirs[name].load(), rtol=0, atol=1e4 * tolerance) for name in ours), (each, stem)


def test_sums_in_float64_make_copies_compute_the_same_bits_and_shards_nearly(recipe, tmp_path):
    """In float32, three processes add up in another order than one: without the key the first assertion fails."""
    settings = ["training.precision=float32", "training.gradient_sums=float64", "training.tokens=8 steps", "checkpoint.every=8 steps"]
    weighted = [*settings, "reweighting.name=loss-based"]
    alone, alone_weighted = train(recipe, tmp_path / "alone", settings), train(recipe, tmp_path / "weighted", weighted)
    jobs = [["train", recipe, [*layout(each), *settings], {"run": str(tmp_path / each)}] for each in ("3x1x1", "1x3x1")]
    jobs.append(["train", recipe, [*layout("3x1x1"), *weighted], {"run": str(tmp_path / "both")}])
    work(tmp_path, 3, *jobs)
    assert Run(tmp_path / "3x1x1").newest().model_digest == alone.newest().model_digest
    assert Run(tmp_path / "both").newest().model_digest == alone_weighted.newest().model_digest != alone.newest().model_digest
    assert gap(Run(tmp_path / "1x3x1"), alone) < 1e-6 and gap(Run(tmp_path / "1x3x1"), alone, "grad_norm") < 1e-6


def test_gradient_sums_do_not_depend_on_the_order():
    pieces = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))

    def summed(order):
        parameter, sums = torch.nn.Parameter(torch.zeros(1000)), GradientSums()
        for number in order:
            parameter.grad = pieces[number].clone()
            sums.add([parameter])
            assert parameter.grad is None
        sums.finish()
        return parameter.grad

    there, back = range(64), range(63, -1, -1)
    assert torch.equal(summed(there), summed(back)) and torch.equal(summed(there), pieces.double().sum(0).float())
    assert not torch.equal(sum(pieces[i] for i in there), sum(pieces[i] for i in back))  # in float32 the order matters


def test_an_encoder_decoder_has_the_loss_curve_of_one_process(small_recipe, tmp_path):
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    options = ["training.precision=float64", "training.tokens=6 steps", "objective=ul2", "checkpoint.every=100%"]
    base = {**small_recipe, "model": {"name": "t5", **sizes}}
    alone = train(base, tmp_path / "alone", options)
    layouts = ["2x1x1", "1x2x1"]
    work(tmp_path, 2, *(["train", base, [*layout(each), *options], {"run": str(tmp_path / each)}] for each in layouts))
    for each in layouts:
        assert gap(Run(tmp_path / each), alone) < 1e-9, each
        assert {n: t.shape for n, t in Run(tmp_path / each).newest().tensors.items()} == {n: t.shape for n, t in alone.newest().tensors.items()}
        for name, tensor in Run(tmp_path / each).newest().tensors.items():
            assert torch.allclose(tensor.load(), alone.newest().tensors[name].load(), rtol=0, atol=1e-7), (each, name)


def test_a_run_goes_from_four_processes_to_two_to_three_to_one(recipe, alone, tmp_path):
    precision, reference = alone
    if precision == "float32":
        pytest.skip("one precision says it")
    run = str(tmp_path / "run")
    work(tmp_path, 4, ["train", recipe, layout("1x2x2"), {"run": run, "stop_at_step": 2}])
    work(tmp_path, 2, ["resume", run, layout("1x1x2"), {"stop_at_step": 4}])
    work(tmp_path, 3, ["resume", run, layout("1x3x1"), {"stop_at_step": 6}])
    from cairn.training.run import resume

    resume(run, layout("1x1x1"))
    assert gap(Run(tmp_path / "run"), reference) < 1e-9
    assert "parallel.shard: 3 -> 1" in Run(tmp_path / "run").newest().lineage.changed

    # Controls: what a wrong resume would do is seen by the same check.
    start = read.list_checkpoints(run)[0]
    wrong = fork(start, tmp_path / "fresh", layout("1x1x1"), fresh=["optimizer"], stop_at_step=5)
    assert gap_after(wrong, reference) > 1e-3
    wrong = fork(start, tmp_path / "data", [*layout("1x1x1"), "seed=8"], stop_at_step=5)
    assert gap_after(wrong, reference) > 1e-3
    wrong = fork(swapped(start, tmp_path / "swapped").path, tmp_path / "heads", layout("1x1x1"), stop_at_step=5)
    assert gap_after(wrong, reference) > 1e-5  # four decades above what the check allows


def gap_after(run, reference):
    theirs = {row["step"]: row["loss"] for row in reference.metrics()}
    return max(abs(row["loss"] - theirs[row["step"]]) / theirs[row["step"]] for row in run.metrics())


def swapped(path, out):
    """The checkpoint with the halves of every query matrix exchanged, as a wrong order of shards would leave it."""
    from cairn.checkpoint.saving import write

    source = read.open(path)
    tensors = source.tensors.load()
    for name in tensors:
        if name.endswith("q_proj.weight"):
            tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)
    return write.save(
        out,
        model=tensors,
        config=source.config,
        tokenizer=source.tokenizer,
        optimizer=source.optimizer.load(),
        ingredients=source.ingredients.load(),
        trainer=source.trainer,
        lineage=source.lineage,
    )


def test_the_same_layout_resumes_bit_for_bit(recipe, tmp_path):
    """Three processes: with two, the order of additions cannot matter."""
    jobs, again = [], []
    for each in ("3x1x1", "1x3x1"):
        settings = [*layout(each), "training.tokens=8 steps"]
        jobs.append(["train", recipe, settings, {"run": str(tmp_path / f"{each}-whole")}])
        jobs.append(["train", recipe, settings, {"run": str(tmp_path / f"{each}-parts"), "stop_at_step": 3}])
        again.append(["resume", str(tmp_path / f"{each}-parts"), [], {}])
    work(tmp_path, 3, *jobs)
    work(tmp_path, 3, *again)
    for each in ("3x1x1", "1x3x1"):
        assert Run(tmp_path / f"{each}-whole").newest().digest == Run(tmp_path / f"{each}-parts").newest().digest, each


def test_what_tensor_parallelism_can_not_cut_is_said(small_recipe, tmp_path, monkeypatch):
    from cairn.errors import InputError

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"parallel\.tensor=3 does not divide the model's 4 heads"):
        train(small_recipe, tmp_path / "run", layout("1x1x3"))


def test_as_many_copies_as_were_started(small_recipe, monkeypatch):
    from cairn.errors import InputError
    from cairn.training.recipe import Recipe

    monkeypatch.setenv("WORLD_SIZE", "6")
    assert Recipe.parse({**small_recipe, "training": {"batch": 384}, "parallel": {"data": "all", "tensor": 2}}).parallel.data == 3
    with pytest.raises(InputError, match="6 started process"):
        Recipe.parse({**small_recipe, "parallel": {"data": "all", "shard": 4}})


def test_a_lost_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(recipe, tmp_path):
    """torchrun starts the processes again; they go on from the newest complete checkpoint, without a human."""
    import yaml

    changed = {"training": {**recipe["training"], "tokens": "16 steps"}, "checkpoint": {"every": "2 steps"}, "parallel": {"data": 2, "restarts": 9}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changed}))
    finished = {}
    for name, kills in (("whole", 0), ("lossy", 1)):
        run = tmp_path / name
        command = [sys.executable, "-m", "cairn", "train", str(tmp_path / "recipe.yaml"), "--run", str(run), "--json"]
        said = (tmp_path / f"{name}.log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        lost = set()
        while process.poll() is None:
            if len(lost) < kills and (steps := Run(run).metrics()) and steps[-1]["step"] >= 8 * (len(lost) + 1):
                worker = next(iter(set(children(process.pid)) - lost))
                lost.add(worker)
                os.kill(worker, signal.SIGKILL)
                while worker in children(process.pid):
                    time.sleep(0.05)
            time.sleep(0.01)
        assert process.returncode == 0, (tmp_path / f"{name}.log").read_text()
        assert len(lost) == kills
        finished[name] = Run(run).newest()
    assert finished["lossy"].digest == finished["whole"].digest
    assert "resume" in {entry["act"].partition(": ")[2] for entry in summary.log(finished["lossy"])}


def children(pid):
    """Worker processes that a launcher has started and that still run."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            command = Path(f"/proc/{child}/cmdline").read_text()
        except FileNotFoundError:
            continue
        if state != "Z" and "cairn" in command:
            found.append(int(child))
    return found


def test_a_run_that_is_there_goes_on_when_asked_and_only_as_itself(small_recipe, small_run, tmp_path):
    from cairn.errors import InputError, ResumeError

    train(small_recipe, tmp_path / "run", stop_at_step=9)
    with pytest.raises(InputError, match="not empty"):
        train(small_recipe, tmp_path / "run")
    with pytest.raises(ResumeError, match="cannot change seed"):
        train({**small_recipe, "seed": 8}, tmp_path / "run", go_on=True)
    assert train(small_recipe, tmp_path / "run", go_on=True).newest().digest == small_run.newest().digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        train(small_recipe, tmp_path / "other", go_on=True)
    assert train(small_recipe, tmp_path / "fresh", go_on=True).newest().digest == small_run.newest().digest
