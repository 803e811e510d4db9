"""What each page shows, gathered from the index and from small files of the indexed folders; no HTML here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import read
from cairn.checkpoint.format.carried import chat_template
from cairn.errors import CairnError, DamagedError, NotFoundError
from cairn.registry import attributes, card, claims, compare, descent, query, record, risks, scan, statements
from cairn.registry.index import Index
from cairn.registry.web import charts
from cairn.registry.web.charts import Node, Series
from cairn.training import loggers

FRESH = 90.0
"""Seconds since its last row in which a run that is not finished counts as running."""
GENERATIONS, MOST_STATES, MOST_BOXES = 500, 1000, 80
"""How far a lineage page looks each way, how many states it looks at, and how many boxes it draws."""

Values = dict[str, Any]


def overview(index: Index) -> Values:
    """Counts, runs that are going on, what was made last, what is unsound."""
    counts = index.row("SELECT count(*) AS checkpoints, count(DISTINCT digest) AS states, ifnull(sum(bytes), 0) AS bytes FROM checkpoints") or {}
    problems = index.rows("SELECT path, problem FROM problems ORDER BY path LIMIT 50")
    going = [run for run in runs(index)["runs"] if run["running"]]
    measured = index.rows("SELECT count(*) AS n FROM (SELECT DISTINCT model, task, metric, protocol FROM results)")[0]["n"]
    return {"counts": counts, "measured": measured, "folders": index.roots(), "problems": problems, "going": going, "found": query.find(index, limit=12)}


def runs(index: Index) -> Values:
    """Every run: how far, how well, whether it goes on."""
    sql = (
        "SELECT r.*, count(c.key) AS checkpoints FROM runs r LEFT JOIN checkpoints c ON c.run = r.key GROUP BY r.key "
        "ORDER BY r.updated IS NULL, r.updated DESC, r.path LIMIT 500"
    )
    found = index.rows(sql)
    for row in found:
        row["running"] = is_running(row)
        row["share"] = min(1.0, row["units"] / row["total_units"]) if row["units"] and row["total_units"] else None
    return {"runs": found}


def is_running(run: Values, now: float | None = None) -> bool:
    """Whether a run writes rows and has not come to its end."""
    if not _is_number(run["units"] or 0):
        return False
    fresh = run["updated"] is not None and (now if now is not None else time.time()) - run["updated"] < FRESH
    return fresh and (run["total_units"] is None or (run["units"] or 0) < run["total_units"])


def run(index: Index, key: str) -> Values:
    """One run: recipe, checkpoints, samples; its curves come apart, since they move."""
    found = _one(index, "runs", key)
    path = Path(found["path"])
    rows = index.rows(f"SELECT {', '.join(query.COLUMNS)} FROM checkpoints WHERE run = ? ORDER BY step", (key,))
    samples = _samples(index, path)[-6:]
    return {"run": found | {"running": is_running(found)}, "rows": rows, "samples": samples[::-1], "recipe": json.loads(found["recipe"]), **live(index, key)}


def live(index: Index, key: str) -> Values:
    """The curves of a run as they stand now, straight from its rows."""
    found = _one(index, "runs", key)
    path = Path(found["path"]) / loggers.METRICS
    rows = _rows(path) if within(index, path) else []
    last, unit = rows[-1] if rows else {}, found["unit"]
    found |= {"step": last.get("step", found["step"]), "units": last.get(unit, found["units"]), "loss": last.get("loss")}
    found["updated"] = path.stat().st_mtime if path.exists() else found["updated"]
    shown = [charts.lines("loss", [_series(rows, "loss", "training", unit), _series(rows, "held-out/loss", "held out", unit, marks=True)], unit)]
    shown += [
        charts.lines(f"{unit} per second", [_series(rows, f"{unit}_per_second", "rate", unit)], unit),
        charts.lines("learning rate", [_series(rows, "learning_rate", "rate", unit)], unit),
    ]
    others = sorted({name for row in rows[-50:] for name in row if "/" in name and name != "held-out/loss"})
    shown += [charts.lines(name, [_series(rows, name, name.rpartition("/")[2], unit, marks=True)], unit) for name in others[:12]]
    shown += _measured(index, key, unit)
    rate, done = (value if _is_number(value) else None for value in (last.get(f"{unit}_per_second"), last.get(unit)))
    left = (found["total_units"] - done) / rate if found["total_units"] and rate and done is not None else None
    return {"now": found | {"running": is_running(found), "rate": rate, "left": left}, "charts": shown}


def _samples(index: Index, run: Path | None) -> list[Values]:
    """What a run wrote as it learned; lines that say something else are passed over."""
    if run is None or not within(index, run / loggers.SAMPLES):
        return []
    try:
        rows = list(loggers.read_rows(run / loggers.SAMPLES))
    except ValueError:
        return []
    return [r for r in rows if isinstance(r, dict) and {"step", "prompt", "text"} <= set(r)]


def _example(kept: Values | None) -> Values | None:
    """A stored example, if it is one."""
    example = (kept or {}).get("example")
    tokens = example.get("top") if isinstance(example, dict) and "prompt" in example else None
    sound = isinstance(tokens, list) and all(isinstance(t, dict) and "text" in t and _is_number(t.get("probability")) for t in tokens)
    return kept if sound else None


_seen: dict[str, tuple[tuple[int, int], list[Values]]] = {}


def _rows(path: Path) -> list[Values]:
    """The rows of metrics.jsonl; read anew only when the file has changed."""
    try:
        stat = path.stat()
    except OSError:
        return []
    mark = (stat.st_size, stat.st_mtime_ns)
    if _seen.get(str(path), (None,))[0] != mark:
        if len(_seen) > 32:
            _seen.clear()
        try:
            _seen[str(path)] = mark, [row for row in loggers.read_rows(path) if isinstance(row, dict)]
        except (ValueError, RecursionError):
            _seen[str(path)] = mark, []
    return _seen[str(path)][1]


def _series(rows: Sequence[Values], name: str, shown: str, unit: str, *, marks: bool = False) -> Series:
    points = [(float(row[unit]), float(row[name])) for row in rows if _is_number(row.get(unit)) and _is_number(row.get(name))]
    return Series(shown, points, marks=marks)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _measured(index: Index, key: str, unit: str) -> list[str]:
    """What was measured of the checkpoints of a run, over their tokens (or samples), with 95 % bands."""
    sql = (
        "SELECT ifnull(c.tokens, c.samples) AS units, r.task, r.metric, r.value, r.stderr, r.n, r.protocol FROM checkpoints c "
        "JOIN results r ON r.model = c.model_digest AND r.home = c.home WHERE c.run = ? AND units IS NOT NULL ORDER BY units"
    )
    groups: dict[tuple[str, str, str], list[Values]] = {}
    for row in index.rows(sql, (key,)):
        groups.setdefault((row["task"], row["metric"], row["protocol"]), []).append(row)
    found = []
    for (task, metric, _), rows in list(groups.items())[:12]:
        points = [(float(row["units"]), float(row["value"])) for row in rows if _is_number(row["value"])]
        band = [
            tuple(edge if edge is not None else row["value"] for edge in compare.interval(row["value"], row["stderr"], row["n"]))
            for row in rows
            if _is_number(row["value"])
        ]
        found.append(charts.lines(f"measured: {task}, {metric}", [Series(metric, points, band, marks=True)], unit))  # type: ignore[arg-type]
    return found


def checkpoints(index: Index, text: str) -> Values:
    """What a search finds."""
    return {"query": text, "found": query.find(index, text, limit=200)}


def checkpoint(index: Index, key: str) -> Values:
    """One checkpoint: facts by how they are known, results with intervals, claims against them, what people ask before reuse."""
    found = _one(index, "checkpoints", key)
    facts = index.facts(key)
    results = index.results(key)
    for row in results:
        row["low"], row["high"] = compare.interval(row["value"], row["stderr"], row["n"])
    opened = open_inside(index, key)
    kept, damaged = _kept(opened)
    made = record.CheckpointRecord(
        Path(found["path"]), key, record.run_of(Path(found["path"])), found["digest"], found["model_digest"], facts, claims=index.claims(key)
    )
    seconds = scan.last_row(made.run / loggers.METRICS).get("seconds") if made.run is not None else None
    evidence = attributes.evidence_of(made, results=len(results), kept={**kept, "seconds": seconds})
    samples = [sample for sample in _samples(index, made.run) if sample["step"] == found["step"]]
    return {
        "it": found,
        "facts": {how: {f.field: f.value for f in facts.values() if f.how == how and f.field != "recipe"} for how in ("measured", "derived", "stated")},
        "files": index.rows("SELECT * FROM files WHERE key = ? ORDER BY name", (key,)),
        "results": results,
        "audits": claims.against_results(made.claims, results),
        "attributes": attributes.vector(evidence),
        "kept": kept,
        "damaged": damaged,
        "chats": _chats(opened),
        "samples": samples,
        "parents": [p | {"row": _at(index, p["digest"])} for p in index.rows("SELECT * FROM parents WHERE key = ? ORDER BY position", (key,))],
        "children": index.rows(
            "SELECT DISTINCT c.key, c.title, c.act FROM parents p JOIN checkpoints c ON c.key = p.key WHERE p.digest = ? LIMIT 50", (found["digest"],)
        ),
        "copies": index.rows("SELECT key, title, path FROM checkpoints WHERE digest = ? AND key != ? LIMIT 20", (found["digest"], key)),
    }


def _chats(opened: read.Checkpoint) -> bool:
    """Whether a checkpoint carries a chat template; one that is damaged shows when it is used."""
    try:
        return chat_template(opened) is not None
    except CairnError:
        return False


def _kept(opened: read.Checkpoint) -> tuple[Values, list[str]]:
    """The small documents that are kept on a checkpoint, and what is wrong with those that are damaged."""
    kept: Values = {}
    damaged = []
    for name in ("example", "portability", "replay"):
        try:
            kept[name] = statements.kept(opened, name)
        except DamagedError as error:
            kept[name] = None
            damaged.append(str(error))
    return kept | {"example": _example(kept["example"])}, damaged


def card_of(index: Index, key: str) -> Values:
    """The card as Markdown, rendered without any HTML of its own, and its score."""
    from markdown_it import MarkdownIt

    from cairn.registry import modelcard

    text = card.card(open_inside(index, key))
    body = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image"]).render(modelcard.split(text)[1])
    return {"it": _one(index, "checkpoints", key), "front": modelcard.split(text)[0], "body": body, "score": modelcard.score(text)}


def risks_of(index: Index, key: str) -> Values:
    """The risks of a checkpoint, without reading every byte, and how many come from it."""
    found = _one(index, "checkpoints", key)
    open_inside(index, key)
    down = descent.neighbours((parent, child) for child, parent in index.edges())
    after = len(descent.reachable(down, found["digest"])) - 1
    return {"it": found, "risks": risks.audit(found["path"], contents=False), "descendants": after}


def lineage(index: Index, key: str) -> Values:
    """The graph around a checkpoint, each box a way to walk on; steps of one run between which nothing else begins are one box."""
    found = _one(index, "checkpoints", key)
    here, edges = found["digest"], index.edges()
    up, down = descent.neighbours(edges), descent.neighbours((parent, child) for child, parent in edges)
    above, below = (descent.reachable(way, here, limit=GENERATIONS) for way in (up, down))
    near = [digest for digest, _ in sorted({**above, **below}.items(), key=lambda item: item[1])][:MOST_STATES]
    rows = {digest: _at(index, digest) for digest in near}
    inside = [(child, parent) for child, parent in edges if child in rows and parent in rows]
    groups = descent.stretches(inside, {digest: row["run"] for digest, row in rows.items() if row is not None and digest != here}, keep=here)
    of = {digest: group[-1] for group in groups for digest in group}
    shown = list(dict.fromkeys(of.get(digest, digest) for digest in near))[:MOST_BOXES]
    nodes = {digest: _node(rows[digest], digest, digest == here) for digest in shown}
    for group in groups:
        if group[-1] in nodes:
            nodes[group[-1]] = _stretch([row for digest in group if (row := rows[digest]) is not None])
    drawn = dict.fromkeys((of.get(child, child), of.get(parent, parent)) for child, parent in inside)
    kept = [(child, parent) for child, parent in drawn if child != parent and child in nodes and parent in nodes]
    counts = {"ancestors": len(descent.reachable(up, here)) - 1, "descendants": len(descent.reachable(down, here)) - 1}
    return {"it": found, "graph": charts.graph(descent.layout(shown, kept), kept, nodes), "shown": len(shown), **counts}


def _stretch(rows: Sequence[Values]) -> Node:
    """One box for the checkpoints of a run between which nothing else begins, oldest first."""
    steps = [row["step"] for row in rows if row["step"] is not None]
    span = f"steps {steps[0]} to {steps[-1]}" if steps else f"{len(rows)} checkpoints"
    return Node(rows[-1]["title"].rpartition("/")[0] or rows[-1]["title"], f"{span}, {len(rows)} states", "run", f"/lineage/{rows[-1]['key']}")


def _node(row: Values | None, digest: str, here: bool) -> Node:
    if row is None:
        return Node(digest[:12], "not in these folders", "absent")
    act = row["act"] or "no lineage"
    kind, _, name = act.partition(": ")
    colour = "fork" if name == "fork" else kind if kind in ("run", "operation", "import") else "import"
    step = f", step {row['step']}" if row["step"] is not None else ""
    return Node(row["title"], f"{act}{step}", colour, f"/lineage/{row['key']}", here)


def comparison(index: Index, keys: Sequence[str], weights: bool) -> Values:
    """Several checkpoints side by side; of two also the distance of their weights, block by block, when it is asked for."""
    rows = [_one(index, "checkpoints", key) for key in keys]
    distances = None
    if weights and len(keys) == 2:
        from cairn.checkpoint.operating.diff import diff

        distances = diff(*(open_inside(index, key) for key in keys))
    return {"rows": rows, "table": compare.side_by_side(index, keys), "distances": distances}


def generate(index: Index, key: str, form: Callable[[str], str]) -> Values:
    """What the model of a checkpoint writes after the prompt of a form. Raises `InputError` for values that are no numbers or out of range."""
    from cairn.errors import InputError
    from cairn.generation.text import generate as write

    try:
        new, temperature, seed = int(form("new_tokens") or 64), float(form("temperature") or 0.8), int(form("seed") or 0)
    except ValueError:
        raise InputError("Tokens and seed are whole numbers, temperature is a number.") from None
    if not 1 <= new <= 400 or seed < 0 or not 0 <= temperature <= 10:
        raise InputError("Ask for 1 to 400 tokens, a temperature of 0 to 10 and a seed of 0 or more.")
    prompt, chat = form("prompt"), bool(form("chat"))
    text = write(open_inside(index, key), prompt, new_tokens=new, temperature=temperature, seed=seed, chat=chat)
    return {"prompt": prompt, "text": text, "chat": chat}


def open_inside(index: Index, key: str) -> read.Checkpoint:
    """The checkpoint behind a key. Raises `NotFoundError` where its place no longer lies inside an indexed folder."""
    path = Path(_one(index, "checkpoints", key)["path"])
    if not within(index, path):
        raise NotFoundError(f"{path} no longer lies inside an indexed folder.")
    return read.open(path)


def within(index: Index, path: Path) -> bool:
    """Whether a path, followed through every link, lies inside an indexed folder."""
    real = path.resolve()
    return any(real.is_relative_to(root) for root in index.roots())


def _one(index: Index, table: str, key: str) -> Values:
    found = index.row(f"SELECT * FROM {table} WHERE key = ?", (key,))
    if found is None:
        raise NotFoundError(f"Nothing is indexed under '{key}'.")
    return found


def _at(index: Index, digest: str) -> Values | None:
    return index.row("SELECT * FROM checkpoints WHERE digest = ? ORDER BY created, path LIMIT 1", (digest,))
