"""Averages of snapshots against the last one and against selection, across languages and as language models (card 9, proof b)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cairn import plotting, randomness
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.evaluation.measure import evaluate
from cairn.merging.barrier import barrier
from cairn.merging.combine import average, merge
from cairn.merging.protocols import ORACLE, evaluate_selection
from cairn.options import configure
from cairn.studies import bases
from cairn.studies.conditions import Condition, above, at_least, judged, stated
from cairn.studies.merging import tagging
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run
from cairn.training.sources import open_data

RATES = (1e-3, 5e-3, 2e-2)
LANGUAGES = {"de": ("ud-de-gsd", "de_gsd-ud-test.conllu"), "es": ("ud-es-gsd", "es_gsd-ud-test.conllu")}
MEASURED = {"name": "held-out", "sequences": 256}
SENTENCES = 800
"""Of each file that is trained on, the first ones."""
FEW = (5, 10, 50, 100, 250)
"""Sentences of a target language, for the few-shot arm."""
RAW = [("ud-en-ewt", "en_ewt-ud-dev.conllu"), ("ud-de-gsd", "de_gsd-ud-dev.conllu"), ("ud-es-gsd", "es_gsd-ud-dev.conllu")]


@register(
    "study",
    "checkpoint-averaging",
    paper=Paper("Free Lunch: Robust Cross-Lingual Transfer via Model Checkpoint Averaging", "arXiv:2305.16834", card=9),
)
class Averaging(Study):
    """The average of one run's snapshots transfers better than its last one, whatever the learning rate, and no one looked at the target."""

    minutes: ClassVar[float] = 14
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    published: ClassVar[str] = (
        "Checkpoint averaging gains consistently over the last and over source-dev checkpoints across tasks and target languages, and is far "
        "less sensitive to hyperparameters (sizes not used here)."
    )
    protocol: ClassVar[str] = (
        "Parts of speech, English to German and Spanish (treebanks EWT and GSD; the card's ParTUT is not free). Hashed 3- to 5-grams and a "
        "bidirectional GRU of 64, pretrained four epochs on 800 sentences of each language by guessing masked words; fine-tuned six epochs on "
        "English (800 sentences of EWT's development file), linear decay, 10 snapshots, learning rates 1e-3, 5e-3, 2e-2, four seeds. Protocols: "
        "last, source-dev, average of all ten (CA), oracle; 200 sentences of each test file. At 1e-3 also averages of three runs with one head's "
        "initialisation and with three. Second arm: a byte-level decoder (2 layers, width 64) on tiny-shakespeare, 400 steps at a constant 3e-3 "
        "and with a cosine to zero, average of the last five of ten checkpoints. "
        "Reported without a condition: averages of the last five snapshots and with linear weights; the barrier of the loss on English between the first and "
        "the last snapshot of a run and between runs with one head's initialisation and with two (in nats, 11 points); and a few-shot arm, ten epochs more "
        "from the last snapshot at 1e-3 on 5 to 250 sentences of the target language, where the average of that run's ten snapshots stands against its last."
    )
    control: ClassVar[str] = (
        "Before the decoder's checkpoints at a constant rate are averaged, their hidden units are renumbered at random; each alone computes what it did."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if not sabotage:
            return _honest(seed, work, say)
        spoilt = _constant_gain(seed, work, say, renumber=True)
        return self.honest(seed) | {"language_model": self.honest(seed)["language_model"] | {"constant": spoilt}}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        rates = [[*run["rates"].values()] for run in runs]
        cells = [cell for each in rates for cell in each]
        gains = [100 * float(np.mean([cell["ca"] - cell["last"] for cell in each])) for each in rates]
        ranges = {name: [float(np.ptp([cell[name] for cell in each])) for each in rates] for name in ("ca", "last")}
        better, below_oracle = sum(cell["ca"] > cell["last"] for cell in cells), sum(cell["ca"] <= cell[ORACLE] for cell in cells)
        constant, decayed = ([run["language_model"][name] for run in runs] for name in ("constant", "decayed"))
        shared, apart = ([run["runs"][name] for run in runs] for name in ("shared", "independent"))

        def ahead(name: str, larger: list[float], smaller: list[float], main: bool = False) -> Condition:
            differences = [a - b for a, b in zip(larger, smaller, strict=True)]
            told = "; ".join(f"{a:.4f}, {b:.4f}" for a, b in zip(larger, smaller, strict=True))
            return judged(name, differences, above(0), rule="mean", found=told, main=main)

        return [
            judged("target accuracy, CA minus last, mean over the rates", gains, at_least(0.5), rule="mean", unit="points", form="+.2f", main=True),
            stated("cells in which CA is better", f">= 8 of {len(cells)}", str(better), better >= 8, main=True),
            ahead("range over learning rates: last minus CA", ranges["last"], ranges["ca"], main=True),
            stated("cells in which CA does not pass the oracle", "more than half", f"{below_oracle} of {len(cells)}", below_oracle > len(cells) / 2),
            judged("language model: gain of the average at a constant rate", constant, at_least(0.02), rule="mean", unit="nats", form=".4f"),
            ahead("language model: gain at a constant rate minus gain with a decayed one", constant, decayed),
            ahead("accuracy of the average of three runs: shared minus independent heads", shared, apart),
        ]

    def also(self, runs: Sequence[Figures]) -> dict[str, str]:
        cells = [run["rates"][rate] for run in runs for rate in run["rates"]]

        def gain(name: str) -> str:
            return f"{100 * np.mean([cell[name] - cell['last'] for cell in cells]):+.2f} points"

        told = {"last five snapshots, minus last": gain("ca_last_half"), "all ten with linear weights, minus last": gain("ca_linear")}
        told |= {f"{name}, minus last": gain(name) for name in ("src-dev", ORACLE)}
        for rate in runs[0]["rates"]:
            told[f"barrier within a run at {rate}"] = ", ".join(f"{run['rates'][rate]['barrier']:+.3f}" for run in runs)
        for name in ("shared", "independent"):
            told[f"barrier between runs with {name} heads"] = ", ".join(f"{run['runs'][f'{name} barrier']:+.3f}" for run in runs)
        for count in map(str, FEW):
            last, mean = (100 * float(np.mean([run["few"][count][name] for run in runs])) for name in ("last", "ca"))
            told[f"few-shot, {count} sentences: average against last"] = f"{mean:.1f}, {last:.1f} %"
        return told

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axis = plotting.subplots(figsize=(7, 3.8))
        for name in ("last", "src-dev", "ca", ORACLE):
            rates = list(runs[0]["rates"])
            values = np.array([[run["rates"][rate][name] for rate in rates] for run in runs])
            axis.errorbar(rates, values.mean(0), yerr=values.std(0), marker="o", capsize=3, label=f"{name} (oracle)" if name == ORACLE else name)
        axis.set(xlabel="learning rate", title="tagging accuracy, mean of German and Spanish")
        axis.legend()
        plotting.save(figure, path)


def _honest(seed: int, work: Path, say: Say) -> Figures:
    texts = [tagging.sentences(*place, SENTENCES) for place in RAW]
    say(f"seed {seed}: pretraining the tagger")
    body = tagging.pretrain([sentence for some in texts for sentence in some], work / "body", seed)
    tests = {"en": ("ud-en-ewt", "en_ewt-ud-test.conllu"), **LANGUAGES}
    held_out = {language: tagging.stored(work / f"{language}.jsonl", tagging.sentences(*place, 200)) for language, place in tests.items()}
    head = randomness.seed_for(seed, "head")

    def tuned(name: str, lr: float, head: int, order: int) -> list[Checkpoint]:
        start = tagging.headed(body, work / name / "start", head)
        return tagging.fine_tune(start, texts[0], work / name, lr=lr, order=randomness.seed_for(seed, "run", order))

    runs: dict[float, list[Checkpoint]] = {}
    rates = {}
    for lr in RATES:
        say(f"seed {seed}: fine-tuning at {lr:g}")
        runs[lr] = tuned(f"lr-{lr:g}", lr, head, 0)
        rates[f"{lr:g}"] = _protocols(runs[lr], held_out, work / f"choose-{lr:g}")
    decayed = bases.run_of(_recipe(seed, {"name": "cosine", "warmup": "20 steps", "final": 0.0}), say=say)
    language_model = {"constant": _constant_gain(seed, work, say, renumber=False), "decayed": _gain(decayed, work / "lm-decayed")}
    averages = _run_averages(tuned, held_out, work, head)
    say(f"seed {seed}: few-shot")
    return {"rates": rates, "language_model": language_model, "runs": averages, "few": _few_shot(runs[RATES[0]][-1], held_out, work, seed)}


def _mean(checkpoint: Checkpoint, held_out: dict[str, Path]) -> float:
    return float(np.mean([tagging.accuracy(checkpoint, held_out[language]) for language in LANGUAGES]))


def _protocols(run: list[Checkpoint], held_out: dict[str, Path], work: Path) -> dict[str, float]:
    """Mean target accuracy of each protocol."""

    def score(checkpoint: Checkpoint, language: str) -> float:
        return tagging.accuracy(checkpoint, held_out[language])

    table = evaluate_selection([run], score, "en", list(LANGUAGES), work, protocols=("last", "src-dev", "ca", ORACLE), oracle=True)
    found = {choice.protocol: choice.mean for choice in table}
    half = average(run[len(run) // 2 :], work / "last-half")
    linear = merge("linear", run, work / "linear", {"weights": list(range(1, len(run) + 1))})
    return found | {"ca_last_half": _mean(half, held_out), "ca_linear": _mean(linear, held_out), "barrier": _barrier(run[0], run[-1], held_out["en"])}


def _barrier(one: Checkpoint, other: Checkpoint, source: Path) -> float:
    """By how much the loss on the line between two taggers lies above the line between their losses."""
    weights = [checkpoint.tensors.load() for checkpoint in (one, other)]

    def loss(share: float) -> float:
        return tagging.loss(one, {name: share * weights[0][name] + (1 - share) * weights[1][name] for name in weights[0]}, source)

    return barrier(loss).height


def _few_shot(last: Checkpoint, held_out: dict[str, Path], work: Path, seed: int) -> dict[str, dict[str, float]]:
    """Mean target accuracy after a few sentences of the target: of the last snapshot and of the average, by the number of sentences."""
    found: dict[str, dict[str, float]] = {}
    start = tagging.restarted(last, work / "few-start")
    for count in FEW:
        scores: dict[str, list[float]] = {"last": [], "ca": []}
        for language, (dataset, _) in LANGUAGES.items():
            seen = tagging.sentences(*next(place for place in RAW if place[0] == dataset), count)
            folder = work / f"few-{count}-{language}"
            run = tagging.fine_tune(start, seen, folder, lr=RATES[0], order=randomness.seed_for(seed, "few"), epochs=10)
            for name, checkpoint in (("last", run[-1]), ("ca", average(run, work / f"few-{count}-{language}-ca"))):
                scores[name].append(tagging.accuracy(checkpoint, held_out[language]))
        found[str(count)] = {name: float(np.mean(values)) for name, values in scores.items()}
    return found


def _run_averages(tuned: Any, held_out: dict[str, Path], work: Path, head: int) -> dict[str, float]:
    """Mean target accuracy of averages of three runs, with heads that began equal and with heads that did not."""
    found = {}
    for name in ("shared", "independent"):
        runs = [tuned(f"{name}-{i}", RATES[0], head + (i if name == "independent" else 0), i) for i in range(3)]
        mean = average([average(run, work / f"{name}-ca-{i}") for i, run in enumerate(runs)], work / f"{name}-mean")
        found[name] = _mean(mean, held_out)
        found[f"{name} barrier"] = _barrier(runs[0][-1], runs[1][-1], held_out["en"])
    return found


def _gain(run: Run, folder: Path) -> float:
    """By how many nats the average of the last five checkpoints is better than the last."""
    return _loss(run.newest()) - _loss(read.open(average([run.path], folder, last=5).path))


def _constant_gain(seed: int, work: Path, say: Say, *, renumber: bool) -> float:
    """The same at a constant rate, with the hidden units of each checkpoint as they are or renumbered."""
    run = bases.run_of(_recipe(seed, {"name": "constant", "warmup": "20 steps"}), say=say)
    return _loss(run.newest()) - _renumbered_loss(run, seed) if renumber else _gain(run, work / "lm-constant")


def _renumbered_loss(run: Run, seed: int) -> float:
    """Held-out loss of the average of the last five checkpoints of a decoder, the hidden units of each in another order."""
    models = [_renumbered(read.open(path), seed * 100 + number) for number, path in enumerate(run.checkpoints()[-5:])]
    last = run.newest()
    model = last.model()
    model.load_state_dict({name: torch.stack([each[name].double() for each in models]).mean(0).float() for name in models[0]})
    _, feed = open_data(run.recipe.data, run.recipe.seed, last.tokenizer)
    return configure("measurement", MEASURED).of(model, last.tokenizer, feed)[0].value


def _renumbered(checkpoint: Checkpoint, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a decoder that computes the same, with the hidden units of every MLP in an order of its own."""
    weights = checkpoint.tensors.load()
    for name in [name for name in weights if name.endswith("mlp.down_proj.weight")]:
        units = weights[name].shape[1]
        order = torch.from_numpy(randomness.permutation(randomness.seed_for(seed, name), units, np.arange(units)))
        weights[name] = weights[name][:, order]
        for rows in ("gate_proj", "up_proj"):
            other = name.replace("down_proj", rows)
            weights[other] = weights[other][order]
    return weights


def _loss(checkpoint: Checkpoint) -> float:
    rows = evaluate(checkpoint, [MEASURED], store=False)
    return next(row.value for row in rows if row.metric == "loss")


def _recipe(seed: int, schedule: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"plays": {"corpus": "tiny-shakespeare"}}, "sequence_length": 64, "held_out": 0.1},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": schedule,
        "training": {"tokens": "400 steps", "batch": 16 * 64, "compile": False},
        "checkpoint": {"every": "40 steps"},
    }
