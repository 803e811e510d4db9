"""What an execution of a study found: every figure of every seed, honest and sabotaged, and what the check makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cairn.errors import DamagedError, InputError, NotFoundError
from cairn.studies import conditions
from cairn.studies.conditions import Condition, Verdict
from cairn.studies.study import Figures, Study


@dataclass
class Made:
    """When, where and with what runs were made."""

    minutes: float
    date: str
    commit: str | None
    versions: dict[str, str]
    hardware: dict[str, Any]


@dataclass
class Control:
    """Sabotaged runs: what was taken away, the figures, and how they were made."""

    takes_away: str
    runs: list[Figures]
    made: Made


@dataclass
class StudyRecord:
    """Everything that one execution of a study found."""

    name: str
    card: int | None
    paper: str
    published: str
    protocol: str
    seeds: list[int]
    runs: list[Figures]
    made: Made
    control: Control
    conditions: list[Condition]
    control_conditions: list[Condition]
    also: dict[str, str] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] | None = None
    """What was read, by name, with the digest of its contents; None where it was not recorded."""
    other_data: list[str] = field(default_factory=list)
    """What is read and was not the same for the record before this one."""
    earlier_controls: list[Control] = field(default_factory=list)
    """Controls that were replaced, with all their runs."""

    @property
    def verdict(self) -> Verdict:
        return conditions.verdict(self.conditions)

    @property
    def control_fails(self) -> list[str]:
        """The conditions that the honest runs show and the sabotaged ones do not."""
        return conditions.lost(self.conditions, self.control_conditions)

    @property
    def undecided(self) -> list[str]:
        """The conditions that the seeds leave open."""
        return [condition.name for condition in self.conditions if condition.outcome == "undecided"]

    @property
    def counts(self) -> bool:
        """Whether the study counts as evidence: nothing that must always hold fails, and its check can fail."""
        return self.verdict != "fails" and bool(self.control_fails)

    @property
    def slug(self) -> str:
        return f"{self.card:02d}-{self.name}" if self.card is not None else self.name

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"verdict": self.verdict, "control_fails": self.control_fails}

    def save(self, folder: Path) -> Path:
        """Write it into a folder of evidence."""
        path = folder / f"{self.slug}.json"
        path.write_text(json.dumps(self.plain(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> StudyRecord:
        """From a committed file. Raises `NotFoundError` without one and `DamagedError` for what is no record."""
        try:
            values = json.loads(path.read_text())
            for derived in ("verdict", "control_fails"):
                del values[derived]
            for key in ("conditions", "control_conditions"):
                values[key] = [_condition(each) for each in values[key]]
            values["made"], values["control"] = Made(**values["made"]), _control(values["control"])
            values["earlier_controls"] = [_control(each) for each in values["earlier_controls"]]
            return cls(**values)
        except FileNotFoundError:
            raise NotFoundError(f"There is no record {path}; `cairn study` makes it.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} is not the record of a study ({type(error).__name__}: {error}).") from None

    def judge(self, item: Study) -> None:
        """Compute every condition again from the stored figures; what was run, and how, stays as it is."""
        try:
            self.conditions, self.control_conditions = item.check(self.runs), item.check(self.control.runs)
            self.also = item.also(self.runs)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"The runs of {self.slug}.json lack a figure that its check asks for ({error}); run the study again.") from None

    def compare(self, before: StudyRecord) -> None:
        """Note what this record read that the one before did not read like that."""
        known: Mapping[str, Mapping[str, Any]] = before.data or {}
        self.other_data = [name for name, found in (self.data or {}).items() if known.get(name, {}).get("digest") != found["digest"]]


def _condition(values: dict[str, Any]) -> Condition:
    interval = values.pop("interval")
    return Condition(**values, interval=tuple(interval) if interval is not None else None)


def _control(values: dict[str, Any]) -> Control:
    return Control(**values | {"made": Made(**values["made"])})
