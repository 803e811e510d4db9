"""A run saved in one layout goes on in another with the loss curve of its own (card 02, proof b)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.checkpoint.saving import write
from cairn.errors import CairnError
from cairn.studies.conditions import Condition, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run

SAVED, END = 20, 40
LIMIT = {"float64": 1e-9, "float32": 1e-5}
LAYOUTS = {"dp2": (2, 1), "dp1": (1, 1), "dp3": (3, 1), "dp4": (4, 1), "tp2-dp2": (2, 2)}
"""Data-parallel and tensor-parallel processes of each resume."""
DAMAGES = ("optimizer", "cursor", "heads")
SABOTAGE = {"dp2": "heads", "dp1": "optimizer", "dp3": "cursor", "dp4": "heads", "tp2-dp2": "optimizer"}


def recipe(seed: int, precision: str) -> dict[str, Any]:
    """Byte-level LLaMA of 2 layers and width 64 on tiny-shakespeare: 40 updates of 12 sequences of 64 bytes, by two processes."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"tokenizer": "byte", "sources": {"shakespeare": {"corpus": "tiny-shakespeare"}}, "sequence_length": 64},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "5 steps"},
        "training": {"tokens": f"{END} steps", "batch": 12 * 64, "precision": precision, "compile": False},
        "checkpoint": {"every": f"{SAVED} steps"},
        "parallel": {"data": 2},
    }


@register("study", "reshard", paper=Paper("Universal Checkpointing: Efficient and Flexible Checkpointing for Large Scale Distributed Training", card=2))
class Reshard(Study):
    """A run saved by two data-parallel processes goes on over 1 to 4, and over tensor-parallel ones, with an unchanged loss curve."""

    minutes: ClassVar[float] = 8
    reads: ClassVar[tuple[Any, ...]] = ("tiny-shakespeare",)
    published: ClassVar[str] = (
        "Runs saved with tensor, pipeline and data parallelism resume in other layouts with the loss curve of the source (GPT-3 style, LLaMA 7B, BLOOM-176B, a "
        "Mixtral-like model)."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (2 layers, width 64, batch 12 x 64) trains 40 steps on tiny-shakespeare with two data-parallel gloo processes, AdamW, and saves at "
        "step 20. From there it resumes to step 40 with dp=1, 2, 3, 4 and with tp=2 x dp=2 processes, in float64 and in float32. The figure is the largest "
        "relative difference of the training loss from the uninterrupted run. Besides, three wrong resumes by one process: optimizer state dropped, data "
        "cursor counted for one process instead of all, halves of the query, key and value matrices swapped. Three seeds; every condition must hold in each."
    )
    control: ClassVar[str] = "Every resume is one of the three wrong ones."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        figures: Figures = {}
        _launch(2, work, [_job("train", work / precision / "whole", recipe=recipe(seed, precision)) for precision in LIMIT])
        arms = {(precision, name): work / precision / name for precision in LIMIT for name in LAYOUTS}
        for (precision, name), run in arms.items():
            _interrupted(work / precision / "whole", run, SABOTAGE[name] if sabotage else None)
        wrong = {damage: work / "float64" / damage for damage in DAMAGES}
        for damage, run in wrong.items():
            _interrupted(work / "float64" / "whole", run, damage)
        for processes in sorted({data * tensor for data, tensor in LAYOUTS.values()}):
            jobs = [
                _job("resume", run, LAYOUTS[name], fresh=sabotage and SABOTAGE[name] == "optimizer")
                for (_, name), run in arms.items()
                if LAYOUTS[name][0] * LAYOUTS[name][1] == processes
            ]
            if processes == 1:
                jobs += [_job("resume", run, (1, 1), fresh=damage == "optimizer") for damage, run in wrong.items()]
            say(f"  {len(jobs)} resumes by {processes} process(es)")
            _launch(processes, work, jobs)
        for precision in LIMIT:
            whole = Run(work / precision / "whole")
            figures[precision] = {name: _gap(Run(arms[precision, name]), whole) for name in LAYOUTS}
            figures[f"{precision} losses"] = {name: _losses(Run(arms[precision, name])) for name in LAYOUTS} | {"whole": _losses(whole)}
        figures["identical"] = Run(arms["float64", "dp2"]).newest().digest == Run(work / "float64" / "whole").newest().digest
        figures["wrong"] = {damage: _gap(Run(run), Run(work / "float64" / "whole")) for damage, run in wrong.items()}
        return figures

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        same = [run["identical"] for run in runs]
        found = [stated("same layout (dp=2): the checkpoint at step 40", "bit-equal", str(same), all(same), main=True, always=True)]
        for precision, limit in LIMIT.items():
            for name in LAYOUTS:
                value = max(float(run[precision][name]) for run in runs)
                required = f"largest relative loss difference <= {limit:g}"
                found.append(stated(f"{name}, {precision}", required, f"{value:.2e}", value <= limit, main=True, always=True))
        for damage in DAMAGES:
            smallest = min(float(run["wrong"][damage]) for run in runs)
            found.append(stated(f"the same figure sees a wrong resume ({damage})", "> 1e-3", f"{smallest:.2e}", smallest > 1e-3, always=True))
        return found

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, len(LIMIT), figsize=(10, 3.6))
        for axis, (precision, limit) in zip(axes, LIMIT.items(), strict=True):
            losses = runs[0][f"{precision} losses"]
            steps = range(SAVED + 1, END + 1)
            for name in LAYOUTS:
                gaps = [abs(a - b) / abs(b) for a, b in zip(losses[name], losses["whole"], strict=True)]
                axis.plot(steps, [max(gap, 1e-18) for gap in gaps], label=name)
            axis.axhline(limit, color="grey", linewidth=1)
            axis.set(yscale="log", xlabel="step", ylabel="relative difference of the loss", title=f"{precision}, seed {runs[0]['seed']}")
            axis.legend()
        plotting.save(figure, path)


def _gap(run: Run, whole: Run) -> float:
    """The largest relative difference of the loss after the resume."""
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(_losses(run), _losses(whole), strict=True))


def _losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics() if row["step"] > SAVED]


def _interrupted(whole: Path, run: Path, damage: str | None) -> None:
    """The run as it lay at the save; `cursor` and `heads` write a damaged checkpoint in place of the true one."""
    newest = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns(f"step-{END:08d}"))
    if damage not in ("cursor", "heads"):
        return
    source = read.open(whole / newest)
    tensors, trainer = source.tensors.load(), dict(source.trainer or {})
    if damage == "cursor":
        trainer["position"] //= 2  # as one of the two processes would count
    else:
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)
    shutil.rmtree(run / newest)
    assert source.lineage is not None and source.optimizer is not None
    write.save(
        run / newest,
        model=tensors,
        config=source.config,
        tokenizer=source.tokenizer,
        optimizer=source.optimizer.load(),
        trainer=trainer,
        lineage=source.lineage,
    )


def _job(act: str, run: Path, layout: tuple[int, int] = (2, 1), *, recipe: dict[str, Any] | None = None, fresh: bool = False) -> dict[str, Any]:
    settings = [f"parallel.data={layout[0]}", f"parallel.tensor={layout[1]}"]
    return {"act": act, "run": str(run), "recipe": recipe, "settings": settings, "fresh": ["optimizer"] if fresh else []}


def _launch(processes: int, work: Path, jobs: Sequence[dict[str, Any]]) -> None:
    """Do the jobs in `processes` gloo processes, which are started once for all of them."""
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", __name__, json.dumps(list(jobs))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        (work / "failed.txt").write_text(done.stderr)
        raise CairnError(f"{processes} processes of the study failed; {work / 'failed.txt'} holds what they said.")


def _work() -> None:
    """One of the processes: what `cairn train` and `cairn resume` do, job after job."""
    import os

    import torch.distributed as dist

    from cairn.training.run import resume, train

    dist.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        if job["act"] == "train":
            train(job["recipe"], job["run"], job["settings"])
        else:
            resume(job["run"], job["settings"], fresh=job["fresh"])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a gloo thread that still holds the last tensor would abort the process, its work done


if __name__ == "__main__":
    _work()
