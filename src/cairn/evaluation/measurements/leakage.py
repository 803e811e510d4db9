"""Was a multiple-choice set in the training data? A model that memorised it prefers the published order of the options.

S(order) = log p(option block in that order | question), scored for all K! orders (or a sample that holds the published one).

a) order known: the rank of the published order among all; under exchangeability it is first 1 time in K!.
b) order unknown (a leaked copy may have been shuffled): how far the best order stands out, by an isolation forest.

Neither is a probability by itself: people do not put options in random order, and the largest of any sample stands out. So
every figure is read against a CONTROL set of the same form that cannot have been trained on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.answers import finite
from cairn.evaluation.items import ItemMeasurement, Seen, encoded_from, existing, load
from cairn.evaluation.measure import Score
from cairn.evaluation.scoring import log_likelihoods
from cairn.randomness import seed_for, uniform
from cairn.statistics import binomial_error, calibrated, false_discovery, fisher, rank_sum, wilson

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

PUBLISHED_THRESHOLDS = (-0.2, -0.17, -0.15)
"""Decision scores below which the paper calls an item leaked (scenario b); never to be read without the control's rate."""

TIE = 1e-4
"""Nats within which two scores are one: what single precision leaves of sums of the same terms in another order."""


def orders(options: int, most: int, seed: int = 0) -> NDArray[np.int64]:
    """Orders of the options, shape (P, K): the published one first, then all others, or a random sample of them up to `most`."""
    if math.factorial(options) <= most:
        return np.array(list(itertools.permutations(range(options))), np.int64)
    found = {tuple(range(options)): None}
    for draw in range(100 * most):
        if len(found) == most:
            break
        found[tuple(np.argsort(uniform(seed, draw * options + np.arange(options))).tolist())] = None
    return np.array(list(found), np.int64)


def rank_shares(scores: ArrayLike, column: int | ArrayLike = 0) -> NDArray[np.float64]:
    """Rank of one column of scores (n, P) in its row as a share of P, from 1/P (best) to 1; ties share their mean rank, shape (n,)."""
    table = np.asarray(scores, np.float64)
    mine = np.take_along_axis(table, np.broadcast_to(np.asarray(column), len(table)).reshape(-1, 1), axis=1)
    better, equal = (table > mine + TIE).sum(axis=1), (np.abs(table - mine) <= TIE).sum(axis=1)
    return (better + (equal + 1) / 2) / table.shape[1]


def outlier_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """Decision score of the largest of each row (n, P) under an isolation forest of that row alone, shape (n,); low stands out.

    The expectation over all trees, which a forest of 100 trees estimates with noise: on a line, the tree splits at a point
    uniform between the smallest and the largest, so the depth at which the largest ends follows from the gaps ("Isolation
    Forest", 2008, with scikit-learn's depth limit and offset 0.5).
    """
    table = np.sort(np.asarray(scores, np.float64), axis=1)
    count = table.shape[1]
    limit = math.ceil(math.log2(max(count, 2)))
    gaps = np.diff(table, axis=1)
    # depth[:, s]: expected depth at which the largest ends, once the set is what stands from place s on, at the level at hand
    depth = np.stack([np.full(len(table), limit + _path_length(count - s)) for s in range(count)], axis=1)
    for level in reversed(range(limit)):
        above = np.full_like(depth, float(level))
        for s in range(count - 1):
            width = table[:, -1] - table[:, s]
            weighted = (gaps[:, s:] * depth[:, s + 1 :]).sum(axis=1)
            above[:, s] = np.where(width > 0, weighted / np.where(width > 0, width, 1), level + _path_length(count - s))
        depth = above
    return 0.5 - 2.0 ** (-depth[:, 0] / _path_length(count))


def _path_length(count: int) -> float:
    """Mean depth of an unsuccessful search in a random tree of `count` points."""
    if count <= 2:
        return float(count - 1) if count > 0 else 0.0
    return 2 * (math.log(count - 1) + np.euler_gamma) - 2 * (count - 1) / count


def block(question: str, options: Sequence[str]) -> tuple[str, str]:
    """The text before the first option and the rest, laid out as in the paper: a letter, a colon, the option, a line each."""
    lines = "".join(f"{chr(ord('A') + place)}:{option}\n" for place, option in enumerate(options))
    return f"\n{question}:\nA:", lines.removeprefix("A:")


@register("measurement", "leakage", paper=Paper("Training on the Benchmark Is Not All You Need", "arXiv:2409.01790", card=81))
class Leakage(ItemMeasurement):
    """Signs that a multiple-choice set was in the training data, each beside the same figure of a control set."""

    control: Path | None = None
    """Items of the same form that cannot have been trained on; default: the items themselves in an order drawn once and frozen,
    which shows what chance does, but not whether published orders are likelier by their content."""
    question: str = "question"
    options: str = "options"
    """Key of the options: a list of texts, or a mapping of letters to texts."""
    choices: int | None = Field(None, ge=2, le=7)
    """Use only the first so many options of each item; default: all."""
    orders: int = Field(24, ge=2)
    """Orders that are scored for each item, the published one among them."""
    false_positives: float = Field(0.05, gt=0, lt=1)
    """Share of control items that may be flagged in scenario b."""
    seed: int = 0

    def data_digest(self, feed: Feed | None = None) -> str:
        control = blake3(existing(self.control).read_bytes()).hexdigest() if self.control is not None else ""
        return super().data_digest() + control

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["control"]
        return described

    def look(self, model: nn.Module, tokenizer: Tokenizer) -> Seen:
        """`items` and `control`: log-probabilities of every order, the published one first; `ids`: the items' numbers in their file."""
        ids, items = self._kept(self.path)
        seen: Seen = {"ids": ids, "items": self._scored(model, tokenizer, items)}
        if self.control is not None:
            seen["control"] = self._scored(model, tokenizer, self._kept(self.control)[1])
        return seen

    def scores(self, seen: Seen) -> list[Score]:
        found = self.judge(seen)
        n, m = found["n"], found["n_control"]
        chance = float(np.mean([1 / len(row) for row in seen["items"]]))
        scores = [
            Score("leakage", "a_first", found["a_first"], binomial_error(round(found["a_first"] * n), n), n, chance),
            Score("leakage", "a_first_control", found["a_first_control"], binomial_error(round(found["a_first_control"] * m), m), m, chance),
            Score("leakage", "a_auc", found["a_auc"], math.sqrt((n + m + 1) / (12 * n * m)), n, 0.5),
        ]
        if found["b_flagged"] is not None:
            error = binomial_error(round(found["b_flagged"] * n), n)
            scores.append(Score("leakage", "b_flagged", found["b_flagged"], error, n, self.false_positives))
        return scores

    def judge(self, seen: Seen, reference: Seen | None = None) -> dict[str, Any]:
        """All figures of the audit. With what a `reference` model saw, its log-probabilities are subtracted first.

        Scenario a: `a_first`, `a_first_control` (share whose published order is the single best; each with its 95 % `_interval`),
        `a_first_p` (Fisher), `a_auc` and `a_p` (how often an item ranks its order higher than a control item does). Scenario b, None
        without a control file: `b_flagged` (share beyond the control's quantile), `b_p` (Fisher), `b_auc` and `b_auc_p`,
        `b_published` (rates at the published thresholds, of items and of control). `items`: number in the file, rank, p and q of each.
        """
        items = _minus(seen["items"], reference["items"] if reference is not None else None)
        ids = seen["ids"]
        if "control" in seen:
            control = _minus(seen["control"], reference["control"] if reference is not None else None)
            columns = [0] * len(control)
        else:
            control = items
            columns = [1 + int(uniform(seed_for(self.seed, "frozen"), i) * (len(row) - 1)) for i, row in zip(ids, items, strict=True)]
        b = (
            self._scenario_b(items, control)
            if "control" in seen
            else dict.fromkeys(("b_flagged", "b_flagged_interval", "b_p", "b_auc", "b_auc_p", "b_published"))
        )
        return {"n": len(items), "n_control": len(control), **_scenario_a(items, control, columns, ids), **b}

    def _scenario_b(self, items: list[NDArray[np.float64]], control: list[NDArray[np.float64]]) -> dict[str, Any]:
        found, known = (np.array([float(outlier_scores(row[None])[0]) for row in rows]) for rows in (items, control))
        threshold = float(np.quantile(known, self.false_positives))
        flagged, flagged_control = int((found < threshold).sum()), int((known < threshold).sum())
        auc, p = rank_sum(-found, -known)
        published = [{"threshold": t, "items": float((found < t).mean()), "control": float((known < t).mean())} for t in PUBLISHED_THRESHOLDS]
        return {
            "b_flagged": flagged / len(found),
            "b_flagged_interval": wilson(flagged, len(found)),
            "b_p": fisher(flagged, len(found), flagged_control, len(known)),
            "b_auc": auc,
            "b_auc_p": p,
            "b_published": published,
        }

    def _kept(self, path: Path) -> tuple[list[int], list[tuple[str, list[str]]]]:
        """Numbers and (question, options) of the items that can be judged: options that repeat make orders alike, such items are left out."""
        kept = []
        for number, row in enumerate(load(path, (self.question, self.options))[: self.items]):
            options = row[self.options]
            texts = [str(text) for text in (options.values() if isinstance(options, dict) else options)][: self.choices]
            if len(texts) >= 2 and len(set(texts)) == len(texts):
                kept.append((number, (str(row[self.question]), texts)))
        if not kept:
            raise InputError(f"No item of {path} has at least two options in '{self.options}', all of them different.")
        return [number for number, _ in kept], [item for _, item in kept]

    def _scored(self, model: nn.Module, tokenizer: Tokenizer, items: list[tuple[str, list[str]]]) -> list[list[float]]:
        texts, counts = [], []
        for question, options in items:
            ways = orders(len(options), self.orders, self.seed)
            texts += [block(question, [options[i] for i in way]) for way in ways]
            counts.append(len(ways))
        sequences, starts = encoded_from(tokenizer, texts)
        scores = log_likelihoods(model, sequences, starts=starts)
        finite(scores.tolist(), "orders of options")
        return [part.tolist() for part in np.split(scores, np.cumsum(counts)[:-1])]


def _scenario_a(items: list[NDArray[np.float64]], control: list[NDArray[np.float64]], columns: list[int], ids: list[int]) -> dict[str, Any]:
    ranks = np.array([float(rank_shares(row[None])[0]) for row in items])
    known = np.array([float(rank_shares(row[None], column)[0]) for row, column in zip(control, columns, strict=True)])
    first = [bool(r <= 1 / len(row) + 1e-12) for r, row in zip(ranks, items, strict=True)]
    first_control = [bool(r <= 1 / len(row) + 1e-12) for r, row in zip(known, control, strict=True)]
    auc, p = rank_sum(-ranks, -known)
    p_items = calibrated(-ranks, -known)
    return {
        "a_first": float(np.mean(first)),
        "a_first_interval": wilson(sum(first), len(first)),
        "a_first_control": float(np.mean(first_control)),
        "a_first_control_interval": wilson(sum(first_control), len(first_control)),
        "a_first_p": fisher(sum(first), len(first), sum(first_control), len(first_control)),
        "a_auc": auc,
        "a_p": p,
        "items": [
            {"id": i, "rank": r, "p": p, "q": q} for i, r, p, q in zip(ids, ranks.tolist(), p_items.tolist(), false_discovery(p_items).tolist(), strict=True)
        ],
    }


def _minus(rows: list[list[float]], reference: list[list[float]] | None) -> list[NDArray[np.float64]]:
    if reference is not None and [len(row) for row in rows] != [len(row) for row in reference]:
        raise InputError("The reference model was asked for other items or orders; measure both with the same options.")
    return [np.array(row) - (np.array(reference[i]) if reference is not None else 0.0) for i, row in enumerate(rows)]
