"""What every ingredient of training promises: a stop and a resume change no bit, its config comes back, a typo is named.

An ingredient is tried in a small run of a field that gives what it needs (`DataField.sample_recipe`). A class says with `sample_changes`, a mapping of
dotted keys, what else that recipe needs, and with `sample_start` on what checkpoint its run begins, if it cannot begin from nothing: the kind, name and
options of an operation on a run of a few steps, such as `{"kind": "growth", "name": "masked", "factor": 2}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.options import assign, configure
from cairn.testing.suites import Check, demand, options_round_trip, suite

STEPS, BEFORE = 12, 4
"""Steps of a run, and steps after which a base is left where one is needed."""
STOPS = (1, 7)
CLOCK = {"tokens_per_second", "samples_per_second", "seconds"}
"""Figures of a row that say how fast it was made."""


@suite("field", "adapter", "objective", "optimizer", "schedule", "reweighting", "filter", "callback")
def _ingredients(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[Check]:
    tried = _Tried(kind, name, dict(options))
    yield Check(
        f"{kind} {name}",
        "options come back from plain values, and a typo is an error that names the nearest",
        lambda folder: options_round_trip(kind, name, tried.whole_options(folder)),
    )
    yield Check(f"{kind} {name}", f"a stop after step {' or '.join(map(str, STOPS))} and a resume change no bit, no figure and no sample", tried.resumes)


def sample_field(needs: frozenset[str]) -> Any:
    """The class of the first field, text before others, that gives everything that is needed."""
    fields = sorted(catalog.entries("field"), key=lambda entry: entry.name != "text")
    found = next((entry.implementation for entry in fields if needs <= entry.implementation.gives), None)
    if found is None:
        raise AssertionError(f"No field gives {' and '.join(sorted(needs))}.")
    return found


def small_recipe(field: Any, folder: Path) -> dict[str, Any]:
    """A recipe of a field that trains in a second; its data are written into the folder."""
    recipe: dict[str, Any] = field.sample_recipe(folder)
    length = {field.unit: f"{STEPS} steps"}
    defaults = {"seed": 7, "optimizer": {"name": "adamw", "lr": 3e-3}, "schedule": {"name": "cosine", "warmup": "3 steps"}, "checkpoint": {"every": "5 steps"}}
    return {**defaults, **recipe, "training": {"compile": False, **recipe.get("training", {}), **length}}


@dataclass(frozen=True)
class _Tried:
    """An ingredient on trial."""

    kind: str
    name: str
    options: dict[str, Any]

    @property
    def implementation(self) -> Any:
        return catalog.get(self.kind, self.name).implementation

    @property
    def field(self) -> Any:
        if self.kind == "field":
            return self.implementation
        needs: Any = getattr(configure(self.kind, {"name": self.name, **self.options}), "needs", frozenset())
        return sample_field(needs() if callable(needs) else needs)

    def whole_options(self, folder: Path) -> dict[str, Any]:
        """Its options; of a field those that its own sample names besides."""
        if self.kind != "field":
            return self.options
        return {key: value for key, value in small_recipe(self.field, folder)["data"].items() if key != "name"} | self.options

    def recipe(self, folder: Path, base: Any = None) -> dict[str, Any]:
        """The recipe of its run; `base` is a checkpoint for teachers."""
        recipe = small_recipe(self.field, folder)
        value = {"name": self.name, **self.options}
        written = {
            "callback": {"callbacks": [value]},
            "filter": {"data.filters": [value]},
            "field": {f"data.{key}": each for key, each in self.options.items()},
        }
        recipe = assign(recipe, {**written.get(self.kind, {self.kind: value}), **getattr(self.implementation, "sample_changes", {})}.items())
        teachers = getattr(self.implementation, "teachers", ()) if self.kind == "objective" else ()
        if teachers:
            follows = [number > 0 and not self.implementation.needs_teachers for number in range(len(teachers))]
            each = [{"ema": 0.5} if moving else {"checkpoint": str(base.path)} for moving in follows]
            recipe["teacher"] = dict(zip(teachers, each, strict=True))
        return recipe

    def resumes(self, folder: Path) -> None:
        from cairn.training.run import resume

        start = self._start(folder)
        whole = start(folder / "whole", None)
        demand(whole.newest().step is not None, f"{self.name}: the run left no checkpoint.")
        for stop in STOPS:
            start(folder / f"cut-{stop}", stop)
            again = resume(folder / f"cut-{stop}")
            rows = [[{key: value for key, value in row.items() if key not in CLOCK} for row in run.metrics()] for run in (whole, again)]
            differing = next((one["step"] for one, other in zip(*rows, strict=False) if one != other), None)
            demand(rows[0] == rows[1], f"{self.name}: a run that is stopped after step {stop} and resumed has other figures, first in step {differing}.")
            demand(again.newest().digest == whole.newest().digest, f"{self.name}: a run that is stopped after step {stop} and resumed ends in other bits.")
            demand(again.samples() == whole.samples(), f"{self.name}: a run that is stopped after step {stop} and resumed writes other samples.")

    def _start(self, folder: Path) -> Any:
        """A function that begins the run in a folder, to be stopped after so many steps: from nothing, or from the checkpoint that it belongs to."""
        from cairn.training.run import fork, train

        data = folder / "data"
        data.mkdir()
        begins = getattr(self.implementation, "sample_start", None)
        needs_base = self.kind == "adapter" or begins is not None or bool(getattr(self.implementation, "teachers", ()))
        base = train(small_recipe(self.field, data), folder / "base", stop_at_step=BEFORE).newest() if needs_base else None
        if base is None or (self.kind != "adapter" and begins is None):
            recipe = self.recipe(data, base)
            return lambda run, stop: train(recipe, run, stop_at_step=stop)
        source = base if begins is None else _enlarged(base, begins, folder / "start")
        kept = [f"{self.kind}={json.dumps({'name': self.name, **self.options})}"] if begins is None else []
        settings = [*kept, *(f"{key}={value}" for key, value in getattr(self.implementation, "sample_changes", {}).items())]
        settings.append(f"training.{self.field.unit}={BEFORE + STEPS} steps")
        return lambda run, stop: fork(source, run, settings, fresh=["optimizer"], stop_at_step=stop and BEFORE + stop)


def _enlarged(base: Any, begins: Mapping[str, Any], out: Path) -> Any:
    """The checkpoint that an operation which `begins` names makes of a base."""
    from cairn.checkpoint.operating import stream

    kind, options = str(begins["kind"]), {key: value for key, value in begins.items() if key != "kind"}
    return stream.apply(configure(kind, options), [base], out)
