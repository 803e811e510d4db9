"""Averages of branches against models trained on the union of their data (card 22, proof b)."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.data import corpora
from cairn.data.installation import read as read_source
from cairn.evaluation.measure import Measurement
from cairn.merging.ablate import AblationRow, BranchPool, agreement
from cairn.options import configure
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, at_least, at_most, judged
from cairn.studies.study import Figures, Say, Study

PARTS = {
    "asyncio": ["asyncio"],
    "email": ["email"],
    "unittest": ["unittest"],
    "markup": ["xml", "html", "json"],
    "idle": ["idlelib"],
    "system": ["ctypes", "importlib", "logging"],
}
"""Partitions: packages of the standard library, each cut to the size of the smallest."""
DOCUMENTED = ("torch", "sympy", "networkx", "numpy", "matplotlib", "fontTools")
"""Partitions of the second corpus: what packages say of themselves, as much of each as of a partition of the first."""
STEPS = 120
RATE = 6e-4
LENGTHS, RATES = (30, 120, 480), (RATE, 3e-3)
"""Of branches, where it is asked how far they may go."""


@register(
    "study",
    "data-ablation",
    paper=Paper("Scalable Data AblationStudy Approximations for Language Models through Modular Training and Merging", "arXiv:2410.15661", card=22),
)
class AblationStudy(Study):
    """The loss of an average of branches stands for that of a model trained on the union of their data."""

    minutes: ClassVar[float] = 30
    published: ClassVar[str] = (
        "Perplexities of parameter averages and of models trained on the union are strongly correlated, at 130M and up to 1.1B parameters."
    )
    protocol: ClassVar[str] = (
        "A byte-level decoder (2 layers, width 64) learns the top-level modules of the standard library (600 steps of 16 x 64 bytes, AdamW 3e-3). Six "
        "packages are partitions of equal size, the last 15 % held out; each gets a branch of 120 steps at a constant 6e-4, moments carried over. The truth "
        "is a model trained 240 steps on each of the 15 pairs. Loss is measured on the six held-out parts. Three seeds; every condition on the mean of seeds. "
        "Reported without a condition: the same on a second corpus (docstrings of six packages, equal parts of the same size), and, at seed 0, branches of "
        "30, 120 and 480 steps at 6e-4 and at the rate of pretraining, 3e-3, each against models trained twice as long."
    )
    control: ClassVar[str] = "The merge of each candidate is scored as if it were another candidate's."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _rows(seed, work / "pool", parts(), say)
        if sabotage:
            rows = _swapped(_done[seed])
            return {"rows": [asdict(row) for row in rows], **_agreements(rows)}
        figures = {"rows": [asdict(row) for row in _done[seed]], **_agreements(_done[seed])}
        say(f"seed {seed}: docstrings")
        figures["docstrings"] = _agreements(_rows(seed, work / "docstrings", docstrings(), say))
        if seed == self.seeds[0]:
            figures["further"] = {
                f"{steps} steps at {rate:g}": _agreements(_rows(seed, work / f"further-{rate:g}-{steps}", parts(), say, steps, rate))
                for rate in RATES
                for steps in LENGTHS
            }
        return figures

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def both(key: str) -> str:
            return ", ".join(f"{run['merge'][key]:.3f} (mean of branches {run['mean_of_branches'][key]:.3f})" for run in runs)

        def least(name: str, key: str, bound: float) -> Condition:
            return judged(name, [run["merge"][key] for run in runs], at_least(bound), rule="mean", found=both(key), main=True)

        regret = [run["merge"]["regret"] for run in runs]
        shares = [run["merge"]["error"] / run["mean_of_branches"]["error"] for run in runs]
        errors = ", ".join(f"{share:.3f} ({run['merge']['error']:.4f} nats)" for share, run in zip(shares, runs, strict=True))
        return [
            least("correlation with the truth, mean over domains", "pearson", 0.8),
            least("the same, domains outside the candidate", "pearson_outside", 0.6),
            least("correlation of the mean over domains", "pearson_macro", 0.9),
            judged("regret of the merge's pick, share of the spread", regret, at_most(0.25), rule="mean"),
            judged("absolute error over that of the mean of branches", shares, at_most(0.5), rule="mean", found=errors),
        ]

    def also(self, runs: Sequence[Figures]) -> dict[str, str]:
        def mean(corpus: Sequence[Figures], key: str, form: str) -> str:
            merge, branches = (sum(run[proxy][key] for run in corpus) / len(corpus) for proxy in ("merge", "mean_of_branches"))
            return f"{merge:{form}} (mean of branches {branches:{form}})"

        told = {"r of domains inside the candidate": mean(runs, "pearson_inside", ".3f")}
        told |= {f"error on domains {where} the candidate, nats": mean(runs, f"error_{where}", ".4f") for where in ("inside", "outside")}
        corpora = {"docstrings": [run["docstrings"] for run in runs]} | {name: [found] for name, found in runs[0]["further"].items()}
        for name, corpus in corpora.items():
            told |= {f"{name}: r": mean(corpus, "pearson", ".3f"), f"{name}: r of domains outside": mean(corpus, "pearson_outside", ".3f")}
            told |= {f"{name}: error, nats": mean(corpus, "error", ".4f")}
        return told

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 3, figsize=(13, 4))
        for rate in RATES:
            found = [runs[0]["further"][f"{steps} steps at {rate:g}"] for steps in LENGTHS]
            for proxy, style in (("merge", "-"), ("mean_of_branches", ":")):
                axes[2].plot(LENGTHS, [each[proxy]["error"] for each in found], style, marker="o", label=f"{proxy.replace('_', ' ')}, {rate:g}")
        axes[2].set(title="how far branches may go", xlabel="steps of a branch", ylabel="absolute error, nats", xscale="log")
        axes[2].legend()
        axes[0].sharey(axes[1])
        for axis, key in zip(axes[:2], ("merge", "mean_of_branches"), strict=True):
            rows = [row for run in runs for row in run["rows"]]
            axis.scatter([row["truth"] for row in rows], [row[key] for row in rows], s=6)
            ends = [min(row["truth"] for row in rows), max(row["truth"] for row in rows)]
            axis.plot(ends, ends, color="grey", linewidth=0.8)
            axis.set(title=key.replace("_", " "), xlabel="loss of the model trained on the union")
        plotting.save(figure, path)


_done: dict[int, list[AblationRow]] = {}
"""Validated rows by seed: the control only attributes them wrongly."""


def _rows(seed: int, folder: Path, texts: Mapping[str, tuple[str, str]], say: Say, steps: int = STEPS, rate: float = RATE) -> list[AblationRow]:
    start = bases.trained(_recipe(seed), say=say)
    pool = BranchPool(start, folder, [f"optimizer.lr={rate}", "data.held_out=0"])
    domains: dict[str, Measurement] = {}
    for name, (train, held_out) in texts.items():
        pool.add(name, bases.text_file([train]), steps)
        corpus = str(bases.text_file([held_out]))
        domains[name] = configure("measurement", {"name": "held-out", "corpus": corpus, "sequence_length": 64, "sequences": 192})
    pairs = pool.candidates(2)
    rows = pool.ablate(pairs, domains)
    say(f"seed {seed}: {len(pairs)} models trained on unions, {2 * steps} steps at {rate:g}")
    return pool.validate(rows, domains, steps)


def _agreements(rows: Sequence[AblationRow]) -> Figures:
    return {proxy: agreement(rows, proxy) for proxy in ("merge", "mean_of_branches", "best_branch")}


def _swapped(rows: Sequence[AblationRow]) -> list[AblationRow]:
    """Each merge under the name of the candidate that stands opposite in the list."""
    candidates = list(dict.fromkeys(row.candidate for row in rows))
    other = dict(zip(candidates, reversed(candidates), strict=True))
    merges = {(row.candidate, row.domain): row.merge for row in rows}
    return [AblationRow(**asdict(row) | {"candidate": row.candidate, "merge": merges[other[row.candidate], row.domain]}) for row in rows]


def _recipe(seed: int) -> dict[str, Any]:
    corpora.resolve(library.source("1 GiB"))  # read below file by file; named here for the record
    modules = [text for path in sorted(_library().glob("*.py")) if (text := read_source(path))]
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"modules": {"corpus": str(bases.text_file(modules))}}, "sequence_length": 64, "held_out": 0.0},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "40 steps", "final": 0.2},
        "training": {"tokens": "600 steps", "batch": 16 * 64, "compile": False},
        "checkpoint": {"every": "600 steps"},
    }


def parts() -> dict[str, tuple[str, str]]:
    """Training and held-out text of each package or group of packages, all of one size."""
    texts = {}
    for name, packages in PARTS.items():
        files = [path for package in packages for path in sorted((_library() / package).rglob("*.py")) if "test" not in path.parts]
        texts[name] = "\n".join(text for path in files if (text := read_source(path)))
    size = min(map(len, texts.values()))
    return {name: _cut(text[:size]) for name, text in texts.items()}


def docstrings() -> dict[str, tuple[str, str]]:
    """The same of what packages document, as much of each as `parts` has."""
    texts = dict.fromkeys(DOCUMENTED, "")
    size = sum(map(len, next(iter(parts().values()))))
    for document in corpora.resolve({"name": "python-docs", "max_bytes": None}).documents():
        package = document.id.removeprefix("docstrings:").split("/")[0]
        if document.id.startswith("docstrings:") and len(texts.get(package, " " * size)) < size:
            texts[package] += document.text + "\n"
    return {name: _cut(text[:size]) for name, text in texts.items()}


def _cut(text: str) -> tuple[str, str]:
    place = int(len(text) * 0.85)
    return text[:place], text[place:]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
