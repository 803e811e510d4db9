"""Licenses along a lineage: may what was made bear this license, given those of its parents and of its data?

A table of licenses is an opinion, not law: every answer names the rule that gave it, and what is unknown is for a person to
review, never fine ("An Empirical Study of Pre-Trained Model Reuse", card 42, E).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Family = Literal["permissive", "attribution", "weak-copyleft", "copyleft", "network-copyleft", "share-alike", "non-commercial", "no-derivatives", "use-limits"]

FAMILIES: dict[str, tuple[Family, ...]] = {
    "apache-2.0": ("permissive",), "mit": ("permissive",), "mit-0": ("permissive",), "bsd": ("permissive",), "bsd-2-clause": ("permissive",),
    "bsd-3-clause": ("permissive",), "isc": ("permissive",), "afl-3.0": ("permissive",), "cc0-1.0": ("permissive",), "unlicense": ("permissive",),
    "public-domain": ("permissive",), "psf-2.0": ("permissive",), "cc-by-2.0": ("attribution",), "cc-by-3.0": ("attribution",),
    "cc-by-4.0": ("attribution",), "odc-by": ("attribution",), "mpl-2.0": ("weak-copyleft",), "lgpl-2.1": ("weak-copyleft",),
    "lgpl-3.0": ("weak-copyleft",), "epl-2.0": ("weak-copyleft",), "cecill-c": ("weak-copyleft",), "gpl-2.0": ("copyleft",),
    "gpl-2.0-or-later": ("copyleft",), "gpl-3.0-or-later": ("copyleft",), "lgpl-2.1-or-later": ("weak-copyleft",),
    "lgpl-3.0-or-later": ("weak-copyleft",), "gpl-3.0": ("copyleft",),
    "agpl-3.0": ("copyleft", "network-copyleft"), "agpl-3.0-or-later": ("copyleft", "network-copyleft"),
    "cc-by-sa-2.5": ("share-alike",), "cc-by-sa-3.0": ("share-alike",), "cc-by-sa-4.0": ("share-alike",),
    "odbl-1.0": ("share-alike",), "cc-by-nc-2.0": ("non-commercial",), "cc-by-nc-3.0": ("non-commercial",), "cc-by-nc-4.0": ("non-commercial",),
    "cc-by-nc-sa-3.0": ("non-commercial", "share-alike"), "cc-by-nc-sa-4.0": ("non-commercial", "share-alike"), "cc-by-nd-4.0": ("no-derivatives",),
    "cc-by-nc-nd-4.0": ("non-commercial", "no-derivatives"), "bigscience-bloom-rail-1.0": ("use-limits",), "bigscience-openrail-m": ("use-limits",),
    "bigcode-openrail-m": ("use-limits",), "creativeml-openrail-m": ("use-limits",), "openrail": ("use-limits",), "openrail++": ("use-limits",),
    "llama2": ("use-limits",), "llama3": ("use-limits",), "gemma": ("use-limits",),
}  # fmt: skip
"""What each license asks of works made from what it covers, by its SPDX identifier or the hub's name for it, in lower case."""

_SAME: dict[str, str] = {"cc0": "cc0-1.0", "odbl": "odbl-1.0", "psf": "psf-2.0"}
_COMPATIBLE = {*((f"{name}-or-later", name) for name in ("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0")), ("gpl-2.0-or-later", "gpl-3.0"),
               ("cc-by-sa-4.0", "gpl-3.0"), ("mpl-2.0", "gpl-3.0"), ("mpl-2.0", "lgpl-3.0"), ("mpl-2.0", "agpl-3.0"), ("gpl-3.0", "agpl-3.0"),
               ("lgpl-2.1", "gpl-2.0"), ("lgpl-2.1", "gpl-3.0"), ("lgpl-3.0", "gpl-3.0"), ("lgpl-3.0", "agpl-3.0"), ("cc-by-sa-3.0", "cc-by-sa-4.0"),
               ("cc-by-sa-2.5", "cc-by-sa-4.0"), ("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0")}  # fmt: skip
"""(from, to): licenses whose texts allow works made from `from` to be under `to`."""


@dataclass(frozen=True)
class Finding:
    """What may be said of a license against one that it must respect."""

    answer: Literal["ok", "conflict", "review"]
    rule: str
    """The rule that fired, as a sentence."""


def canonical(text: str | None) -> str | None:
    """A license as the table names it: lower case, dashes, no '-only', '-or-later' for '-plus'; None for nothing."""
    if text is None or not text.strip():
        return None
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    name = re.sub(r"-(only|license|international)$", "", re.sub(r"(-plus|\+)$", "-or-later", name) if "gpl" in name else name)
    return _SAME.get(name, name)


def known(license: str | None) -> bool:
    """Whether the table knows it."""
    return canonical(license) in FAMILIES


def check(child: str | None, parent: str | None) -> Finding:
    """May a work made from something under `parent` be under `child`?"""
    mine, theirs = canonical(child), canonical(parent)
    for name, whose in ((mine, "what was made"), (theirs, "what it was made from")):
        if name is None:
            return Finding("review", f"no license is known for {whose}")
        if name not in FAMILIES:
            return Finding("review", f"'{name}' is not in the table of licenses")
    assert mine is not None and theirs is not None
    asked, given = FAMILIES[theirs], FAMILIES[mine]
    if "no-derivatives" in asked:
        return Finding("conflict", f"{theirs} allows no works made from it")
    if mine == theirs or (theirs, mine) in _COMPATIBLE:
        return Finding("ok", f"{theirs} allows {mine}")
    rules: tuple[tuple[bool, str], ...] = (
        ("non-commercial" in asked and "non-commercial" not in given, f"{theirs} forbids commercial use and {mine} allows it"),
        ("share-alike" in asked, f"{theirs} asks that works made from it stay under it, and {mine} is another license"),
        ("copyleft" in asked, f"{theirs} asks that works made from it stay under it, and {mine} is another license"),
        ("weak-copyleft" in asked and "copyleft" not in given, f"{theirs} asks that changed parts stay under it, and {mine} is another license"),
        ("use-limits" in asked and "use-limits" not in given, f"{theirs} limits uses and asks that the limits are passed on, and {mine} has none"),
    )
    for broken, rule in rules:
        if broken:
            return Finding("conflict", rule)
    return Finding("ok", f"{theirs} asks for nothing that {mine} does not grant")


def along(child: str | None, parents: Mapping[str, str | None]) -> dict[str, Finding]:
    """`check` against each of several works, by their names."""
    return {name: check(child, license) for name, license in parents.items()}


def worst(findings: Iterable[Finding]) -> Finding | None:
    """The finding that matters most: a conflict, else something to review, else a fine one."""
    return min(findings, key=lambda finding: ("conflict", "review", "ok").index(finding.answer), default=None)


def corpus_license(corpus: str) -> str | None:
    """License of what a recipe reads: of a named data set or of Python's own files; None for files of the user's."""
    from cairn.data import datasets

    if corpus in ("python-docs", "python-source"):
        return "psf-2.0 and the licenses of the installed packages"
    found = datasets.known().get(corpus)
    if found is None:
        return None
    # Remarks stand in brackets; whatever is more than one license stays as it is written, unknown to the table.
    words = re.sub(r"\s*\(.*?\)", "", found.license)
    return "public-domain" if words.startswith("public domain") else canonical(words)
