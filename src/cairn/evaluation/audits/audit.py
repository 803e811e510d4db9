"""Audits of checkpoints: what `cairn audit` calls, and the pictures of what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cairn import plotting
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import MismatchError
from cairn.evaluation.audits.exposure import agreement, copies
from cairn.evaluation.audits.flips import Flips
from cairn.evaluation.audits.spread import order_flip
from cairn.evaluation.compute import Compute
from cairn.evaluation.items import observe
from cairn.evaluation.measurements.formats import Formats
from cairn.evaluation.measurements.leakage import Leakage

Progress = Callable[[str], object] | None
Finding = dict[str, Any]


def leakage(
    source: str | Path | Checkpoint,
    options: Mapping[str, Any],
    *,
    reference: str | Path | None = None,
    every: int = 1,
    known: bool = False,
    store: bool = True,
    device: Any = None,
    dtype: str = "float32",
    progress: Progress = None,
) -> list[Finding]:
    """Signs of leakage in a checkpoint, or in every n-th checkpoint of a run: one finding each, oldest first.

    `options` are those of the measurement `leakage`, `path` among them. `reference` is a model that cannot have seen the items;
    its log-probabilities are subtracted. `known` also looks for exact copies of the questions in the run's own data. A finding
    holds what `Leakage.judge` returns, the checkpoint it belongs to, and with `known` each item's `copies` and the `agreement`.
    """
    compute = Compute(device, dtype)
    measurement = Leakage.parse(options, "audit leakage")
    before = observe(read.open(reference), measurement, store=store, compute=compute, progress=progress) if reference is not None else None
    found = []
    for checkpoint in reversed(_checkpoints(source)[::-1][::every]):
        judged = measurement.judge(observe(checkpoint, measurement, store=store, compute=compute, progress=progress), before)
        if known:
            questions = [row[measurement.question] for row in measurement.rows(measurement.question)]
            counts = copies(checkpoint, [str(questions[item["id"]]) for item in judged["items"]])
            judged["items"] = [item | {"copies": count} for item, count in zip(judged["items"], counts, strict=True)]
            judged["agreement"] = agreement([item["rank"] for item in judged["items"]], counts)
        found.append({**_place(checkpoint), **judged})
    return found


def formats(
    source: str | Path | Checkpoint,
    options: Mapping[str, Any],
    *,
    compare: str | Path | Checkpoint | None = None,
    store: bool = True,
    device: Any = None,
    dtype: str = "float32",
    progress: Progress = None,
) -> Finding:
    """The interval of a checkpoint's accuracy over prompt formats; with `compare`, also the probability that the order of both flips.

    `options` are those of the measurement `formats`, `path` among them. A comparison looks at every format on every item;
    raises `MismatchError` where a `budget` forbids that.
    """
    compute = Compute(device, dtype)
    measurement = Formats.parse(options, "audit formats")
    if compare is not None and measurement.budget is not None:
        raise MismatchError("A comparison needs every format on every item; leave out budget.")
    opened = [each if isinstance(each, Checkpoint) else read.open(each) for each in (source, compare) if each is not None]
    seen = [observe(checkpoint, measurement, store=store, compute=compute, progress=progress) for checkpoint in opened]
    found = {**_place(opened[0]), **measurement.judge(seen[0])}
    if compare is not None:
        tables = [np.array(each["outcomes"], np.float64) for each in seen]
        found["compared"] = {**_place(opened[1]), **measurement.judge(seen[1])}
        found["order"] = order_flip(tables[0], tables[1], seed=measurement.seed)
    return found


def draw_leakage(findings: Sequence[Finding], path: str | Path) -> Path:
    """Ranks of the published order in items (a histogram of the last checkpoint) and, along a run, how the AUC grows; writes a PNG."""
    figure, (left, right) = plotting.panels(2)
    last = findings[-1]
    left.hist([item["rank"] for item in last["items"]], bins=np.linspace(0, 1, 13), edgecolor="white")
    left.axhline(len(last["items"]) / 12, linestyle="--", color="grey", linewidth=1)
    left.set(xlabel="rank of the published order (0: the most probable)", ylabel="items", title=str(last["checkpoint"]))
    right.plot(range(len(findings)), [each["a_auc"] for each in findings], marker="o", label="AUC against control")
    right.plot(range(len(findings)), [each["a_first"] for each in findings], marker="o", label="published order first")
    right.plot(range(len(findings)), [each["a_first_control"] for each in findings], linestyle="--", color="grey", label="the same, control")
    right.set_xticks(range(len(findings)), [str(each["checkpoint"]) for each in findings], rotation=30, fontsize=7)
    right.legend()
    return plotting.save(figure, path)


def draw_formats(finding: Finding, path: str | Path) -> Path:
    """Accuracy of every format that was scored in full, in order, with the default and the width that noise alone would have; writes a PNG."""
    figure, (axis,) = plotting.panels(1)
    for each in [finding, *([finding["compared"]] if "compared" in finding else [])]:
        axis.plot(sorted(each["scores"]), marker=".", label=str(each["checkpoint"]))
        middle = float(np.mean(each["scores"]))
        axis.axhspan(middle - each["null"] / 2, middle + each["null"] / 2, alpha=0.15)
        axis.axhline(each["default"], linestyle="--", linewidth=1, color=axis.lines[-1].get_color())
    axis.set(xlabel="formats, worst to best", ylabel="accuracy", title="dashed: default format; band: spread of noise")
    axis.legend()
    return plotting.save(figure, path)


def draw_flips(found: Flips, path: str | Path) -> Path:
    """What an update keeps, breaks and mends, as shares of the items, with the interval and the floor of what it breaks; writes a PNG."""
    figure, (axis,) = plotting.panels(1)
    shares = {"right, still right": found.old - found.negative, "right, now wrong": found.negative, "wrong, now right": found.positive}
    axis.bar(list(shares), list(shares.values()), color=["tab:grey", "tab:red", "tab:green"])
    low, high = found.negative_interval
    axis.errorbar([1], [found.negative], [[found.negative - low], [high - found.negative]], color="black", capsize=4)
    if found.floor is not None:
        axis.axhline(found.floor, linestyle="--", color="tab:red", linewidth=1, label="flips to another seed")
        axis.legend()
    axis.set(ylabel=f"share of {found.n} items", title=f"accuracy {found.old:.3f} before, {found.new:.3f} after")
    return plotting.save(figure, path)


def draw_stability(finding: Finding, path: str | Path) -> Path:
    """The score of each way to ask along the run, with its tau; writes a PNG."""
    figure, (axis,) = plotting.panels(1)
    for each in finding["tasks"]:
        tau = "undefined" if each["tau"] is None else f"{each['tau']:.2f}"
        axis.plot(finding["steps"], each["scores"], marker="o", label=f"{each['label']}: tau {tau}")
        if each["chance"] is not None:
            axis.axhline(each["chance"], linestyle=":", color="grey", linewidth=1)
    axis.set(xlabel="tokens", ylabel="accuracy")
    axis.legend()
    return plotting.save(figure, path)


def _checkpoints(source: str | Path | Checkpoint) -> list[Checkpoint]:
    if isinstance(source, Checkpoint):
        return [source]
    inside = read.list_checkpoints(source)
    return [read.open(path) for path in inside] if inside else [read.open(source)]


def _place(checkpoint: Checkpoint) -> Finding:
    return {"checkpoint": checkpoint.path.name, "step": checkpoint.step, "tokens": checkpoint.tokens, "digest": checkpoint.model_digest}
