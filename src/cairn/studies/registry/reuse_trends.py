"""What names, downloads and cards of a model hub say, and whether our own cards and examples hold what they promise (card 13)."""

from __future__ import annotations

import csv
import functools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.data import datasets
from cairn.errors import CairnError
from cairn.registry import licenses, modelcard, trends
from cairn.registry.card import card
from cairn.registry.challenges import category_of
from cairn.registry.explain import explain
from cairn.registry.names import model_type
from cairn.studies.conditions import Condition, at_least, below, judged, stated
from cairn.studies.registry.reuse_registry import FIELDS, FILLED, recipe
from cairn.studies.study import Figures, Say, Study

COUNTS = {"bert": 19551, "roberta": 4107, "t5": 3872, "gpt": 3843, "distilbert": 3391, "wav2vec2": 3337, "opus-mt": 1655, "bart": 1427, "xlm": 1346, "vit": 735,
          "electra": 684}  # fmt: skip
"""Names of August 2022 that hold each of these as a part."""
BERTS = {"bert", "roberta", "distilbert", "deberta", "albert", "camembert", "mobilebert", "xlm-roberta", "electra"}
"""Types of the BERT family: encoders trained as BERT is, by any recipe."""
MONTHS, SERIES, LEVEL = 24, 200, 400


@register(
    "study",
    "reuse-trends",
    paper=Paper("Deep Learning Model Reuse in the HuggingFace Community: Challenges, Benefit and Trends", "arXiv:2401.13177", card=13),
)
class ReuseTrends(Study):
    """BERT's family leads by far, formats of outputs are documented least, planted trends are seen, and our cards and examples hold."""

    minutes: ClassVar[float] = 3
    published: ClassVar[str] = (
        "BERT-family models dominate discussion and uploads (rank correlation about 0.70 for the major types); some types keep being uploaded while fewer "
        "people talk of them; outputs are hard to comprehend, and the share of models with cards did not grow in spite of tools."
    )
    protocol: ClassVar[str] = (
        "Names: 63,367 repositories of August 2022, counted by substring as published and by the longest part that tells a type; the BERT family against "
        "every other type. Downloads: Gini and share of the ten largest. Cards: the fill rates of eight fields in 50 hand-read models. Licenses of 22,861 "
        "uses against three licenses of a project, and a published table of conflicts against ours. Trends: 200 pairs of Poisson series of 24 months (400 "
        "a month) that rise and fall by 3 % a month, and 200 flat ones. Our own: cards of all checkpoints of a run, a fork, an average, an export and a "
        "merge; their examples asked again; an example without tokenizer or labels; the processor time of `cairn train` and "
        "`cairn generate` from an empty folder to the first text, which others on the machine do not lengthen. Three seeds."
    )
    control: ClassVar[str] = (
        "Letters of the names are put into alphabetical order, planted trends are left out, and each example is asked of another checkpoint than it "
        "was stored for."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        found: Figures = {"names": _names(sabotage), "downloads": _downloads(), "cards": _cards(), "licenses": _licenses()}
        found |= {"trends": _trends(seed, sabotage), "zoo": _zoo(work / "zoo", seed, sabotage), "first_output": _first_output(work / "first", seed)}
        return found

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def every(name: str, required: str, found: Callable[[Figures], Any], holds: Callable[[Any], bool], main: bool = False) -> Condition:
            values = [found(run) for run in runs]
            return stated(name, required, "; ".join(str(value) for value in values), all(map(holds, values)), main=main, always=True)

        formats = {"input format", "output format"}
        return [
            every(
                "substring counts that are as published",
                f"all {len(COUNTS)}",
                lambda r: sum(r["names"]["counts"][k] == n for k, n in COUNTS.items()),
                lambda n: n == len(COUNTS),
            ),
            judged("BERT family over the largest other type", [run["names"]["factor"] for run in runs], at_least(3), form=".2f", main=True),
            every("fill rates that are as published", "all 8", lambda r: sum(r["cards"]["filled"][k] == n for k, n in FILLED.items()), lambda n: n == 8),
            every("least documented", "input format, output format", lambda r: r["cards"]["least"][:2], lambda v: set(v) == formats, True),
            every(
                "next",
                "parameter count, limitations, hardware",
                lambda r: r["cards"]["least"][2:],
                lambda v: set(v) == {"parameter count", "limitations", "hardware"},
            ),
            every("published license conflicts that ours calls fine", "none", lambda r: r["licenses"]["called_fine"], lambda v: not v),
            every("planted divergence that is flagged", ">= 0.9", lambda r: r["trends"]["power"], lambda v: v >= 0.9),
            every("flat series that are flagged", "<= 0.05", lambda r: r["trends"]["false"], lambda v: v <= 0.05),
            every("completeness of our cards, the least", ">= 0.8", lambda r: min(r["zoo"]["completeness"].values()), lambda v: v >= 0.8),
            every("examples asked again, largest difference", "<= 1e-5", lambda r: r["zoo"]["difference"], lambda v: v is not None and v <= 1e-5),
            every("without tokenizer, without labels", "tokenizer, outputs", lambda r: r["zoo"]["categories"], lambda v: v == ["tokenizer", "outputs"]),
            judged(
                "processor time to the first text from an empty folder",
                [run["first_output"]["processor"] for run in runs],
                below(60),
                unit="seconds",
                form=".1f",
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, (left, right) = plotting.subplots(1, 2, figsize=(10, 3.6))
        types = dict(list(runs[0]["names"]["types"].items())[:14])
        left.barh(list(types)[::-1], list(types.values())[::-1], color=["C0" if name in BERTS else "C1" for name in list(types)[::-1]])
        left.set(xlabel="names (blue: BERT's family)", title="63,367 repositories, August 2022")
        filled = runs[0]["cards"]["filled"]
        right.barh(sorted(filled, key=filled.get), sorted(filled.values()))
        right.set(xlabel="of 50 models", title="fields that cards fill")
        plotting.save(figure, path)


@functools.cache
def _names(sabotage: bool) -> dict[str, Any]:
    names = next(datasets.rows("hub-models-2022", "repository-names.txt"))["text"].split()
    if sabotage:
        names = ["".join(sorted(name)) for name in names]
    low = [name.lower() for name in names]
    types = Counter(kind for kind in map(model_type, names) if kind is not None)
    berts = sum(count for kind, count in types.items() if kind in BERTS)
    other = max((count for kind, count in types.items() if kind not in BERTS), default=0)
    owners = Counter(name.split("/")[0] for name in names if "/" in name)
    bulk = {owner for owner, _ in owners.most_common(max(1, len(owners) // 100))}
    rest = Counter(kind for name in names if name.split("/")[0] not in bulk and (kind := model_type(name)) is not None)
    rest_other = max((count for kind, count in rest.items() if kind not in BERTS), default=1)
    return {
        "n": len(names),
        "counts": {part: sum(part in name for name in low) for part in COUNTS},
        "types": dict(types.most_common(24)),
        "berts": berts,
        "factor": berts / max(1, other),
        # A few owners upload by the thousand: the same without the one percent that uploads most.
        "factor_without_bulk_owners": sum(count for kind, count in rest.items() if kind in BERTS) / max(1, rest_other),
        "unknown": sum(model_type(name) is None for name in names) / len(names),
    }


def _downloads() -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    with (datasets.find("hub-models-2022") / "packages.csv").open(encoding="utf-8", newline="") as file:
        for count, where, *_ in csv.reader(file):
            found.setdefault(where, []).append(float(count.replace(",", "")))
    return {where: {"n": len(counts), "gini": trends.gini(counts), "top_10_share": trends.top_share(counts)} for where, counts in found.items()}


def _cards() -> dict[str, Any]:
    models = [row["value"] for row in datasets.rows("model-cards", "groundTruth.json")]
    filled = {name: sum(bool(model[field]) for model in models) for name, field in FIELDS.items()}
    return {"filled": filled, "least": sorted(filled, key=lambda name: (filled[name], name))[:5]}


def _licenses() -> dict[str, Any]:
    """Uses of models by projects: may a project under one of three licenses pass on what it makes? And a published table against ours."""
    table = [line.rsplit(",", 1)[-1] for line in (datasets.find("model-cards") / "mapping.csv").read_text(encoding="utf-8").splitlines()]
    uses = Counter(licenses.canonical(name) for name in table)
    report = {}
    for project in ("mit", "apache-2.0", "gpl-3.0"):
        answers: Counter[str] = Counter()
        for name, count in uses.items():
            answers[licenses.check(project, name).answer] += count
        report[project] = {answer: count / len(table) for answer, count in answers.items()}
    published = {row["key"]: row["value"] for row in datasets.rows("model-cards", "incompatibleMapping.json")}
    fine = [f"{model} -> {child}" for model, children in published.items() for child in children if licenses.check(child, model).answer == "ok"]
    stricter = [
        f"{model} -> {child}"
        for model, listed in published.items()
        for child in published
        if child not in listed and licenses.check(child, model).answer == "conflict"
    ]
    unknown = sum(count for name, count in uses.items() if not licenses.known(name)) / len(table)
    return {"n": len(table), "unknown": unknown, "report": report, "called_fine": fine, "conflicts_of_ours_alone": stricter}


def _trends(seed: int, sabotage: bool) -> dict[str, float]:
    draw = np.random.default_rng(seed)
    rise = np.ones(MONTHS) if sabotage else 1.03 ** np.arange(MONTHS)

    def flagged(up: Any, down: Any) -> float:
        pairs = [({"a": draw.poisson(LEVEL * up)}, {"a": draw.poisson(LEVEL * down)}) for _ in range(SERIES)]
        return float(np.mean([trends.divergence(*pair).types[0].flagged for pair in pairs]))

    return {"power": flagged(rise, 1 / rise), "false": flagged(np.ones(MONTHS), np.ones(MONTHS))}


def _zoo(work: Path, seed: int, sabotage: bool) -> dict[str, Any]:
    """Cards and examples of one checkpoint of every making."""
    from cairn.checkpoint.foreign.export import export
    from cairn.evaluation.measure import evaluate
    from cairn.merging.combine import average, merge
    from cairn.training.run import fork, train

    run = train(recipe(seed, 10, 30), work / "run")
    branch = fork(run.checkpoints()[1], work / "branch", ["optimizer.lr=1e-3"], fresh=["optimizer"])
    average([run.path], work / "average", last=2)
    export(work / "average", work / "bf16", dtype="bfloat16")
    merge("slerp", [run.checkpoints()[-1], branch.checkpoints()[-1]], work / "mixed", {"t": 0.3})
    evaluate(run.path, [{"name": "held-out", "sequences": 16}])
    places = [*run.checkpoints(), *branch.checkpoints(), work / "average", work / "bf16", work / "mixed"]
    complete = {str(place.relative_to(work)): modelcard.score(card(place)).completeness for place in places}
    for place in places:
        explain(place)
    if sabotage:
        _exchange_examples(places)
    apart = [explain(place).difference for place in places]
    return {"completeness": complete, "difference": max((each for each in apart if each is not None), default=None), "categories": _categories(work)}


def _exchange_examples(places: Sequence[Path]) -> None:
    from cairn.registry import statements

    opened = [read.open(place) for place in places]
    documents = [statements.kept(each, "example") for each in opened]
    for each, document in zip(opened, [*documents[1:], documents[0]], strict=True):
        statements.keep(each, "example", document or {})


def _categories(work: Path) -> list[str]:
    """The category under which explaining fails without tokenizer, and for a classifier without labels."""
    found = []
    for name in ("tokenizer", "labels"):
        plain = work / f"without-{name}"
        shutil.copytree(work / "mixed", plain)
        for file in ("lineage.json", "manifest.json", *(("tokenizer.json",) if name == "tokenizer" else ())):
            (plain / file).unlink()
        if name == "labels":
            config = json.loads((plain / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
            (plain / "config.json").write_text(json.dumps(config))
        try:
            explain(plain, store=False)
            found.append("explained")
        except CairnError as error:
            found.append(category_of(error))
    return found


def _first_output(work: Path, seed: int) -> dict[str, float]:
    """Seconds from an empty folder to a text that a model of one's own has written: by the clock, and of processor time."""
    import yaml

    work.mkdir()
    (work / "first.yaml").write_text(yaml.safe_dump(recipe(seed, 20, 20)))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in (["train", "first.yaml", "--run", "run"], ["generate", "run", "--prompt", "The ", "--new-tokens", "20"]):
        subprocess.run([sys.executable, "-m", "cairn", *command], cwd=work, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": time.monotonic() - began, "processor": spent}
