"""Does the registry find what is wrong with a checkpoint, and leave alone what is right (card 42)?"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.checkpoint.format.manifest import Manifest, entry_of
from cairn.checkpoint.saving.write import save
from cairn.data import datasets
from cairn.errors import InputError
from cairn.randomness import seed_for, uniform
from cairn.registry import attributes, claims, portability, risks, signing, statements
from cairn.registry.descent import in_circles
from cairn.registry.index import Index
from cairn.registry.names import Known
from cairn.registry.replay import replay
from cairn.registry.statements import Claim
from cairn.studies import library
from cairn.studies.conditions import Condition, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import fork, train

EACH = 5
"""Planted faults of each of four kinds; as many clean checkpoints in all as planted ones."""
TASK = {"name": "blimp", "paradigms": ["determiner_noun_agreement_1", "passive_1", "regular_plural_subject_verb_agreement_1", "wh_questions_subject_gap"]}
PUBLISHED = {"tiny": (72.2, 66.46, -19.7), "small": (79.9, 77.06, -10.9), "small, another script": (75.5, 77.06, 5.8), "base": (81.8, 80.12, -6.8),
             "small distilled": (81.2, 81.01, -0.8)}  # fmt: skip
"""Claimed and measured top-1 in percent of four image models (one with two claims), 50,000 images, and z."""
FIELDS = {"licence": "license", "datasets": "datasets", "evaluation": "evaluation", "hardware": "hardware", "limitations": "limitation_and_bias",
          "parameter count": "parameter_count", "output format": "output_format", "input format": "input_format"}  # fmt: skip
FILLED = {"licence": 42, "datasets": 48, "evaluation": 26, "hardware": 14, "limitations": 13, "parameter count": 12, "output format": 2, "input format": 1}
DRAWS, BITS, LONGEST_REPLAY = 2000, 200, 20


def recipe(seed: int, every: int = 10, steps: int = 60) -> dict[str, Any]:
    """Byte-level LLaMA of two layers and width 32 on Python's own documentation."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"docs": {"corpus": library.docs("2 MiB")}}, "sequence_length": 64},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "5 steps"},
        "training": {"tokens": f"{steps} steps", "batch": 1024, "compile": False},
        "checkpoint": {"every": f"{every} steps"},
    }


@register(
    "study",
    "reuse-registry",
    paper=Paper("An Empirical Study of Pre-Trained Model Reuse in the Hugging Face Deep Learning Model Registry", "arXiv:2303.02552", card=42),
)
class ReuseRegistry(Study):
    """Planted faults are found, clean checkpoints are left alone, and claims are judged by their errors."""

    minutes: ClassVar[float] = 5
    published: ClassVar[str] = (
        "Of 63,182 repositories 0.21 % had signed commits; documentation was missing or inadequate for about 80 %; four of the claims that were measured "
        "again differ: top-1 of 72.2, 79.9, 81.8 and 81.2 % came out as 66.46, 77.06, 80.12 and 81.01 %."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (2 layers, width 32) trains 60 steps on python-docs with a checkpoint every 10; steps 40, 50, 60 are measured on 4,000 pairs of "
        "four BLiMP paradigms. 20 clean copies, licensed throughout, claim the accuracy of another sample of pairs, drawn as Binomial(4000, p)/4000 about "
        "the measured p. 20 further copies have one fault each, five of each kind: a pickle beside the weights; edited weights (three with one byte "
        "flipped, two with the manifest forged to fit under a signature); a parent under CC BY-NC; the claim raised by 5 points. Risks are audited with "
        "contents and claims. Exact besides: 200 flipped bits against the digest; a circle in the lineage refused; step 40 replayed from step 20, and the "
        "same from a run whose seed, packing or moments were secretly changed; a signature after one byte; published claims judged with n = 50,000; 2,000 "
        "true claims drawn; 50 hand-read models' fill rates; near-duplicates of the 63,367 names of August 2022; export parity. Three seeds."
    )
    control: ClassVar[str] = (
        "Nothing is planted: the twenty further copies are clean like the others, names are unlike all known ones, and the secret changes of training are "
        "not made."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        run = train(recipe(seed), work / "run")
        audited = run.checkpoints()[3:]
        found: Figures = {"digests": _digests(audited[0], seed), "circle_refused": _circle(work, run.path)}
        found |= {"replays": _replays(work / "replay", seed, sabotage), "signature": _signature(work, audited[-1])}
        found |= {"published": _published(), "doubted": _doubted(seed), "cards": _cards(), "names": _names(seed, sabotage)}
        found["portability"] = portability.portability(audited[-1], store=False)
        say("auditing 40 checkpoints")
        found |= _faults(run.path, audited, work / "faults", seed, sabotage)
        return found

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def every(name: str, required: str, found: Callable[[Figures], Any], holds: Callable[[Any], bool], main: bool = False) -> Condition:
            values = [found(run) for run in runs]
            return stated(name, required, "; ".join(str(value) for value in values), all(map(holds, values)), main=main, always=True)

        altered = ("seed", "order", "moments")
        gaps = [abs(each["z"] - PUBLISHED[name][2]) for run in runs for name, each in run["published"].items()]
        verdicts = {
            "tiny": "over-claimed",
            "small": "over-claimed",
            "small, another script": "under-claimed",
            "base": "over-claimed",
            "small distilled": "confirmed",
        }
        right = [run["published"][name]["verdict"] == verdict for run in runs for name, verdict in verdicts.items()]
        least = {"input format", "output format", "parameter count", "limitations", "hardware"}
        return [
            every("flipped bits that change the digest", f"all {BITS}", lambda r: r["digests"], lambda n: n == BITS),
            every("a circle in the lineage is refused", "yes", lambda r: r["circle_refused"], bool),
            every("step 40 replayed from step 20", "bitwise", lambda r: r["replays"]["honest"], lambda v: v == "bitwise"),
            every("changed seed, order, moments", "all seen", lambda r: [r["replays"][name] for name in altered], lambda v: all(each == "none" for each in v)),
            every("signature before and after a byte is edited", "good, bad", lambda r: r["signature"], lambda v: v == ["good", "bad"]),
            stated(
                "published claims, largest gap in z",
                "<= 0.1, verdicts as stated",
                f"{max(gaps):.3f}, {sum(right)} of {len(right)}",
                max(gaps) <= 0.1 and all(right),
                main=True,
                always=True,
            ),
            every("true claims that are doubted", "0.03 to 0.07", lambda r: round(r["doubted"], 4), lambda v: 0.03 <= v <= 0.07),
            every(
                "fields that 50 models leave empty most",
                "formats, parameters, limits, hardware",
                lambda r: r["cards"]["least"],
                lambda v: set(v) == least,
                main=True,
            ),
            every("mean reproducibility of the 50 models", "< 0.5", lambda r: round(r["cards"]["reproducibility"], 3), lambda v: v < 0.5, True),
            every("planted near-duplicates of names that are flagged", "all 20", lambda r: r["names"]["planted"], lambda n: n == 20),
            every("planted faults that are missed", "0 of 20", lambda r: r["missed"], lambda v: not v, True),
            every("false alarms on 20 clean checkpoints", "<= 1", lambda r: len(r["false_alarms"]), lambda n: n <= 1),
            every(
                "parity of exports",
                "<= 1e-4",
                lambda r: [e["difference"] for e in r["portability"]["parity"]],
                lambda v: all(d is not None and d <= 1e-4 for d in v),
            ),
            every(
                "latency repeats within 15 % or is marked",
                "consistent",
                lambda r: [round(r["portability"]["latency"]["spread"], 3), r["portability"]["latency"]["stable"]],
                lambda v: (v[0] <= 0.15) == v[1],
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, (left, right) = plotting.subplots(1, 2, figsize=(10, 3.4))
        names = list(PUBLISHED)
        left.barh(names, [runs[0]["published"][name]["z"] for name in names])
        left.axvspan(-2, 2, alpha=0.15, color="grey")
        left.set(xlabel="z of measured - claimed (grey: confirmed)", title="published claims, n = 50,000")
        filled = runs[0]["cards"]["filled"]
        right.barh(sorted(filled, key=filled.get), sorted(filled.values()))
        right.set(xlabel="of 50 models", title="fields that model cards fill")
        plotting.save(figure, path)


def _digests(checkpoint: Path, seed: int) -> int:
    files = {p.name: p.read_bytes() for p in sorted(checkpoint.iterdir()) if p.name not in ("manifest.json", "lineage.json")}
    whole = Manifest.of({name: entry_of(data) for name, data in files.items()})
    names, changed = sorted(files), 0
    for draw in uniform(seed_for(seed, "bits"), np.arange(3 * BITS)).reshape(BITS, 3).tolist():
        name = names[int(draw[0] * len(names))]
        data = bytearray(files[name])
        data[int(draw[1] * len(data))] ^= 1 << int(draw[2] * 8)
        changed += Manifest.of(dict(whole.files) | {name: entry_of(bytes(data))}).digest != whole.digest
    return changed


def _circle(work: Path, run: Path) -> bool:
    """The first checkpoint of a copy is made a child of the last, manifest and all."""
    shutil.copytree(run, work / "circle")
    first, *_, last = sorted((work / "circle/checkpoints").iterdir())
    lineage = json.loads((first / "lineage.json").read_text()) | {"parents": [{"digest": read.open(last).digest, "path": last.name, "step": None}]}
    (first / "lineage.json").write_text(json.dumps(lineage))
    _forge(first)
    with Index(work / "circle.sqlite") as index:
        report = index.add(work / "circle")
        return not in_circles(index.edges()) and any("leads back to itself" in problem for problem in report.problems)


def _forge(checkpoint: Path) -> None:
    """Make the manifest fit the files as they are."""
    files = {p.name: entry_of(p.read_bytes()) for p in checkpoint.iterdir() if p.name != "manifest.json"}
    (checkpoint / "manifest.json").write_bytes(Manifest.of(files).dump())


def _replays(work: Path, seed: int, sabotage: bool) -> dict[str, str]:
    """Replays of step 40 from step 20: of the honest checkpoint, and of ones whose training was changed while their lineage says that it was not."""
    honest = train(recipe(seed, LONGEST_REPLAY, 2 * LONGEST_REPLAY), work / "honest").checkpoints()
    found = {"honest": replay(honest[1], store=False).outcome}
    changes = {"seed": [f"seed={seed + 100}"], "order": ["data.packing=whole"], "moments": []}
    for name, change in changes.items():
        home = work / name / "checkpoints"
        shutil.copytree(honest[0], home / honest[0].name)
        if sabotage:
            shutil.copytree(honest[1], home / honest[1].name)
        else:
            made = fork(honest[0], work / f"{name}-secret", change, fresh=["optimizer"] if name == "moments" else [], stop_at_step=2 * LONGEST_REPLAY).newest()
            told = read.open(honest[1])
            assert told.lineage is not None and made.optimizer is not None
            state = {"model": made.tensors.load(), "optimizer": made.optimizer.load(), "config": made.config, "tokenizer": made.tokenizer}
            save(home / honest[1].name, lineage=told.lineage, trainer=told.trainer, **state)  # type: ignore[arg-type]
        found[name] = replay(home / honest[1].name, store=False).outcome
    return found


def _signature(work: Path, checkpoint: Path) -> list[str]:
    key, signers = _keys(work)
    shutil.copytree(checkpoint, work / "signed/checkpoints" / checkpoint.name)
    place = work / "signed/checkpoints" / checkpoint.name
    signing.sign(place, key)
    before = signing.check(read.open(place), signers).state
    _flip(place / "model.safetensors", 5003)
    _forge(place)
    return [before, signing.check(read.open(place), signers).state]


def _keys(work: Path) -> tuple[Path, Path]:
    key, signers = work / "key", work / "signers"
    if not key.exists():
        try:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        except FileNotFoundError:
            raise InputError("This study signs with ssh-keygen, which is not on this machine.") from None
        signers.write_text(f"study@example.org {key.with_suffix('.pub').read_text()}")
    return key, signers


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def _published() -> dict[str, dict[str, Any]]:
    found = {}
    for name, (claimed, measured, _) in PUBLISHED.items():
        p = measured / 100
        audit = claims.against(Claim(metric="accuracy", value=claimed / 100, n=50_000), p, math.sqrt(p * (1 - p) / 50_000), 50_000)
        found[name] = {"z": audit.z, "verdict": audit.verdict, "low": audit.low, "high": audit.high}
    return found


def _doubted(seed: int, n: int = 500, p: float = 0.7) -> float:
    hits = (uniform(seed_for(seed, "claims"), np.arange(2 * DRAWS * n)).reshape(2, DRAWS, n) < p).sum(-1) / n
    audits = [claims.against(Claim(metric="accuracy", value=a, n=n), b, math.sqrt(b * (1 - b) / n), n) for a, b in hits.T.tolist()]
    return sum(audit.verdict != "confirmed" for audit in audits) / DRAWS


def _cards() -> dict[str, Any]:
    """What 50 hand-read models say of themselves, and how reproducible that makes them; everything there is stated, nothing measured."""
    models = [row["value"] for row in datasets.rows("model-cards", "groundTruth.json")]
    filled = {name: sum(bool(model[field]) for model in models) for name, field in FIELDS.items()}
    factors = {"hardware specification": "hardware", "training configuration": "hyper_parameters", "demos": "code_demo", "documentation": "limitation_and_bias"}
    scores = [attributes.scores({factor: "stated" if _said(model[field]) else None for factor, field in factors.items()}) for model in models]
    return {
        "filled": filled,
        "as_published": filled == FILLED,
        "least": sorted(filled, key=lambda name: (filled[name], name))[:5],
        "reproducibility": sum(score["reproducibility"] for score in scores) / len(scores),
    }


def _said(value: Any) -> bool:
    return any(map(_said, value.values())) if isinstance(value, dict) else bool(value)


def _names(seed: int, sabotage: bool) -> dict[str, Any]:
    """Near-duplicates, planted by us, of the names that bear no owner; and how many of the real names look like one of those."""
    listed = next(datasets.rows("hub-models-2022", "repository-names.txt"))["text"].split()
    official = sorted(name for name in listed if "/" not in name)
    known = Known(official)
    long = [name for name in official if len(name) >= 8]
    planted = []
    for number in range(20):
        where = uniform(seed_for(seed, "names", number), np.arange(3)).tolist()
        name = long[int(where[0] * len(long))]
        at = 1 + int(where[1] * (len(name) - 2))
        kinds = (name[:at] + name[at + 1 :], name[:at] + "q" + name[at:], name[:at] + "q" + name[at + 1 :], name.replace("-", "_", 1).upper())
        planted.append("far/away" if sabotage else kinds[number % 4])
    others = [name.split("/")[-1] for name in listed if "/" in name]
    flagged = [name for name in dict.fromkeys(others) if known.lookalike(name) is not None]
    return {
        "planted": sum(known.lookalike(name) is not None for name in planted),
        "known": len(official),
        "names": len(listed),
        "flagged": len(flagged),
        "flag_rate": len(flagged) / len(dict.fromkeys(others)),
        "examples": flagged[:12],
        "same_name_other_owner": sum(name in known.names for name in others),
    }


def _faults(run: Path, audited: Sequence[Path], work: Path, seed: int, sabotage: bool) -> Figures:
    """Twenty clean copies and twenty with one fault each, audited."""
    from cairn.evaluation.measure import evaluate

    rows = {row.checkpoint: row for path in audited for row in evaluate(path, [TASK])}
    key, signers = _keys(work.parent)
    missed, false = list[str](), list[str]()
    for number in range(4 * EACH):
        step = audited[number % len(audited)]
        for kind in ("clean", ("pickle", "weights", "license", "claim")[number // EACH]):
            place = _copy(run, step, work / f"{number:02d}-{kind}")
            p, n = rows[step.name].value, rows[step.name].n
            claimed = float((uniform(seed_for(seed, kind, number), np.arange(n)) < p).mean())
            statements.describe(place.parent.parent, ["license=apache-2.0", "data_licenses={docs: psf-2.0}"])
            said = claimed + (0.05 if kind == "claim" and not sabotage else 0)
            statements.claim(place, "accuracy", said, n=n, task=TASK, split="first 1000")
            if not sabotage:
                _plant(kind, number % EACH, place, key)
            alarms = [risk.sentence for risk in risks.audit(place, measure=True, signers=signers) if risk.level == "alarm"]
            if kind == "clean":
                false += [f"{number}: {sentence}" for sentence in alarms]
            elif not alarms:
                missed.append(f"{number}: {kind}")
    return {"missed": missed, "false_alarms": false, "accuracy": {name: row.value for name, row in rows.items()}}


def _copy(run: Path, step: Path, target: Path) -> Path:
    """The run with this checkpoint and the one before it, and with what was measured."""
    before = sorted(step.parent.iterdir())[sorted(step.parent.iterdir()).index(step) - 1]
    for each in (before, step):
        shutil.copytree(each, target / "checkpoints" / each.name)
    if (run / "results").is_dir():
        shutil.copytree(run / "results", target / "results")
    return target / "checkpoints" / step.name


def _plant(kind: str, number: int, place: Path, key: Path) -> None:
    if kind == "pickle":
        # Under names that tell and names that do not.
        name = ("pytorch_model.bin", "extra.dat", "optimizer.pt", "notes.txt", "model.safetensors.bak")[number]
        (place / name).write_bytes(pickle.dumps({"weights": [1.0]}))
    elif kind == "weights":
        if number >= 3:
            signing.sign(place, key)
        _flip(place / "model.safetensors", 5003 + 4 * number)
        if number >= 3:
            _forge(place)
    elif kind == "license":
        parent = next(path for path in sorted(place.parent.iterdir()) if path != place)
        statements.describe(parent, ["license=cc-by-nc-4.0"])
