"""Searching the index: words, and conditions on fields.

llama books                     both words, or beginnings of words, in name, path, license, data, what is said of it
family:llama act:merge          a field that contains this
step>=100 tokens<2B             a number; sizes as people write them
blimp:accuracy>0.7              what was measured, as TASK:METRIC
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cairn.errors import InputError, suggestion
from cairn.options import Bytes, Count
from cairn.registry.index import Index

TEXTS = {"family": "family", "act": "act", "license": "license", "path": "path", "name": "title", "digest": "digest", "created": "created",
         "architecture": "architecture"}  # fmt: skip
NUMBERS = {"step": "step", "tokens": "tokens", "samples": "samples", "parameters": "parameters", "bytes": "bytes"}
MOST_PARTS = 50
"""Words and conditions of one query."""
_CONDITION = re.compile(r"([A-Za-z_-]+(?::[A-Za-z0-9_.-]+)?)(<=|>=|=|<|>)(\S+)|([A-Za-z_-]+):(\S+)")
COLUMNS = (
    "key",
    "title",
    "path",
    "digest",
    "model_digest",
    "family",
    "step",
    "tokens",
    "samples",
    "parameters",
    "bytes",
    "created",
    "act",
    "license",
    "resumable",
)


@dataclass(frozen=True)
class Condition:
    """One part of a query: as people wrote it, and as SQL over a row of `checkpoints`."""

    text: str
    sql: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class QueryResult:
    """Checkpoints that fit, newest first, how many there are in all, and what each condition alone leaves out."""

    rows: list[dict[str, Any]]
    total: int
    indexed: int
    left_out: dict[str, int]


def parse(query: str) -> list[Condition]:
    """The conditions of a query. Raises `InputError` that names the nearest field for one that does not exist."""
    if not "".join(query.split()).isprintable():
        raise InputError("A query is made of words and conditions; this one holds characters that cannot be printed.")
    parts = query.split()
    if len(parts) > MOST_PARTS:
        raise InputError(f"A query has at most {MOST_PARTS} words and conditions, not {len(parts)}.")
    return [_condition(part) for part in parts]


def _condition(part: str) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        word = part.replace('"', '""')
        return Condition(part, "key IN (SELECT key FROM words WHERE words MATCH ?)", (f'"{word}"*',))
    name, sign, value = match[1] or match[4], match[2] or ":", match[3] or match[5]
    if sign == ":" or (sign == "=" and name in TEXTS):
        if name == "run":
            return Condition(part, "run IN (SELECT key FROM runs WHERE instr(lower(name), lower(?)))", (value,))
        if name not in TEXTS:
            raise InputError(f"There is no field '{name}' to search.{suggestion(name, [*TEXTS, *NUMBERS, 'run'])}")
        return Condition(part, f"instr(lower(ifnull({TEXTS[name]}, '')), lower(?))", (value,))
    if ":" in name:
        task, _, metric = name.partition(":")
        within = f"SELECT model FROM results WHERE task = ? AND metric = ? AND value {sign} ?"
        return Condition(part, f"model_digest IN ({within})", (task, metric, _number(part, value)))
    if name not in NUMBERS:
        raise InputError(f"There is no number '{name}' to search; what was measured is written TASK:METRIC{sign}{value}.{suggestion(name, NUMBERS)}")
    return Condition(part, f"{NUMBERS[name]} {sign} ?", (_number(part, value, size=name == "bytes"),))


def _number(part: str, value: str, size: bool = False) -> float:
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return float(TypeAdapter(Bytes if size else Count).validate_python(value))
    except ValidationError:
        raise InputError(f"'{part}': '{value}' is not a number; write for example 0.7, 4k or 20B.") from None


def search(query: str = "", *, within: str | Path | None = None, file: str | Path | None = None, limit: int = 50) -> QueryResult:
    """Find indexed checkpoints by words and by conditions such as `family:llama`, `step>=100`, `held-out:loss<3`.

    Parameters
    ----------
    query
        Words and conditions; all must hold.
    within
        Only checkpoints under this folder.
    file
        The index to search; default: the user's own.
    limit
        How many to return.

    Returns
    -------
    QueryResult
        Rows, newest first, and how many each condition leaves out where none is left.

    Raises
    ------
    InputError
        For a condition on a field that does not exist.

    Examples
    --------
    >>> cairn.search("llama step>=100").total  # doctest: +SKIP
    12
    """
    with Index(file) as opened:
        return find(opened, query, limit=limit, within=within)


def find(index: Index, query: str = "", *, limit: int = 50, within: str | Path | None = None) -> QueryResult:
    """Checkpoints that fit every part of `query`, newest first; only those under the folder `within`, if one is named."""
    conditions = parse(query)
    if within is not None:
        folder = str(Path(within).resolve())
        conditions.append(Condition(f"within {within}", "(path = ? OR substr(path, 1, ?) = ?)", (folder, len(folder) + 1, f"{folder}/")))
    sql, arguments = _where(conditions)
    rows = index.rows(f"SELECT {', '.join(COLUMNS)} FROM checkpoints WHERE {sql} ORDER BY created DESC, step DESC, path LIMIT ?", [*arguments, limit])
    total = _count(index, conditions)
    indexed = _count(index, [])
    # Only where a query leaves nothing is it worth knowing which part of it did that.
    left_out = {c.text: indexed - _count(index, [c]) for c in conditions} if not total else {}
    return QueryResult(rows, total, indexed, left_out)


def _where(conditions: Sequence[Condition]) -> tuple[str, list[Any]]:
    return " AND ".join(c.sql for c in conditions) or "1", [argument for c in conditions for argument in c.arguments]


def _count(index: Index, conditions: Sequence[Condition]) -> int:
    sql, arguments = _where(conditions)
    return int(index.rows(f"SELECT count(*) AS n FROM checkpoints WHERE {sql}", arguments)[0]["n"])
