"""Deaths of trainers and nodes, again and again, with snapshots in memory and parity across nodes (card 07, proof b)."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.checkpoint.memory.plan import find
from cairn.studies.conditions import Condition, at_most, judged, stated
from cairn.studies.nodes import Fault, NodeJob
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run

NODES, STEPS, EVERY, ON_DISK = 3, 120, 2, 50
KINDS = ["writing"] * 4 + ["update"] * 2 + ["moment"] * 4 + ["node"] * 4 + ["double"]
"""The faults of one seed, in an order that the seed decides."""


def recipe(seed: int) -> dict[str, Any]:
    """A byte-level LLaMA of 0.3M parameters on tiny Shakespeare, in float64."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"plays": {"corpus": "tiny-shakespeare"}}, "sequence_length": 32},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "schedule": {"name": "cosine", "warmup": "10 steps"},
        "training": {"tokens": f"{STEPS} steps", "batch": 6 * 32, "precision": "float64", "compile": False},
        "checkpoint": {"every": f"{ON_DISK} steps"},
    }


@register("study", "memory-snapshots", paper=Paper("Reliable and Efficient In-Memory Fault Tolerance of LLM Pretraining", "arXiv:2310.12670", card=7))
class MemorySnapshots(Study):
    """Whatever dies, a run goes on from memory within a few steps and ends with the same bits; two nodes of a group at once cost a disk checkpoint."""

    minutes: ClassVar[float] = 8
    reads: ClassVar[tuple[Any, ...]] = ("tiny-shakespeare",)
    published: ClassVar[str] = (
        "Snapshots held in host memory by a separate process survive the trainer's death, and erasure coding across nodes survives a node's, at near-zero "
        "saving overhead (Llama-2-34B, 512 GPUs). How many deaths were tried is not given."
    )
    protocol: ClassVar[str] = (
        "Three nodes, each a trainer, a keeper and a memory of its own (gloo, parallel.shard=3), train a byte-level LLaMA of 0.3M parameters on tiny "
        "Shakespeare in float64 for 120 steps; a snapshot every 2 steps with parity 1, a disk checkpoint every 50. Each of three seeds has 15 faults "
        "in an order and at steps that the seed decides, all by SIGKILL, after each of which the job is started again: 4 trainers while they write a "
        "snapshot, 2 in the middle of an update, 4 at a random moment, 4 nodes (trainer and keeper killed, memory removed), and 2 nodes at once. The steps "
        "that each death costs are compared with what the checkpoint every 50 steps alone would have cost at the same deaths."
    )
    control: ClassVar[str] = "One slot instead of two: a snapshot is written over the one before."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        with NodeJob(work / "whole", NODES) as whole:
            whole.start(recipe(seed))
            if not whole.finish(within=600):
                raise RuntimeError(f"the uninterrupted run did not end well; see {work}")
        memory = [f"fault_tolerance.memory.every={EVERY}", "fault_tolerance.memory.parity=1"]
        prepare = f"{__name__}:single_slot" if sabotage else ""
        with NodeJob(work / "faulted", NODES, memory, prepare=prepare) as job:
            faults, ended = _faulted(job, seed, say)
        ours, theirs = Run(job.run), Run(whole.run)
        return {
            "faults": faults,
            "ended": ended,
            "digest_equal": ours.newest().digest == theirs.newest().digest,
            "losses_equal": [row["loss"] for row in ours.metrics()] == [row["loss"] for row in theirs.metrics()],
        }

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        faults = [fault for run in runs for fault in run["faults"]]
        double = [fault for fault in faults if fault["kind"] == "double"]
        single = [[fault for fault in run["faults"] if fault["kind"] != "double"] for run in runs]
        count = {kind: sum(fault["kind"] == kind for fault in faults) for kind in dict.fromkeys(KINDS)}
        kills = count["writing"] + count["update"] + count["moment"]
        equal = [run["ended"] and run["digest_equal"] and run["losses_equal"] for run in runs]
        worst = max(fault["lost"] for each in single for fault in each)
        sums = [[sum(fault[key] for fault in each) for key in ("lost", "lost_on_disk")] for each in single]
        refused = [fault["from"] == "disk" and fault["restored"] % ON_DISK == 0 for fault in double]
        return [
            stated(
                "faults: kills (while writing, in an update), node losses, double losses",
                ">= 30 (10, 5), 10, 3",
                f"{kills} ({count['writing']}, {count['update']}), {count['node']}, {count['double']}",
                kills >= 30 and count["writing"] >= 10 and count["update"] >= 5 and count["node"] >= 10 and count["double"] >= 3,
                always=True,
            ),
            stated(
                "runs with the losses and the final state of the uninterrupted one",
                "all, bit-equal",
                f"{sum(equal)} of {len(equal)}",
                all(equal),
                main=True,
                always=True,
            ),
            stated("kills and node losses: most steps lost by one", f"<= {EVERY + 1}", str(worst), worst <= EVERY + 1, main=True, always=True),
            stated("double losses refused in memory, taken from disk", "all", f"{sum(refused)} of {len(refused)}", all(refused), always=True),
            judged(
                f"steps computed again, share of those with a checkpoint on disk every {ON_DISK}",
                [ours / theirs for ours, theirs in sums],
                at_most(0.1),
                found="; ".join(f"{ours} of {theirs}" for ours, theirs in sums),
                main=True,
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axis = plotting.subplots(figsize=(7, 4))
        for kind in dict.fromkeys(KINDS):
            chosen = [fault for run in runs for fault in run["faults"] if fault["kind"] == kind]
            axis.plot([f["died"] for f in chosen], [f["lost"] for f in chosen], "o", label=kind)
        every = [fault for run in runs for fault in run["faults"]]
        axis.plot([f["died"] for f in every], [f["lost_on_disk"] for f in every], "_", color="grey", label=f"disk every {ON_DISK}")
        axis.set(xlabel="step at the death", ylabel="steps lost", yscale="symlog")
        axis.legend()
        plotting.save(figure, path)


def schedule(seed: int) -> list[tuple[str, int, int]]:
    """The faults of a seed: kind, the step at which each comes, the node that it strikes."""
    chooser = random.Random(seed)
    kinds = chooser.sample(KINDS, len(KINDS))
    return [(kind, 6 + 7 * number + chooser.randint(0, 4), chooser.randrange(NODES)) for number, kind in enumerate(kinds)]


def _faulted(job: NodeJob, seed: int, say: Say) -> tuple[list[dict[str, Any]], bool]:
    """Go through all faults of a seed and then to the end: what each fault cost, and whether the run ended well."""
    chooser, faults = random.Random(seed + 1000), []
    first: dict[str, Any] | None = recipe(seed)
    for kind, step, node in schedule(seed):
        inside = Fault(node, kind, step) if kind in ("writing", "update") else None
        job.start(first, inside)
        first = None
        if inside is None:
            if not job.when(lambda step=step: job.step() >= step, within=600):  # type: ignore[misc]
                raise RuntimeError(f"the job ended before step {step}; see {job.run}")
            time.sleep(chooser.uniform(0, 0.1))
            job.kill(node)
        job.finish(within=600)
        if job.ended[node] != -signal.SIGKILL:
            raise RuntimeError(f"process {node} was not killed as planned but ended with {job.ended[node]}; see {job.run}")
        if kind in ("node", "double"):
            for lost in {node, (node + 1) % NODES} if kind == "double" else {node}:
                job.lose(lost)
        faults.append(_cost(job, kind, node))
        say(f"  {kind}: {faults[-1]}")
    job.start(None)
    return faults, job.finish(within=600)


def _cost(job: NodeJob, kind: str, node: int) -> dict[str, Any]:
    """From where the run will go on, and how many finished steps are lost by that."""
    died, plan = job.step(), find(job.run)
    on_disk = read.open(job.run).step or 0
    restored = max(on_disk, plan.version.step if plan is not None else 0)
    return {
        "kind": kind,
        "node": node,
        "died": died,
        "from": "memory" if plan is not None and plan.version.step >= on_disk else "disk",
        "restored": restored,
        "lost": died - restored,
        "lost_on_disk": died - on_disk,
    }


def single_slot() -> None:
    """The control, in each trainer: one slot, which is written over whatever it holds."""
    from cairn.checkpoint.memory import link
    from cairn.checkpoint.memory.snapshots import Snapshots

    start, begun = link.start, Snapshots._begun

    def start_with_one(settings: link.Settings) -> link.Home:
        return start(settings.model_copy(update={"slots": 1}))

    def begin_over(self: Snapshots, header: Any) -> str | None:
        self.keep = None
        return begun(self, header)

    link.start, Snapshots._begun = start_with_one, begin_over  # type: ignore[method-assign]
