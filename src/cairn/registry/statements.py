"""What people say of a checkpoint: license, use, limits, claims. Kept beside it, since a checkpoint itself never changes.

`statements/` lies where `results/` lies. A file there bears the beginning of the model digest that it speaks of, or is
`all.json` and speaks of every checkpoint of that run or folder that does not say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from cairn import statistics
from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import DamagedError, InputError
from cairn.evaluation import results
from cairn.options import Count, Options, override

ALL = "all.json"


class Claim(Options):
    """A number that somebody gives for a checkpoint, with what it takes to measure it again."""

    metric: str
    value: float
    dataset: str | None = None
    split: str | None = None
    revision: str | None = None
    task: dict[str, Any] | None = None
    """The protocol: a measurement's name and options, as `cairn evaluate` takes them. Without one it cannot be measured again."""
    n: Count | None = None
    """Items that the number is a mean over."""
    stderr: float | None = Field(None, ge=0)
    claimed_by: str | None = None
    date: str | None = None
    source: str | None = None
    """Where it is written, when it was read from somewhere."""

    @model_validator(mode="after")
    def _finite(self) -> Claim:
        if not math.isfinite(self.value):
            raise ValueError(f"a claim is a number, not {self.value}.")
        return self

    def error(self) -> float | None:
        """Its standard error, never 0: as given, else that of a proportion of n items; None where neither is known."""
        stderr = self.stderr
        if stderr is None and self.n and 0 <= self.value <= 1:
            stderr = math.sqrt(self.value * (1 - self.value) / self.n)
        found = statistics.error(self.value, stderr, self.n)
        return found if math.isfinite(found) else None


class Statement(Options):
    """What people may say of a checkpoint; everything else is measured or derived."""

    name: str | None = None
    version: Annotated[str | None, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)] = None
    license: str | None = None
    """SPDX identifier, such as apache-2.0."""
    language: list[str] = []
    intended_use: str | None = None
    limitations: str | None = None
    citation: str | None = None
    paper: str | None = None
    fine_tuning: str | None = None
    """How it is meant to be tuned further."""
    price_per_hour: float | None = Field(None, ge=0)
    """Cost of an hour of the machine that trained it."""
    watts: float | None = Field(None, ge=0)
    """Mean power of the machine that trained it."""
    data_licenses: dict[str, str] = {}
    """License of each source of training data, by its name in the recipe."""
    claims: list[Claim] = []


def folder_of(checkpoint: Checkpoint) -> Path:
    """Where statements on a checkpoint lie."""
    return results.folder(checkpoint).with_name("statements")


def load(checkpoint: Checkpoint) -> Statement:
    """What is said of a checkpoint; what is said of it alone goes before what is said of all. Raises `DamagedError` for an unsound file."""
    folder = folder_of(checkpoint)
    if not folder.is_dir():
        return Statement()
    general, own = (_read(folder / name) for name in (ALL, _name(checkpoint)))
    claims = [*general.get("claims", []), *own.get("claims", [])]
    return _parsed({**general, **own, "claims": claims}, folder / _name(checkpoint))


def describe(source: str | Path, settings: Iterable[str]) -> Statement:
    """State things of a checkpoint, or of every checkpoint of a run, as `key=value`; an empty value takes a statement back.

    Returns what is now said. Raises `InputError` for a key that nobody knows, before anything is written.
    """
    checkpoint = read.open(source)
    if not list(settings):
        return load(checkpoint)
    path = _file(source, checkpoint)
    values = {key: value for key, value in override(_read(path), settings).items() if value is not None}
    documents.keep_json(path, _plain(Statement.parse(values, "statement")))
    return load(checkpoint)


def claim(
    source: str | Path,
    metric: str,
    value: float,
    *,
    task: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    n: int | None = None,
    stderr: float | None = None,
    claimed_by: str | None = None,
    date: str | None = None,
) -> Claim:
    """Register a number that somebody gives for a checkpoint, or for every checkpoint of a run.

    Parameters
    ----------
    source
        A checkpoint or a run.
    metric, value
        What the number is (accuracy, loss, ...), and the number.
    task
        The protocol: a measurement's name and options, as `cairn.evaluate` takes them. Without one it cannot be measured again.
    dataset, split, revision
        What it was measured on.
    n, stderr
        Items that it is a mean over, and its standard error.
    claimed_by, date
        Who says so, and when; the date is today's unless given.

    Returns
    -------
    Claim
        What was kept, beside the checkpoint.

    Raises
    ------
    InputError
        For a value that is no finite number; nothing is written then.

    Examples
    --------
    >>> cairn.claim("runs/a", "accuracy", 0.71, n=1000, task={"name": "blimp"})  # doctest: +SKIP

    Source: "An Empirical Study of Pre-Trained Model Reuse in the Hugging Face Deep Learning Model Registry" (card 42, C).
    """
    given = {"dataset": dataset, "split": split, "revision": revision, "n": n, "stderr": stderr, "claimed_by": claimed_by, "date": date}
    values = {key: each for key, each in given.items() if each is not None}
    today = datetime.now(UTC).date().isoformat()
    made = Claim.parse({"date": today, "metric": metric, "value": value, "task": dict(task) if task is not None else None, **values}, "claim")
    path = _file(source, read.open(source))
    kept = _read(path)
    documents.keep_json(path, _plain(Statement.parse({**kept, "claims": [*kept.get("claims", []), made.model_dump(mode="json")]}, "statement")))
    return made


def keep(checkpoint: Checkpoint, kind: str, document: Mapping[str, Any]) -> Path:
    """Keep a small document on a checkpoint (`kind`: example, replay, portability) beside its statements."""
    path = folder_of(checkpoint) / f"{_stem(checkpoint)}.{kind}.json"
    documents.keep_json(path, document)
    return path


def kept(checkpoint: Checkpoint, kind: str) -> dict[str, Any] | None:
    """What `keep` has kept, or None."""
    return _read(folder_of(checkpoint) / f"{_stem(checkpoint)}.{kind}.json") or None


def _stem(checkpoint: Checkpoint) -> str:
    return checkpoint.model_digest[:16]


def _name(checkpoint: Checkpoint) -> str:
    return f"{_stem(checkpoint)}.json"


def _file(source: str | Path, checkpoint: Checkpoint) -> Path:
    return folder_of(checkpoint) / (ALL if read.is_run(place(source)) else _name(checkpoint))


def _read(path: Path) -> dict[str, Any]:
    try:
        return documents.read_object(path)
    except FileNotFoundError:
        return {}


def _parsed(values: Mapping[str, Any], path: Path) -> Statement:
    try:
        return Statement.parse(values, str(path))
    except InputError as error:
        raise DamagedError(str(error)) from None


def _plain(statement: Statement) -> dict[str, Any]:
    return statement.model_dump(mode="json", exclude_defaults=True)
