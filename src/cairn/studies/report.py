"""Pages of evidence, rendered from committed records."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cairn.studies.conditions import Condition
from cairn.studies.record import Made, StudyRecord

VERDICTS = {
    "holds": "every condition is shown",
    "partly": "all main conditions are shown, others are not",
    "not at this scale": "a main condition is not shown",
    "fails": "something that must hold at any scale does not",
}
COUNTS = re.compile(r"<!-- evidence -->.*?<!-- /evidence -->", re.DOTALL)
"""Where a page states how many studies hold; `write` keeps it true."""


def write(folder: Path, front: Path | None = None) -> list[Path]:
    """Render every record in `folder` as a page, with an index, and put the counts into the page `front`; runs nothing."""
    records = [StudyRecord.load(path) for path in sorted(folder.glob("*.json"))]
    pages = []
    for record in records:
        page = folder / f"{record.slug}.md"
        page.write_text(_page(record, (folder / f"{record.slug}.png").exists()))
        pages.append(page)
    index = folder / "index.md"
    index.write_text(_index(records))
    if front is not None and front.exists():
        front.write_text(COUNTS.sub(f"<!-- evidence -->{counted(records)}<!-- /evidence -->", front.read_text()))
    return [index, *pages]


def counted(records: Sequence[StudyRecord]) -> str:
    """How many studies have which verdict, as a sentence."""
    found = Counter(record.verdict for record in records)
    return (
        f"Of {len(records)} studies {found['holds']} hold, {found['partly']} hold partly, {found['not at this scale']} do not show their claim at this scale "
        f"and {found['fails']} fail."
    )


def told(record: StudyRecord) -> str:
    """A record for a terminal."""
    lines = [f"{record.name} ({record.paper})", f"  published  {record.published}", f"  protocol   {record.protocol}"]
    for condition in record.conditions:
        mark = "main: " if condition.main else ""
        lines.append(f"  {condition.outcome:10s} {mark}{condition.name}: {condition.found} (required: {condition.required})")
    lines += [f"  also       {name}: {found}" for name, found in record.also.items()]
    lost = ", ".join(record.control_fails)
    control = f"fails what the honest runs show ({lost})" if lost else "FAILS NOTHING that the honest runs show: the check proves nothing"
    lines.append(f"  control    {record.control.takes_away}: {control}")
    if record.other_data:
        lines.append(f"  data       not what the record before read: {', '.join(record.other_data)}")
    return "\n".join([*lines, f"  verdict    {record.verdict}  ({record.made.minutes + record.control.made.minutes:.1f} minutes)"])


def _index(records: Sequence[StudyRecord]) -> str:
    lines = ["# Evidence", "", "Each page is rendered from a committed record of every run. Made by `cairn study --report`.", ""]
    lines += [counted(records), "", "| verdict | means |", "|---|---|", *(f"| {name} | {meaning} |" for name, meaning in VERDICTS.items()), ""]
    lines += [
        "A main condition is part of the paper's claim. A figure that differs from seed to seed shows a condition when the rule stated in advance holds and",
        "the 95 % interval of its mean over the seeds lies beyond the threshold; where the interval covers the threshold the condition is undecided, which",
        "counts as not shown. A negative control fails when it loses a condition that the honest runs show.",
        "",
        "| study | card | paper | verdict | shown | undecided | negative control |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        shown = f"{sum(condition.shown for condition in record.conditions)} of {len(record.conditions)}"
        control = f"fails {len(record.control_fails)}" if record.control_fails else "PROVES NOTHING"
        card, left = record.card or "", len(record.undecided)
        lines.append(f"| [{record.name}]({record.slug}.md) | {card} | {record.paper} | {record.verdict} | {shown} | {left} | {control} |")
    return "\n".join(lines) + "\n"


def _page(record: StudyRecord, picture: bool) -> str:
    lines = [f"# {record.name}", "", f"**{record.paper}** (card {record.card}). Verdict: **{record.verdict}**.", ""]
    lines += ["## Published", "", record.published, "", "## Protocol", "", record.protocol, "", "## Found", "", *_table(record.conditions)]
    if record.also:
        lines += ["", "Reported, without a condition:", "", "| what | found |", "|---|---|", *(f"| {name} | {found} |" for name, found in record.also.items())]
    lost = "; ".join(record.control_fails)
    outcome = f"It fails conditions that the honest runs show: {lost}." if lost else "**It fails nothing that the honest runs show: the check proves nothing.**"
    lines += ["", "## Negative control", "", f"{record.control.takes_away} {outcome}", "", *_table(record.control_conditions), ""]
    for earlier in record.earlier_controls:
        lines += [f"An earlier control proved nothing and was replaced; its runs are kept: {earlier.takes_away}", ""]
    if picture:
        lines += [f"![figures]({record.slug}.png)", ""]
    lines += ["## How it was made", "", f"`cairn study {record.name}`, seeds {record.seeds}, {_made(record.made)}", ""]
    if record.control.made != record.made:
        lines += [f"The negative control: {_made(record.control.made)}", ""]
    return "\n".join([*lines, *_data(record), "", f"All figures: [{record.slug}.json]({record.slug}.json).", ""])


def _made(made: Made) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    return f"{made.minutes:.1f} minutes, {made.date}, commit {made.commit}; {made.hardware.get('cores')} cores, {made.hardware.get('machine')}; {versions}."


def _data(record: StudyRecord) -> list[str]:
    if record.data is None:
        return [
            "The digests of what it read were not recorded: it was made before studies recorded them. Texts of this Python installation",
            "(`python-docs`, `python-source`) were not restricted to the standard library then, so a rerun reads others.",
        ]
    rows = [f"| {name} | {found['origin']} | `{found['digest'][:16]}` |" for name, found in record.data.items()]
    told = ["| read | origin | digest of its contents |", "|---|---|---|", *rows] if rows else ["It reads no corpus."]
    if record.other_data:
        told += ["", f"Other data than for the record before: {', '.join(record.other_data)}."]
    return told


def _table(conditions: Sequence[Condition]) -> list[str]:
    rows = []
    for condition in conditions:
        marks = ", ".join(mark for mark, given in (("main", condition.main), ("always", condition.always)) if given)
        interval = f"{condition.interval[0]:.4g} to {condition.interval[1]:.4g}" if condition.interval is not None else ""
        rows.append(f"| {condition.name} | {marks} | {condition.required} | {condition.found} | {interval} | {condition.outcome} |")
    return ["| condition | | required | found | 95 % interval | outcome |", "|---|---|---|---|---|---|", *rows]
