"""Metadata in front of documents, then a cooldown without: what they tell the model, and whether it can do without (card 57, proof b)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.read import open as opened
from cairn.data import corpora
from cairn.data.text.metadata import TRANSFORMS, Metadata
from cairn.data.text.tokens import is_held_out, share_of
from cairn.evaluation.engine import engine_of
from cairn.generation.sample import generate_text
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, above, at_least, below, between, judged
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run

STEPS, COOLDOWN, BATCH, LENGTH, HELD_OUT = 400, 40, 16 * 128, 128, 0.1
HOSTS = {"source": "code.python", "docs": "docs.python.org", "plays": "plays.example.net", "problems": "school.example.org"}
WRONG = {"source": "plays.example.net", "docs": "school.example.org", "plays": "code.python", "problems": "docs.python.org"}
EACH, SHORTEST, LONGEST, FIRST = 2500, 80, 320, 64
CODE = re.compile(r"^\s*(def |class |import |from |return|if .*:$|for .*:$|self\.|#|@|else:|try:|raise |\w[\w.]* = |\w[\w.]*\(.*\)$)")
"""What makes a line look like Python."""


@register("study", "metadata", paper=Paper("Metadata Conditioning Accelerates Language Model Pre-training", "arXiv:2501.01956", card=57))
class MetadataConditioning(Study):
    """Metadata tell the model what kind of text begins; a short cooldown without them repairs what it lacks when they are missing."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "1.6B with metadata and a 10 % cooldown matches standard training with 33 % less data on ten tasks; hashed hosts do about as well as "
        "readable ones; perplexity without metadata is not improved; hosts in the prompt steer."
    )
    protocol: ClassVar[str] = (
        "Byte-level LLaMA of 0.4M parameters (3 layers, width 96, context 256), 400 steps of 2048 tokens at 3e-3 (cosine). Short documents (80 to 320 "
        "characters, paragraphs), 2500 each from python-source, python-docs, tiny-shakespeare and gsm8k, each kind with a host; packed complete, "
        "attention inside a document. Arms: plain; hosts in front, then 40 steps of cooldown on documents kept for it; the same with hashed hosts. "
        "All read as much text: where fronts take room, the first stage has so many more steps than 360. On 60 held-out documents of each kind: loss "
        "of the first 64 bytes with the right and with another kind's host at the end of the first stage, loss of all bytes without metadata there "
        "and at the end. Steering: ten samples of 150 bytes at temperature 0.8 behind a host; the share of lines that match a fixed pattern of "
        "Python. Three seeds. Reported without a condition: the share of the plain arm's text after which the arm with hosts has that arm's loss of "
        "step 360, from checkpoints every 40 steps; and the steps of each arm."
    )
    control: ClassVar[str] = "Each document is shown the host of another one, drawn at random: metadata that say nothing."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        plain = bases.run_of(recipe(seed, None), say=say)
        arms = {"metadata": bases.run_of(recipe(seed, "shuffled" if sabotage else "host"), say=say)}
        if not sabotage:
            arms["hashed"] = bases.run_of(recipe(seed, "hash"), say=say)
        say(f"seed {seed}: scoring")
        figures: Figures = {"plain": {"first": _first(_at_switch(plain)), "before": _whole(_at_switch(plain)), "after": _whole(plain.newest())}}
        front = _fronts("host", HOSTS)
        figures["curves"] = {
            "plain": {str(checkpoint.step): _first(checkpoint) for checkpoint in _until_switch(plain)},
            "metadata": {f"{(checkpoint.step or 0) / stretch('host'):.1f}": _first(checkpoint, front) for checkpoint in _until_switch(arms["metadata"])},
        }
        figures["steps"] = {name: run.newest().step for name, run in {"plain": plain, **arms}.items()}
        return figures | {name: _conditioned(run, "hash" if name == "hashed" else "host", seed) for name, run in arms.items()}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        gains = [run["plain"]["first"] - run["metadata"]["right"] for run in runs]
        wrong = [run["metadata"]["wrong"] - run["metadata"]["right"] for run in runs]
        before = [run["metadata"]["without, before"] - run["plain"]["before"] for run in runs]
        after = [run["metadata"]["without, after"] - run["plain"]["after"] for run in runs]
        steered = [run["metadata"]["code"] / max(run["metadata"]["play"], 0.01) for run in runs]
        hashed = [
            100 * (run["hashed" if "hashed" in run else "metadata"]["right"] - run["plain"]["first"]) / -gain for run, gain in zip(runs, gains, strict=True)
        ]
        unit = "nats per byte"
        return [
            judged("first 64 bytes, plain minus with the right host", gains, above(0.05), unit=unit, form=".4f", main=True),
            judged("first 64 bytes, wrong minus right host", wrong, above(0.05), unit=unit, form=".4f", main=True),
            judged("without metadata, before the cooldown, minus plain", before, above(0.02), unit=unit, form=".4f"),
            judged("without metadata, after the cooldown, minus plain", after, below(0.02), unit=unit, form=".4f", main=True),
            judged("lines like Python, under the host of code to that of plays", steered, at_least(2), form=".1f", main=True),
            judged("gain with hashed hosts, of that with readable ones", hashed, between(80, 120), unit="%", form=".0f", main=True),
        ]

    def also(self, runs: Sequence[Figures]) -> dict[str, str]:
        steps = ", ".join(f"{name} {count}" for name, count in runs[0]["steps"].items())
        return {
            "share of the plain arm's text that its loss of the first 64 bytes takes with hosts": ", ".join(f"{_share(run['curves']):.0%}" for run in runs),
            "steps, for as much text": steps,
        }

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axis = plotting.subplots(figsize=(7, 3.6))
        bars = {
            "plain": [run["plain"]["first"] for run in runs],
            "right host": [run["metadata"]["right"] for run in runs],
            "hashed host": [run["hashed"]["right"] for run in runs],
            "wrong host": [run["metadata"]["wrong"] for run in runs],
        }
        axis.bar(list(bars), [np.mean(values) for values in bars.values()], yerr=[np.std(values) for values in bars.values()], capsize=4)
        axis.set(ylabel="loss of the first 64 bytes, nats per byte", ylim=(1, None))
        plotting.save(figure, path)


def texts() -> dict[str, list[str]]:
    """Short documents of four kinds, always the same: a whole paragraph each where there is one."""
    kinds = {
        "source": library.source("12 MiB"),
        "docs": library.docs("12 MiB"),
        "plays": "tiny-shakespeare",
        "problems": "gsm8k",
    }
    return {kind: list(islice(_short(corpora.resolve(spec).documents()), EACH)) for kind, spec in kinds.items()}


def _short(documents: Iterator[Any]) -> Iterator[str]:
    for document in documents:
        for part in document.text.split("\n\n"):
            if len(part) >= SHORTEST and part.isascii():
                yield part[:LONGEST]


def _file() -> Path:
    """All documents, each with its host and with one drawn at random."""
    names = list(HOSTS)
    rows: list[dict[str, str]] = []
    for kind, parts in texts().items():
        for part in parts:
            drawn = names[int(share_of(part, "wrong host") * len(names))]
            rows.append({"text": part, "url": f"https://{HOSTS[kind]}/page", "random": f"https://{HOSTS[drawn]}/page"})
    rows.sort(key=lambda row: share_of(row["text"], "order"))
    return bases.text_file(rows)


def recipe(seed: int, hosts: str | None) -> dict[str, Any]:
    """0.4M parameters, short documents from their beginning, a cooldown over the last tenth."""
    shown = {"transform": "hash" if hosts == "hash" else "host", "field": "random" if hosts == "shuffled" else "url"}
    first = STEPS - COOLDOWN if hosts is None else round((STEPS - COOLDOWN) * stretch(shown["transform"]))
    metadata = None if hosts is None else {**shown, "until": f"{first} steps", "reserved": 0.1}
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
        "data": {
            "tokenizer": "byte",
            "sources": {"pages": {"corpus": str(_file())}},
            "sequence_length": LENGTH * 2,
            "packing": "complete",
            "held_out": HELD_OUT,
            "metadata": metadata,
        },
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "30 steps", "final": 0.1},
        "training": {"tokens": f"{first + COOLDOWN} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{COOLDOWN} steps", "also": [f"{first} steps"]},
    }


@functools.cache
def stretch(transform: str) -> float:
    """How much longer documents are with their fronts than without, in tokens."""
    fronts = {kind: len(front) for kind, front in _fronts(transform, HOSTS).items()}
    plain = sum(len(part) + 1 for parts in texts().values() for part in parts)
    return 1 + sum(fronts[kind] for kind, parts in texts().items() for _ in parts) / plain


def _until_switch(run: Run) -> list[Checkpoint]:
    """The checkpoints up to the moment at which metadata end."""
    found = [opened(path) for path in run.checkpoints()]
    switch = (found[-1].step or 0) - COOLDOWN
    return [checkpoint for checkpoint in found if (checkpoint.step or 0) <= switch]


def _at_switch(run: Run) -> Checkpoint:
    """The checkpoint of the moment at which metadata end."""
    return _until_switch(run)[-1]


def _share(curves: Mapping[str, Mapping[str, float]]) -> float:
    """After which share of the plain curve's text the other one has fallen to its end; 1 if it does not get there earlier."""
    wanted, whole = list(curves["plain"].values())[-1], float(list(curves["plain"])[-1])
    steps, losses = [0.0, *map(float, curves["metadata"])], [math.inf, *curves["metadata"].values()]
    for number in range(1, len(steps)):
        if losses[number] <= wanted:
            way = (losses[number - 1] - wanted) / (losses[number - 1] - losses[number]) if number > 1 else 1.0
            return (steps[number - 1] + way * (steps[number] - steps[number - 1])) / whole
    return 1.0


def _held_out() -> dict[str, list[str]]:
    """Sixty documents of each kind that no arm was trained on."""
    return {kind: [part for part in parts if is_held_out(part, HELD_OUT)][:60] for kind, parts in texts().items()}


def _loss(checkpoint: Checkpoint, first: int | None, front: Mapping[str, str]) -> float:
    """Mean loss over the held-out documents' bytes, or their first ones, each behind what stands in front of its kind."""
    tokenizer, sequences, starts = checkpoint.tokenizer, [], []
    for kind, parts in _held_out().items():
        before = [tokenizer.eos_id, *tokenizer.encode(front.get(kind, ""))]
        for part in parts:
            sequences.append([*before, *tokenizer.encode(part)[: first or LONGEST]])
            starts.append(len(before))
    return -float(np.concatenate(engine_of(checkpoint.model()).token_scores(sequences, starts)).mean())


def _first(checkpoint: Checkpoint, front: Mapping[str, str] = MappingProxyType({})) -> float:
    return _loss(checkpoint, FIRST, front)


def _whole(checkpoint: Checkpoint) -> float:
    return _loss(checkpoint, None, {})


def _fronts(transform: str, hosts: Mapping[str, str]) -> dict[str, str]:
    """What stands in front of the documents of each kind."""
    metadata = Metadata(transform=transform)  # type: ignore[arg-type]
    return {kind: metadata.shown(TRANSFORMS[transform](name)) for kind, name in hosts.items()}


def _conditioned(run: Run, transform: str, seed: int) -> dict[str, float]:
    """What the metadata do at the end of the first stage, and what is missing without them before and after the cooldown."""
    switched = _at_switch(run)
    right, wrong = _fronts(transform, HOSTS), _fronts(transform, WRONG)
    found = {"right": _first(switched, right), "wrong": _first(switched, wrong)}
    found |= {"without, before": _whole(switched), "without, after": _whole(run.newest())}
    return found | {name: _python_like(switched, right[kind], seed) for name, kind in (("code", "source"), ("play", "plays"))}


def _python_like(checkpoint: Checkpoint, front: str, seed: int) -> float:
    """Share of the lines of ten samples behind a front that look like Python."""
    model, lines = checkpoint.model(), list[str]()
    for number in range(10):
        text = generate_text(model, checkpoint.tokenizer, "", max_new_tokens=150, temperature=0.8, seed=100 * seed + number, front=front)
        lines += [line for line in text.splitlines() if line.strip()]
    return sum(bool(CODE.match(line)) for line in lines) / max(len(lines), 1)
