"""Runs studies: every seed, the negative control, the check, and a record of all of it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.catalog import Entry
from cairn.checkpoint.format import lineage, trust
from cairn.data import corpora, reading
from cairn.device import computes
from cairn.errors import NotFoundError, suggestion
from cairn.studies import report as pages
from cairn.studies.record import Control, Made, StudyRecord
from cairn.studies.study import Figures, Study

Say = Callable[[str], object]


def listing() -> list[dict[str, Any]]:
    """All studies: name, card, minutes, paper."""
    return [
        {"name": entry.name, "card": _card(entry), "minutes": entry.implementation.minutes, "paper": entry.papers[0].title if entry.papers else ""}
        for entry in catalog.entries("study")
    ]


@computes
def study(
    name: str | None,
    *,
    evidence: str | Path | None = None,
    work: str | Path | None = None,
    device: Any = None,
    progress: Say = lambda text: None,
) -> list[StudyRecord]:
    """Run the study of that name, all studies of that card number, or (None) every study.

    Parameters
    ----------
    name
        A study's name, the number of its card, or None for every study.
    evidence
        Where records go, as `NN-name.json` with a picture beside; a record that is there says whether the new one read the same data.
    work
        Where runs go; by default a temporary directory, removed afterwards.
    progress
        Is told what is being done.

    Returns
    -------
    The records, which hold every figure of every seed.

    Raises
    ------
    NotFoundError
        There is no study of that name or card.

    Examples
    --------
    >>> study("prepack")[0].verdict  # doctest: +SKIP
    'holds'
    """
    records = []
    for entry in _chosen(name):
        with _place(work, entry) as place, trust.following():
            record = execute(entry, place, progress)
        if evidence is not None:
            _keep(record, entry.implementation(), Path(evidence))
        records.append(record)
    return records


@computes
def control(
    name: str | None, *, evidence: str | Path, work: str | Path | None = None, device: Any = None, progress: Say = lambda text: None
) -> list[StudyRecord]:
    """Run only the negative control of a study and put it into the record in `evidence`, beside the honest runs that are there.

    The control that it replaces is kept with all its runs where it took something else away. Raises `NotFoundError` without a record.
    """
    records = []
    for entry in _chosen(name):
        item, record = entry.implementation(), _committed(entry, Path(evidence))
        for run in record.runs:
            item.remember(run["seed"], run)
        with _place(work, entry) as place, trust.following():
            fresh = _sabotaged(item, place, progress)
        if record.control.takes_away != fresh.takes_away:
            record.earlier_controls.append(record.control)
        record.control = fresh
        record.judge(item)
        record.save(Path(evidence))
        records.append(record)
    return records


def recompute(name: str | None, *, evidence: str | Path) -> list[StudyRecord]:
    """Compute the conditions and verdicts of committed records again from their stored runs; nothing is run.

    Raises `InputError` where a stored run lacks a figure that the check asks for.
    """
    records = []
    for entry in _chosen(name):
        record = _committed(entry, Path(evidence))
        record.judge(entry.implementation())
        record.save(Path(evidence))
        records.append(record)
    return records


def told(record: StudyRecord) -> str:
    """A record for a terminal: every condition, the control, the verdict."""
    return pages.told(record)


def report(evidence: str | Path, front: str | Path | None = None) -> list[Path]:
    """Render every record in `evidence` as a Markdown page, with an index, and the counts of verdicts into the page `front`; runs nothing."""
    return pages.write(Path(evidence), Path(front) if front is not None else None)


def execute(entry: Entry, work: Path, progress: Say) -> StudyRecord:
    """All seeds, then the control, then the check on both."""
    item: Study = entry.implementation()
    with reading.noted() as read:
        for spec in item.reads:
            corpora.resolve(spec)
        began = time.monotonic()
        runs = [_seed(item, seed, work / f"seed-{seed}", False, progress) for seed in item.seeds]
        for run in runs:
            item.remember(run["seed"], run)
        made = _made(began)
        sabotaged = _sabotaged(item, work, progress)
    return StudyRecord(
        name=entry.name,
        card=_card(entry),
        paper=entry.papers[0].title if entry.papers else "",
        published=item.published,
        protocol=item.protocol,
        seeds=list(item.seeds),
        runs=runs,
        made=made,
        control=sabotaged,
        conditions=item.check(runs),
        control_conditions=item.check(sabotaged.runs),
        also=item.also(runs),
        data=reading.digests(read),
    )


def _sabotaged(item: Study, work: Path, progress: Say) -> Control:
    began = time.monotonic()
    runs = [_seed(item, seed, work / f"control-{seed}", True, progress) for seed in item.seeds]
    return Control(item.control, runs, _made(began))


def _seed(item: Study, seed: int, work: Path, sabotage: bool, progress: Say) -> Figures:
    progress(f"{catalog.name_of(item)}: {'control, ' if sabotage else ''}seed {seed}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return {"seed": seed, **item.run(seed, work, sabotage=sabotage, say=progress)}


def _made(began: float) -> Made:
    return Made((time.monotonic() - began) / 60, datetime.now(UTC).date().isoformat(), _commit(), lineage.versions(), lineage.hardware())


@contextmanager
def _place(work: str | Path | None, entry: Entry) -> Iterator[Path]:
    """Where a study's runs go: under `work`, or in a temporary directory that is removed."""
    base = Path(work) if work is not None else Path(tempfile.mkdtemp(prefix="cairn-study-"))
    try:
        yield base / entry.name
    finally:
        if work is None:
            shutil.rmtree(base, ignore_errors=True)


def _chosen(name: str | None) -> list[Entry]:
    entries = catalog.entries("study")
    if name is None:
        return entries
    if name.isdigit():
        found = [entry for entry in entries if _card(entry) == int(name)]
        if not found:
            raise NotFoundError(f"There is no study of card {int(name)} yet.{suggestion(name, [f'{_card(e):02d}' for e in entries if _card(e)])}")
        return found
    return [catalog.get("study", name)]


def _card(entry: Entry) -> int | None:
    return next((paper.card for paper in entry.papers if paper.card is not None), None)


def _file(entry: Entry, folder: Path) -> Path:
    card = _card(entry)
    return folder / (f"{card:02d}-{entry.name}.json" if card is not None else f"{entry.name}.json")


def _committed(entry: Entry, folder: Path) -> StudyRecord:
    return StudyRecord.load(_file(entry, folder))


def _keep(record: StudyRecord, item: Study, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    before = folder / f"{record.slug}.json"
    if before.exists():
        record.compare(StudyRecord.load(before))
    record.save(folder)
    item.draw(record.runs, folder / f"{record.slug}.png")


def _commit() -> str | None:
    """The commit of the code that ran, marked if the tree had changes; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--", str(here.parent)], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}{' with changes' if dirty else ''}"
