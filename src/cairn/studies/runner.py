"""Runs studies: every seed, the negative control, the check, and a record of all of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.catalog import Entry
from cairn.checkpoint.format import lineage
from cairn.errors import NotFoundError, suggestion
from cairn.studies.study import Criterion, Figures, Study, verdict


@dataclass
class StudyRecord:
    """Everything that one execution of a study found."""

    name: str
    card: int | None
    paper: str
    published: str
    protocol: str
    control_takes_away: str
    seeds: list[int]
    runs: list[Figures]
    criteria: list[Criterion]
    control_runs: list[Figures]
    control_criteria: list[Criterion]
    verdict: str
    minutes: float
    date: str
    commit: str | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    also: dict[str, str] = field(default_factory=dict)

    @property
    def control_failed(self) -> bool:
        """Whether the check failed on the sabotaged runs, as it must."""
        return not all(criterion.passed for criterion in self.control_criteria)

    @property
    def holds_up(self) -> bool:
        """Whether the study counts: the claim does not fail, and the check can."""
        return self.verdict != "fails" and self.control_failed

    @property
    def slug(self) -> str:
        return f"{self.card:02d}-{self.name}" if self.card is not None else self.name

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"control_failed": self.control_failed}

    @classmethod
    def load(cls, path: Path) -> StudyRecord:
        """From a committed JSON record."""
        values = json.loads(path.read_text())
        values.pop("control_failed")
        for key in ("criteria", "control_criteria"):
            values[key] = [Criterion(**criterion) for criterion in values[key]]
        return cls(**values)

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.name} ({self.paper})", f"  published  {self.published}", f"  protocol   {self.protocol}"]
        lines += [f"  {'holds' if c.passed else 'FAILS'}      {c.name}: {c.found} (required: {c.required})" for c in self.criteria]
        failed = [c.name for c in self.control_criteria if not c.passed]
        control = f"fails as it must ({', '.join(failed)})" if self.control_failed else "PASSES: the check proves nothing"
        lines += [f"  also       {name}: {found}" for name, found in self.also.items()]
        lines += [f"  control    {self.control_takes_away}: {control}", f"  verdict    {self.verdict}  ({self.minutes:.1f} minutes)"]
        return "\n".join(lines)


def listing() -> list[dict[str, Any]]:
    """All studies: name, card, minutes, paper."""
    return [
        {"name": entry.name, "card": _card(entry), "minutes": entry.implementation.minutes, "paper": entry.papers[0].title if entry.papers else ""}
        for entry in catalog.entries("study")
    ]


def study(
    name: str | None,
    *,
    evidence: str | Path | None = None,
    work: str | Path | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> list[StudyRecord]:
    """Run the study of that name, all studies of that card number, or (None) every study; returns their records.

    Records go to `evidence` as `NN-name.json` with a picture beside; runs go under `work` (default: a temporary
    directory, removed afterwards).
    """
    records = []
    for entry in _chosen(name):
        base = Path(work) if work is not None else Path(tempfile.mkdtemp(prefix="cairn-study-"))
        try:
            record = execute(entry, base / entry.name, progress)
        finally:
            if work is None:
                shutil.rmtree(base, ignore_errors=True)
        if evidence is not None:
            _keep(record, entry.implementation(), Path(evidence))
        records.append(record)
    return records


def execute(entry: Entry, work: Path, progress: Callable[[str], object]) -> StudyRecord:
    """All seeds, then the control, then the check on both."""
    item: Study = entry.implementation()
    began = time.monotonic()
    runs = [_seed(item, seed, work / f"seed-{seed}", False, progress) for seed in item.seeds]
    control = [_seed(item, seed, work / f"control-{seed}", True, progress) for seed in item.seeds]
    criteria = item.check(runs)
    return StudyRecord(
        name=entry.name,
        card=_card(entry),
        paper=entry.papers[0].title if entry.papers else "",
        published=item.published,
        protocol=item.protocol,
        control_takes_away=item.control,
        seeds=list(item.seeds),
        runs=runs,
        criteria=criteria,
        control_runs=control,
        control_criteria=item.check(control),
        verdict=verdict(criteria),
        minutes=(time.monotonic() - began) / 60,
        date=datetime.now(UTC).date().isoformat(),
        commit=_commit(),
        versions=lineage.versions(),
        hardware=lineage.hardware(),
        also=item.also(runs),
    )


def report(evidence: str | Path) -> list[Path]:
    """Render every record in `evidence` as a Markdown page, with an index; runs nothing."""
    folder = Path(evidence)
    records = [StudyRecord.load(path) for path in sorted(folder.glob("*.json"))]
    pages = []
    for record in records:
        page = folder / f"{record.slug}.md"
        page.write_text(_page(record, (folder / f"{record.slug}.png").exists()))
        pages.append(page)
    rows = [f"| [{r.name}]({r.slug}.md) | {r.card or ''} | {r.paper} | {r.verdict} | {'fails' if r.control_failed else 'PASSES'} |" for r in records]
    head = ["# Evidence", "", "Each page is rendered from a committed record of every run. Made by `cairn study --report`.", ""]
    index = folder / "index.md"
    index.write_text("\n".join([*head, "| study | card | paper | verdict | negative control |", "|---|---|---|---|---|", *rows]) + "\n")
    return [index, *pages]


def _seed(item: Study, seed: int, work: Path, sabotage: bool, progress: Callable[[str], object]) -> Figures:
    progress(f"{catalog.name_of(item)}: {'control, ' if sabotage else ''}seed {seed}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return {"seed": seed, **item.run(seed, work, sabotage=sabotage, say=progress)}


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


def _keep(record: StudyRecord, item: Study, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record.slug}.json").write_text(json.dumps(record.plain(), indent=1) + "\n")
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


def _page(record: StudyRecord, picture: bool) -> str:
    lines = [f"# {record.name}", "", f"**{record.paper}** (card {record.card}). Verdict: **{record.verdict}**.", ""]
    lines += ["## Published", "", record.published, "", "## Protocol", "", record.protocol, "", "## Found", ""]
    lines += _criteria(record.criteria)
    if record.also:
        lines += ["", "Reported, without a condition:", "", "| what | found |", "|---|---|", *(f"| {name} | {found} |" for name, found in record.also.items())]
    outcome = "The check fails, as it must." if record.control_failed else "**The check passes: it proves nothing.**"
    lines += ["", "## Negative control", "", f"{record.control_takes_away} {outcome}", "", *_criteria(record.control_criteria), ""]
    if picture:
        lines += [f"![figures]({record.slug}.png)", ""]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines += [
        "## How it was made",
        "",
        f"`cairn study {record.name}`, seeds {record.seeds}, {record.minutes:.1f} minutes, {record.date}, commit {record.commit}.",
        "",
    ]
    lines += [
        f"{record.hardware.get('cores')} cores, {record.hardware.get('machine')}; {versions}.",
        "",
        f"All figures: [{record.slug}.json]({record.slug}.json).",
        "",
    ]
    return "\n".join(lines)


def _criteria(criteria: Sequence[Criterion]) -> list[str]:
    rows = [f"| {c.name} | {c.required} | {c.found} | {'yes' if c.passed else 'no'} |" for c in criteria]
    return ["| condition | required | found | holds |", "|---|---|---|---|", *rows]
