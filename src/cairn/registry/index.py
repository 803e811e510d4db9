"""The index: one SQLite file that says what lies in any number of folders. It is a copy: the directories are the truth, and it is made again from them.

    with Index() as index:
        index.add("runs/")                  # what has not changed since is not opened again
        query.find(index, "family:llama step>100 license:apache-2.0")

Refreshing walks the directories and opens what is new or changed; whatever is gone is forgotten.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cairn import cache
from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.place import place
from cairn.errors import CairnError, InputError, NotFoundError
from cairn.registry import record as records
from cairn.registry import scan
from cairn.registry.record import CheckpointRecord, Fact
from cairn.registry.statements import Claim
from cairn.training import loggers

VERSION = 2
"""Of the tables; an index of another version is made again."""

_TABLES = """
CREATE TABLE IF NOT EXISTS roots (path TEXT PRIMARY KEY, seconds REAL);
CREATE TABLE IF NOT EXISTS runs (key TEXT PRIMARY KEY, root TEXT, path TEXT, name TEXT, recipe TEXT, step INTEGER,
  unit TEXT, units INTEGER, total_units INTEGER, loss REAL, updated REAL, fingerprint TEXT);
CREATE TABLE IF NOT EXISTS checkpoints (key TEXT PRIMARY KEY, root TEXT, path TEXT, run TEXT, title TEXT, digest TEXT, model_digest TEXT, family TEXT,
  architecture TEXT, step INTEGER, tokens INTEGER, samples INTEGER,
  parameters INTEGER, bytes INTEGER, created TEXT, act TEXT, license TEXT, resumable INTEGER, home TEXT,
  fingerprint TEXT);
CREATE INDEX IF NOT EXISTS by_digest ON checkpoints (digest);
CREATE INDEX IF NOT EXISTS by_model ON checkpoints (model_digest);
CREATE INDEX IF NOT EXISTS by_run ON checkpoints (run, step);
CREATE TABLE IF NOT EXISTS facts (key TEXT, field TEXT, value TEXT, how TEXT, PRIMARY KEY (key, field)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (key TEXT, name TEXT, bytes INTEGER, digest TEXT, PRIMARY KEY (key, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parents (key TEXT, position INTEGER, digest TEXT, step INTEGER, hint TEXT, PRIMARY KEY (key, position)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_parent ON parents (digest);
CREATE TABLE IF NOT EXISTS claims (key TEXT, position INTEGER, claim TEXT, PRIMARY KEY (key, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (home TEXT, model TEXT, task TEXT, metric TEXT, value REAL, stderr REAL, n INTEGER, chance REAL, protocol TEXT);
CREATE INDEX IF NOT EXISTS by_result ON results (home, model);
CREATE TABLE IF NOT EXISTS homes (path TEXT PRIMARY KEY, root TEXT, fingerprint TEXT);
CREATE TABLE IF NOT EXISTS problems (root TEXT, path TEXT PRIMARY KEY, fingerprint TEXT, problem TEXT);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(key UNINDEXED, text, prefix='2 3');
"""
_OF_CHECKPOINT = ("checkpoints", "facts", "files", "parents", "claims")


@dataclass(frozen=True)
class IndexReport:
    """What a refresh found."""

    runs: int
    checkpoints: int
    opened: int
    """Checkpoints that were new or changed."""
    forgotten: int
    problems: tuple[str, ...]
    seconds: float
    folders: tuple[str, ...] = ()


def default_path() -> Path:
    """Where the index lies unless another place is named: in the user's cache."""
    return cache.directory() / "registry" / "index.sqlite"


class Index:
    """An open index. Used as a context, or closed by `close`; several processes may read while one refreshes."""

    def __init__(self, path: str | Path | None = None, *, readonly: bool = False) -> None:
        """Open the index at `path` (default: the user's own), made if it is not there. Raises `InputError` for a file that is no index.

        `readonly` opens one that is there for asking alone; then nothing that is asked can change it.
        """
        self.path = Path(path) if path is not None else default_path()
        if readonly:
            if not self.path.is_file():
                raise NotFoundError(f"There is no index {self.path}; `cairn index FOLDER` makes one.")
            self.db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
            self.db.row_factory = sqlite3.Row
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.db = sqlite3.connect(self.path, timeout=30)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode = WAL")
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                self._drop()
            self.db.executescript(_TABLES)
            self.db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path} is not an index of cairn ({error}); remove it, or name another file.") from None

    def close(self) -> None:
        """Let go of the file."""
        self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- filling --------------------------------------------------------------------------------------------------

    def add(self, folder: str | Path, progress: Callable[[str], object] | None = None) -> IndexReport:
        """Index a folder with everything under it; once added, `refresh` keeps it up to date. Raises `NotFoundError` or `InputError`."""
        path = place(folder)
        if not isinstance(path, Path):
            raise InputError(f"{folder} is in a store; the index reads folders on this machine.")
        if not path.is_dir():
            raise NotFoundError(f"There is no folder {path}.")
        root = path.resolve()
        for other in self.roots():
            if root != other and root.is_relative_to(other):
                return self.refresh([other], progress)
            if other != root and other.is_relative_to(root):
                self.forget(other)
        with self.db:
            self.db.execute("INSERT OR IGNORE INTO roots VALUES (?, 0)", (str(root),))
        return self.refresh([root], progress)

    def roots(self) -> list[Path]:
        """The folders that are indexed."""
        return [Path(row["path"]) for row in self.db.execute("SELECT path FROM roots ORDER BY path")]

    def forget(self, root: Path) -> None:
        """Take a folder out of the index; nothing happens to the folder."""
        with self.db:
            for (key,) in self.db.execute("SELECT key FROM checkpoints WHERE root = ?", (str(root),)).fetchall():
                self._remove(key)
            for table in ("runs", "homes", "problems"):
                self.db.execute(f"DELETE FROM {table} WHERE root = ?", (str(root),))
            self.db.execute("DELETE FROM roots WHERE path = ?", (str(root),))
            self._drop_loose_results()

    def rebuild(self, progress: Callable[[str], object] | None = None) -> IndexReport:
        """Forget everything and read all folders anew."""
        roots = self.roots()
        self._drop()
        self.db.executescript(_TABLES)
        with self.db:
            self.db.executemany("INSERT INTO roots VALUES (?, 0)", [(str(root),) for root in roots])
        return self.refresh(None, progress)

    def refresh(self, roots: Iterable[Path] | None = None, progress: Callable[[str], object] | None = None) -> IndexReport:
        """Look through the folders (default: all) for what is new, changed or gone."""
        began = time.perf_counter()
        opened = forgotten = 0
        for root in self.roots() if roots is None else roots:
            with self.db:
                new, gone = self._refresh(root, progress)
                self.db.execute("UPDATE roots SET seconds = ? WHERE path = ?", (time.time(), str(root)))
            opened, forgotten = opened + new, forgotten + gone
        with self.db:
            self._refuse_circles()
        counts = [self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("runs", "checkpoints")]
        problems = tuple(f"{row['path']}: {row['problem']}" for row in self.db.execute("SELECT path, problem FROM problems ORDER BY path"))
        return IndexReport(counts[0], counts[1], opened, forgotten, problems, time.perf_counter() - began, tuple(map(str, self.roots())))

    def _refresh(self, root: Path, progress: Callable[[str], object] | None) -> tuple[int, int]:
        known: dict[str, str] = {}
        for table in ("runs", "checkpoints", "problems"):
            known |= {row["path"]: row["fingerprint"] for row in self.db.execute(f"SELECT path, fingerprint FROM {table} WHERE root = ?", (str(root),))}
        seen, homes, opened = set(), set(), 0
        for found in scan.places(root):
            path = _shown(found.path)
            seen.add(path)
            if known.get(path) != found.fingerprint:
                opened += found.kind != "run"
                if progress is not None and opened and opened % 100 == 0:
                    progress(f"{opened} checkpoints read")
                self._open(root, found)
            if path == str(found.path):
                homes.add(scan.home_of(found.path) if found.kind != "run" else found.path)
        gone = [path for path in known if path not in seen and Path(path).parent.name != "results"]
        for path in gone:
            self._remove(records.key_of(Path(path)))
            self.db.execute("DELETE FROM runs WHERE path = ?", (path,))
            self.db.execute("DELETE FROM problems WHERE path = ?", (path,))
        self._refresh_results(root, homes)
        return opened, len(gone)

    def _open(self, root: Path, found: scan.ScannedFolder) -> None:
        """Enter one run or checkpoint. A directory that others made may hold anything: one that cannot be understood is named as a problem,
        and the rest is indexed."""
        shown = _shown(found.path)
        self.db.execute("DELETE FROM problems WHERE path = ?", (shown,))
        try:
            if shown != str(found.path):
                raise InputError("its name is not text")
            self._remove(records.key_of(found.path))
            if found.kind == "run":
                self._put_run(root, found)
            else:
                scan.refuse_ways_out(root, found.path)
                self._put(root, records.record(read.open(found.path)), found.fingerprint)
        except Exception as error:
            own = isinstance(error, (CairnError, OSError))
            sentence = str(error).removeprefix(f"{found.path}: ") if own else f"cannot be understood ({type(error).__name__}: {error})"
            if shown == str(found.path):
                self._remove(records.key_of(found.path))
                self.db.execute("DELETE FROM runs WHERE path = ?", (shown,))
            sentence = sentence.encode("utf-8", "backslashreplace").decode()
            self.db.execute("INSERT OR REPLACE INTO problems VALUES (?, ?, ?, ?)", (str(root), shown, found.fingerprint, sentence))

    def _put(self, root: Path, found: CheckpointRecord, fingerprint: str) -> None:
        value = found.value
        run = records.key_of(found.run) if found.run is not None else None
        columns = (found.key, str(root), str(found.path), run, found.title, found.digest, found.model_digest, value("family"), value("architecture"),
                   value("step"), value("tokens"), value("samples"), value("parameters"), value("bytes"), value("created"), value("act"), value("license"),
                   value("resumable"), str(scan.home_of(found.path)), fingerprint)  # fmt: skip
        self.db.execute(f"INSERT INTO checkpoints VALUES ({', '.join('?' * len(columns))})", columns)
        self.db.executemany("INSERT INTO facts VALUES (?, ?, ?, ?)", [(found.key, f.field, json.dumps(f.value), f.how) for f in found.facts.values()])
        self.db.executemany("INSERT INTO files VALUES (?, ?, ?, ?)", [(found.key, name, size, digest) for name, (size, digest) in found.files.items()])
        self.db.executemany("INSERT INTO parents VALUES (?, ?, ?, ?, ?)", [(found.key, place, *parent) for place, parent in enumerate(found.parents)])
        self.db.executemany("INSERT INTO claims VALUES (?, ?, ?)", [(found.key, i, json.dumps(c.model_dump(mode="json"))) for i, c in enumerate(found.claims)])
        spoken = [found.title, str(found.path), *(str(value(name) or "") for name in ("family", "act", "license", "intended_use", "limitations"))]
        spoken += [*(value("data") or {}), *(value("data") or {}).values(), *(value("changed") or []), *map(str, value("language") or [])]
        self.db.execute("INSERT INTO words (rowid, key, text) VALUES (?, ?, ?)", (_row_id(found.key), found.key, " ".join(spoken)))

    def _put_run(self, root: Path, found: scan.ScannedFolder) -> None:
        try:
            recipe = documents.parse_yaml(documents.read_text(found.path / "recipe.yaml"), found.path / "recipe.yaml")
            recipe = recipe if isinstance(recipe, dict) else {}
            written = json.dumps(recipe, default=str)
        except (OSError, TypeError, ValueError, RecursionError, yaml.YAMLError, CairnError):
            recipe, written = {}, "{}"
        last, (unit, total) = scan.last_row(found.path / loggers.METRICS), scan.length_of(recipe)
        updated = (found.path / loggers.METRICS).stat().st_mtime if (found.path / loggers.METRICS).exists() else None
        columns = (records.key_of(found.path), str(root), str(found.path), records.name_of(found.path), written, last.get("step"),
                   unit, last.get(unit), total, last.get("loss"), updated, found.fingerprint)  # fmt: skip
        self.db.execute(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(columns))})", columns)

    def _refresh_results(self, root: Path, homes: set[Path]) -> None:
        known = {row["path"]: row["fingerprint"] for row in self.db.execute("SELECT path, fingerprint FROM homes WHERE root = ?", (str(root),))}
        for home in homes:
            fingerprint = scan.folder_fingerprint(home / "results")
            if known.get(str(home)) == fingerprint:
                continue
            self.db.execute("DELETE FROM results WHERE home = ?", (str(home),))
            rows, problems = scan.results_in(home / "results")
            self.db.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [(str(home), *row) for row in rows])
            self._drop_problems_of_results(home)
            named = [(str(root), str(path), fingerprint, f"{problem.rstrip('.')}; passed over") for path, problem in problems.items()]
            self.db.executemany("INSERT OR REPLACE INTO problems VALUES (?, ?, ?, ?)", named)
            self.db.execute("INSERT OR REPLACE INTO homes VALUES (?, ?, ?)", (str(home), str(root), fingerprint))
        for path in set(known) - {str(home) for home in homes}:
            self.db.execute("DELETE FROM homes WHERE path = ?", (path,))
            self._drop_problems_of_results(Path(path))
        self._drop_loose_results()

    def _drop_problems_of_results(self, home: Path) -> None:
        for (path,) in self.db.execute("SELECT path FROM problems").fetchall():
            if Path(path).parent == home / "results":
                self.db.execute("DELETE FROM problems WHERE path = ?", (path,))

    def _drop_loose_results(self) -> None:
        self.db.execute("DELETE FROM results WHERE home NOT IN (SELECT path FROM homes)")

    def _remove(self, key: str) -> None:
        for table in _OF_CHECKPOINT:
            self.db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
        self.db.execute("DELETE FROM words WHERE rowid = ?", (_row_id(key),))

    def _drop(self) -> None:
        for table in (*_OF_CHECKPOINT, "words", "roots", "runs", "results", "homes", "problems"):
            self.db.execute(f"DROP TABLE IF EXISTS {table}")

    def _refuse_circles(self) -> None:
        """A descent that leads back to itself is refused: its edges are taken out and the checkpoint is listed as a problem."""
        from cairn.registry.descent import in_circles

        edges = [(row["child"], row["parent"]) for row in self.db.execute(_EDGES)]
        for digest in in_circles(edges):
            for row in self.db.execute("SELECT key, path, root, fingerprint FROM checkpoints WHERE digest = ?", (digest,)).fetchall():
                self.db.execute("DELETE FROM parents WHERE key = ?", (row["key"],))
                sentence = "its lineage leads back to itself, so its parents are not believed"
                self.db.execute("INSERT OR REPLACE INTO problems VALUES (?, ?, ?, ?)", (row["root"], row["path"], row["fingerprint"], sentence))

    # -- asking ---------------------------------------------------------------------------------------------------

    def rows(self, sql: str, arguments: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query as mappings."""
        return [dict(row) for row in self.db.execute(sql, tuple(arguments))]

    def row(self, sql: str, arguments: Iterable[Any] = ()) -> dict[str, Any] | None:
        """The first row of a query, or None."""
        found = self.db.execute(sql, tuple(arguments)).fetchone()
        return dict(found) if found is not None else None

    def facts(self, key: str) -> dict[str, Fact]:
        """The facts of one checkpoint, by field."""
        return {r["field"]: Fact(r["field"], json.loads(r["value"]), r["how"]) for r in self.rows("SELECT * FROM facts WHERE key = ?", (key,))}

    def claims(self, key: str) -> list[Claim]:
        """The claims on one checkpoint."""
        return [Claim.model_validate_json(row["claim"]) for row in self.rows("SELECT claim FROM claims WHERE key = ? ORDER BY position", (key,))]

    def results(self, key: str) -> list[dict[str, Any]]:
        """What was measured of one checkpoint, wherever the same model was measured."""
        sql = "SELECT DISTINCT task, metric, value, stderr, n, chance, protocol FROM results WHERE model = (SELECT model_digest FROM checkpoints WHERE key = ?)"
        return self.rows(f"{sql} ORDER BY task, metric", (key,))

    def edges(self) -> list[tuple[str, str]]:
        """(child, parent) digests of the whole lineage graph."""
        return [(row["child"], row["parent"]) for row in self.db.execute(_EDGES)]


_EDGES = "SELECT DISTINCT c.digest AS child, p.digest AS parent FROM parents p JOIN checkpoints c ON c.key = p.key ORDER BY child, parent"


@contextlib.contextmanager
def opened(folders: Iterable[str | Path] = (), path: str | Path | None = None) -> Iterator[Index]:
    """An index of these folders, up to date; without folders, of all that were ever added."""
    with Index(path) as index:
        named = list(folders)
        for folder in named:
            index.add(folder)
        if not named:
            index.refresh()
        yield index


def index(
    folders: Iterable[str | Path] = (),
    *,
    file: str | Path | None = None,
    rebuild: bool = False,
    forget: bool = False,
    progress: Callable[[str], object] | None = None,
) -> IndexReport:
    """Index folders, so that their runs and checkpoints can be searched and looked at; only what is new or changed is opened.

    Parameters
    ----------
    folders
        Folders on this machine, with everything under them; without any, those that are indexed are refreshed.
    file
        The index to use; default: the user's own.
    rebuild
        Forget everything and read all folders anew.
    forget
        Take the folders out of the index; nothing happens to them.

    Returns
    -------
    IndexReport
        Counts, and `problems`: what was passed over, by name, and why.

    Raises
    ------
    NotFoundError, InputError
        For a folder that does not exist, or is in a store, or a file that is no index.

    Examples
    --------
    >>> cairn.index(["runs"]).checkpoints  # doctest: +SKIP
    24
    """
    named = list(folders)
    with Index(file) as opened:
        for folder in named:
            opened.forget(Path(folder).resolve()) if forget else opened.add(folder, progress)
        return opened.rebuild(progress) if rebuild else opened.refresh(None, progress)


def _shown(path: Path) -> str:
    """A path as text that can be stored and shown: bytes that are no text are written out."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _row_id(key: str) -> int:
    """The number of a checkpoint's row in the table of words, which finds rows by number alone."""
    return int(key, 16) >> 1
