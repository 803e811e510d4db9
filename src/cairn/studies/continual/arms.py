"""The small models that the studies of continued pretraining begin from, and their arms: one checkpoint, many ways to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cairn import plotting
from cairn.checkpoint.format.read import Checkpoint
from cairn.continual.pretrain import settings_to_continue
from cairn.evaluation.audits.gap import at_the_fork, curve
from cairn.evaluation.measure import Score
from cairn.studies import bases, library
from cairn.studies.study import Figures, Say
from cairn.training.run import Run

BASE, MORE, BATCH = 400, 200, 16 * 64
PEAK, LOW = 3e-3, 3e-4
SOURCE = library.source("8 MiB")
MODEL = {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
HELD_OUT = {"name": "held-out", "sequences": 128, "by_source": True}


def recipe(seed: int, sources: Mapping[str, Any], steps: int, schedule: Mapping[str, Any], sequences: int = 128, every: int = 10) -> dict[str, Any]:
    """A byte-level LLaMA of 0.15M parameters (2 layers, width 64), context 64, batch 16 x 64, held-out loss of each source every ten steps."""
    measure = HELD_OUT | {"sequences": sequences}
    return {
        "seed": seed,
        "model": MODEL,
        "data": {"tokenizer": "byte", "sources": dict(sources), "sequence_length": 64, "held_out": 0.1},
        "optimizer": {"name": "adamw", "lr": PEAK},
        "schedule": dict(schedule),
        "training": {"tokens": f"{steps} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{steps} steps"},
        "callbacks": [{"name": "evaluate", "every": f"{every} steps", "measurements": [measure]}],
    }


def finished(seed: int, say: Say) -> Checkpoint:
    """The finished base model: 400 steps on tiny-shakespeare, cosine from 3e-3 to 3e-4."""
    schedule = {"name": "rewarm", "warmup": "20 steps", "final": LOW / PEAK}
    return bases.trained(recipe(seed, {"plays": {"corpus": "tiny-shakespeare"}}, BASE, schedule, every=BASE), say=say)


def continued(base: Checkpoint, data: Mapping[str, Any], options: Mapping[str, Any], say: Say, more: Sequence[str] = ()) -> Run:
    """The base model gone on with for 200 steps, held-out loss of each source every ten, with these settings; found again by what it is."""
    settings = settings_to_continue(base, data, f"{MORE} steps", **{"rate": PEAK, **options})
    return bases.forked(base, [*settings, "callbacks.0.every=10 steps", *more], say=say)


def curves(run: Run, sources: Sequence[str], *, forked: bool = True, before: Mapping[str, Score] | None = None) -> Figures:
    """Held-out loss of each source over the steps since the run began, with the value before it where the run is a fork (`before`: what
    `at_the_fork` found, if it is known)."""
    start = (at_the_fork(run) if before is None else before) if forked else {}
    found: Figures = {}
    for source in sources:
        figure = f"held-out/{source}/loss"
        times, values = curve(run, figure, start[figure].value if figure in start else None)
        found[source] = values
        found["steps"] = [time // BATCH for time in times]
    return found


def draw(runs: Sequence[Figures], names: Mapping[str, str], titles: Mapping[str, str], path: Path) -> None:
    """A panel for each figure with a title: the curves of the named arms that have it, averaged over the seeds."""
    figure, axes = plotting.panels(len(titles))
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, label in names.items():
            if key in runs[0]["curves"][name]:
                axis.plot(runs[0]["curves"][name]["steps"], np.mean([run["curves"][name][key] for run in runs], axis=0), label=label)
        axis.set(xlabel="steps", title=title)
        axis.legend(fontsize=8)
    plotting.save(figure, path)


def losses(sources: Sequence[str]) -> dict[str, str]:
    """The titles of panels of held-out losses."""
    return {source: f"held-out loss on {source}, nats per byte" for source in sources}
