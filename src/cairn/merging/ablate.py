"""Data ablations by merging: which mixture to train on, asked of averages of branches instead of trained models.

From one seed checkpoint a branch is trained on each unit of data, once. The average of the branches of a candidate set
stands for a model trained on their union: 2^n candidates for n trainings.

    theta_C = sum over units u in C of w_u theta_u
    micro: every unit counts the same       macro: every partition counts the same, its units share that evenly
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.read import Checkpoint
from cairn.device import computes
from cairn.errors import InputError, NotFoundError, suggestion
from cairn.evaluation.measure import Measurement
from cairn.merging.methods.linear import LinearMerge
from cairn.merging.target import Bench
from cairn.options import configure
from cairn.statistics import first_largest, spearman
from cairn.training.run import fork

Weighting = Literal["micro", "macro"]
Candidate = tuple[str, ...]


@dataclass(frozen=True)
class AblationUnit:
    """A unit of data: its branch, and the partition that it is a part of."""

    name: str
    corpus: Any
    partition: str
    branch: Checkpoint


@dataclass(frozen=True)
class AblationRow:
    """Loss of a candidate on a domain: of the merge, of the cheap baselines, and (where it was validated) of a model trained on the union."""

    candidate: Candidate
    domain: str
    merge: float
    mean_of_branches: float
    best_branch: float
    truth: float | None = None

    @property
    def inside(self) -> bool:
        """Whether the domain is one of the candidate's own."""
        return self.domain in self.candidate


class BranchPool:
    """Branches of one seed checkpoint, each trained once; candidates are scored by merging them in memory, each once.

    Everything lies in `folder`: `branches/NAME` and `unions/NAME+NAME` are runs, `scores.json` keeps every loss under the
    digests of the weights and of the measurement.
    """

    def __init__(
        self, seed: Checkpoint | str | Path, folder: str | Path, overrides: Sequence[str] = (), *, optimizer: Literal["carry", "fresh"] = "carry"
    ) -> None:
        """`overrides` are the recipe's of every branch, for example `optimizer.lr=6e-5`; the rate is constant, without a warm-up."""
        self.seed = seed if isinstance(seed, Checkpoint) else read.open(seed)
        self.folder, self.overrides, self.optimizer = Path(folder), list(overrides), optimizer
        self.units: dict[str, AblationUnit] = {}
        self.trainings = 0
        self._bench: Bench | None = None
        place = self.folder / "scores.json"
        self._scores: dict[str, float] = documents.read_object(place) if place.is_file() else {}

    def add(self, name: str, corpus: Any, steps: int, partition: str | None = None) -> Checkpoint:
        """Train the branch of a unit, `steps` updates from the seed; one that lies in the folder already is taken as it is.

        Raises `InputError` for a name that the pool has, and where what lies there was trained for another number of steps.
        """
        if name in self.units:
            raise InputError(f"The pool has a branch '{name}' already; a branch is trained once, give the new data another name.")
        branch = self._trained(self.folder / "branches" / name, {name: corpus}, steps)
        self.units[name] = AblationUnit(name, corpus, partition or name, branch)
        return branch

    def candidates(self, size: int) -> list[Candidate]:
        """All sets of that many units."""
        return list(combinations(self.units, size))

    def weights(self, candidate: Candidate, weighting: Weighting = "micro") -> list[float]:
        """The weight of each unit of a candidate; they sum to one."""
        partitions = [self._unit(name).partition for name in candidate]
        counts = {name: partitions.count(name) for name in partitions}
        return [1 / len(candidate) if weighting == "micro" else 1 / (len(counts) * counts[name]) for name in partitions]

    def ablate(self, candidates: Iterable[Candidate], domains: Mapping[str, Measurement], weighting: Weighting = "micro") -> list[AblationRow]:
        """Score every candidate on every domain by merging, beside the mean and the best of its branches' own losses."""
        rows = []
        for candidate in candidates:
            weights = self.weights(candidate, weighting)
            for domain, measurement in domains.items():
                alone = [self._loss((name,), [1.0], measurement) for name in candidate]
                merged = self._loss(candidate, weights, measurement)
                rows.append(AblationRow(candidate, domain, merged, float(np.dot(weights, alone)), float(np.min(alone))))
        self._keep()
        return rows

    def validate(self, rows: Sequence[AblationRow], domains: Mapping[str, Measurement], steps: int, weighting: Weighting = "micro") -> list[AblationRow]:
        """The rows with the truth: for each candidate a model trained from the seed on the shuffled union, `steps` updates a unit.

        With `weighting="macro"` units are drawn with the weights that they have in the merge.
        """
        found = []
        for candidate in dict.fromkeys(row.candidate for row in rows):
            data = {name: self._unit(name).corpus for name in candidate}
            weights = self.weights(candidate, weighting) if weighting == "macro" else None
            name = "+".join(candidate) + ("-macro" if weights is not None else "")
            union = self._trained(self.folder / "unions" / name, data, steps * len(candidate), weights)
            for row in rows:
                if row.candidate == candidate:
                    truth = self._measured(union.model_digest, domains[row.domain], union)
                    found.append(AblationRow(**asdict(row) | {"truth": truth, "candidate": candidate}))
        self._keep()
        return found

    def _trained(self, path: Path, data: Mapping[str, Any], steps: int, weights: Sequence[float] | None = None) -> Checkpoint:
        recipe = self.seed.lineage.options.get("recipe") if self.seed.lineage is not None else None
        if recipe is None or self.seed.tokens is None:
            raise InputError(f"{self.seed.path} is not the checkpoint of a run, so no branch can go on from it; name one with its recipe and state.")
        batch = recipe["training"]["batch"]
        end = self.seed.tokens + steps * batch
        if not any(read.list_checkpoints(path)):
            sources: dict[str, dict[str, Any]] = {name: {"corpus": str(corpus) if isinstance(corpus, Path) else corpus} for name, corpus in data.items()}
            for source, weight in zip(sources.values(), weights or (), strict=False):
                source["weight"] = weight
            asked = [f"data.sources={json.dumps(sources)}", "schedule={name: constant}", f"training.tokens={end} tokens", f"checkpoint.every={end} tokens"]
            fork(self.seed.path, path, [*asked, *self.overrides], fresh=["optimizer"] if self.optimizer == "fresh" else [])
            self.trainings += 1
        found = read.open(path)
        if found.tokens != end:
            done = ((found.tokens or 0) - self.seed.tokens) / batch
            raise InputError(f"{path} was trained for {done:g} steps, not {steps}; units and unions must be of equal length, so use another folder.")
        return found

    def _loss(self, candidate: Candidate, weights: Sequence[float], measurement: Measurement) -> float:
        branches = [self._unit(name).branch for name in candidate]
        if len(branches) == 1:
            return self._measured(branches[0].model_digest, measurement, branches[0])
        identity = json.dumps([[branch.model_digest for branch in branches], [round(weight, 12) for weight in weights]])
        return self._measured(identity, measurement, (LinearMerge(weights=list(weights)), branches))

    def _measured(self, identity: str, measurement: Measurement, what: Checkpoint | tuple[LinearMerge, list[Checkpoint]]) -> float:
        """The loss of a checkpoint or of a merge, from the kept scores if it was measured before."""
        protocol = json.dumps(measurement.protocol(), sort_keys=True)
        key = blake3(f"{identity}\0{protocol}".encode()).hexdigest()[:24]
        if key not in self._scores:
            self._bench = self._bench or Bench([self.seed])

            def measure(model: Any, tokenizer: Any) -> Any:
                return measurement.of(model, tokenizer)[0]

            score = self._bench.alone(what, measure) if isinstance(what, Checkpoint) else self._bench.score(what[0], measure, what[1])
            self._scores[key] = score.value
        return self._scores[key]

    def _unit(self, name: str) -> AblationUnit:
        if name not in self.units:
            raise NotFoundError(f"The pool has no branch '{name}'.{suggestion(name, self.units)}")
        return self.units[name]

    def _keep(self) -> None:
        documents.keep_json(self.folder / "scores.json", self._scores, indent=1)


def agreement(rows: Sequence[AblationRow], proxy: str = "merge") -> dict[str, float]:
    """How well a proxy (`merge`, `mean_of_branches`, `best_branch`) foretells the truth of validated rows.

    Mean over domains of Pearson's r over all candidates, over those that hold the domain and over those that leave it out (nan
    where no domain has three such candidates); r and rank correlation of the mean over domains; mean absolute error, also of the
    two kinds apart; and the regret of the proxy's pick as a share of the spread of the truth.
    """
    domains, candidates = list(dict.fromkeys(row.domain for row in rows)), list(dict.fromkeys(row.candidate for row in rows))
    if any(row.truth is None for row in rows) or len(candidates) < 3:
        raise InputError("Agreement needs validated rows of at least three candidates.")
    pairs = {(row.candidate, row.domain): (getattr(row, proxy), row.truth) for row in rows}
    each = [np.array([pairs[candidate, domain] for candidate in candidates]) for domain in domains]
    inside = [np.array([pairs[candidate, domain] for candidate in candidates if domain in candidate]) for domain in domains]
    outside = [np.array([pairs[candidate, domain] for candidate in candidates if domain not in candidate]) for domain in domains]
    macro = np.mean(each, axis=0)
    found, truth = macro.T
    spread, pick = float(np.ptp(truth)), first_largest(-found)
    return {
        "pearson": _over_domains(each),
        "pearson_inside": _over_domains(inside),
        "pearson_outside": _over_domains(outside),
        "pearson_macro": correlation(found, truth),
        "spearman_macro": spearman(found, truth),
        "error": _error(each),
        "error_inside": _error(inside),
        "error_outside": _error(outside),
        "regret": math.nan if pick is None else float((truth[pick] - truth.min()) / spread) if spread else 0.0,
    }


def _over_domains(pairs: Sequence[Any]) -> float:
    """Mean of r over the domains that have three pairs or more."""
    found = [correlation(*values.T) for values in pairs if len(values) > 2]
    return float(np.mean(found)) if found else float("nan")


def _error(pairs: Sequence[Any]) -> float:
    """Mean absolute difference of pairs, nats; nan if there are none."""
    found = [abs(proxy - truth) for values in pairs for proxy, truth in values]
    return float(np.mean(found)) if found else float("nan")


def correlation(a: Any, b: Any) -> float:
    """Pearson's r; nan where one side is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


@dataclass(frozen=True)
class Ablation:
    """Scored candidates, best first by the mean over domains, and the agreement of merges with truth where it was validated."""

    ranking: list[dict[str, Any]]
    rows: list[AblationRow]
    agreement: dict[str, dict[str, float]]
    trainings: int

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@computes
def ablate(
    seed: str | Path | Checkpoint,
    parts: Mapping[str, Any],
    domains: Mapping[str, Any],
    pool: str | Path,
    *,
    steps: int,
    size: int = 2,
    validate: int = 0,
    overrides: Sequence[str] = (),
    sequences: int = 256,
    partitions: Mapping[str, str] | None = None,
    weighting: Weighting = "micro",
    optimizer: Literal["carry", "fresh"] = "carry",
    device: Any = None,
    say: Callable[[str], object] = lambda text: None,
) -> Ablation:
    """Rank all mixtures of `size` parts by merging branches of the checkpoint `seed`; train `validate` of them for real.

    `parts` are corpora to train on and `domains` corpora to measure on, by name; what is in both must not overlap. Branches
    and scores stay in `pool`, so that a further part costs one branch. `partitions` says of which partition a part is a unit
    (default: of its own); with `weighting="macro"` each partition counts the same, however many units it has. Branches train and merges are
    measured on `device` (as `cairn.device.choose`). Raises `InputError`.
    """
    strangers = sorted(set(partitions or {}) - set(parts))
    if strangers:
        raise InputError(f"There is no part '{strangers[0]}' to be a unit of a partition.{suggestion(strangers[0], parts)}")
    if not 1 <= size <= len(parts) or not domains or steps < 1:
        raise InputError(f"An ablation needs at least one domain, one step, and sizes from 1 to the number of parts ({len(parts)}), not {size}.")
    branches = BranchPool(seed, pool, overrides, optimizer=optimizer)
    measures = {name: configure(Measurement, {"name": "held-out", "corpus": corpus, "sequences": sequences}) for name, corpus in domains.items()}
    for name, corpus in parts.items():
        say(f"branch {name}")
        branches.add(name, corpus, steps, (partitions or {}).get(name))
    candidates = branches.candidates(size)
    rows = branches.ablate(candidates, measures, weighting)
    # Spread over the ranking, so that agreement is judged on good and bad mixtures alike.
    means = {candidate: float(np.mean([row.merge for row in rows if row.candidate == candidate])) for candidate in candidates}
    ordered = sorted(candidates, key=lambda candidate: (math.isnan(means[candidate]), means[candidate]))  # what has no loss comes last
    picked = [ordered[i] for i in dict.fromkeys(np.linspace(0, len(ordered) - 1, min(validate, len(ordered))).round().astype(int).tolist())]
    for candidate in picked:
        say(f"training {' + '.join(candidate)} for real")
        own = [row for row in rows if row.candidate == candidate]
        known = {(row.candidate, row.domain): row for row in branches.validate(own, measures, steps, weighting)}
        rows = [known.get((row.candidate, row.domain), row) for row in rows]
    truths = [row for row in rows if row.truth is not None]
    told = {proxy: agreement(truths, proxy) for proxy in ("merge", "mean_of_branches", "best_branch")} if len(picked) > 2 else {}
    ranking = [{"parts": list(candidate), "loss": means[candidate]} for candidate in ordered]
    return Ablation(ranking, rows, told, branches.trainings)


@dataclass
class Asked:
    """What settings of a command line mean."""

    parts: dict[str, str] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    partitions: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def asked(settings: Sequence[str]) -> Asked:
    """Of `NAME=CORPUS`, `domain.NAME=CORPUS`, `partition.NAME=PARTITION` and `train.KEY=VALUE` (overrides of the branches' recipe)."""
    found = Asked()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or not value:
            raise InputError(f"'{setting}' is not NAME=CORPUS, domain.NAME=CORPUS, partition.NAME=PARTITION or train.KEY=VALUE.")
        kind, dot, rest = key.partition(".")
        if dot and kind == "train":
            found.overrides.append(setting.removeprefix("train."))
        elif dot and kind in ("domain", "partition"):
            (found.domains if kind == "domain" else found.partitions)[rest] = value
        else:
            found.parts[key] = value
    return found
