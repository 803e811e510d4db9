"""Kept results: where they lie, and one strict reader and writer.

Results lie in `results/` of the run, or beside the checkpoint; a checkpoint itself never changes. Where that is no place to write
(a hub's cache, which belongs to another program, or a directory that is read-only) they lie in the user's cache instead. A result
file may come from a stranger: what is not one is passed over, and named.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cairn import cache
from cairn.checkpoint.format import documents, lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import DamagedError, Notice

LARGEST = 2**62
"""Numbers that a table can hold."""


@dataclass(frozen=True)
class Score:
    """One number: what of which task, its standard error, on how many items, and what guessing would give."""

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    chance: float | None = None


@dataclass(frozen=True)
class Kept:
    """One file of results: scores of a model under a protocol."""

    model_digest: str
    protocol_digest: str
    protocol: dict[str, Any]
    scores: tuple[Score, ...]


def folder(checkpoint: Checkpoint) -> Path:
    """Where results of a checkpoint are kept: `results/` of its run, or beside it; of one in a hub's cache, in ours."""
    home = checkpoint.path.resolve().parent
    if any(part.startswith("models--") for part in home.parts) and "snapshots" in home.parts:
        return elsewhere(checkpoint)
    return (home.parent if home.name == "checkpoints" else home) / "results"


def elsewhere(checkpoint: Checkpoint) -> Path:
    """Where they are kept if the place beside the checkpoint is not to be written: in the user's cache, by the model's digest."""
    return cache.directory() / "beside" / checkpoint.model_digest[:32] / "results"


def name(checkpoint: Checkpoint, protocol_digest: str) -> str:
    """The file of a result: the beginnings of both digests."""
    return f"{checkpoint.model_digest[:16]}-{protocol_digest[:16]}.json"


def find(checkpoint: Checkpoint, file: str) -> Path:
    """The place of a kept file: beside the checkpoint, or elsewhere where it is only there."""
    beside, other = folder(checkpoint) / file, elsewhere(checkpoint) / file
    return other if not beside.exists() and other.exists() else beside


def read(path: Path) -> Kept:
    """The contents of a result file. Raises `FileNotFoundError`, and `DamagedError` for everything that is no sound result."""
    document = documents.parse(documents.read_bytes(path), path)
    scores = document.get("scores") if isinstance(document, dict) else None
    if not isinstance(scores, list) or not all(isinstance(document.get(key), str) for key in ("model_digest", "protocol_digest")):
        raise DamagedError(f"{path} is no file of results.")
    protocol = document.get("protocol")
    if not isinstance(protocol, dict):
        raise DamagedError(f"{path} does not say by which protocol it was measured.")
    return Kept(document["model_digest"], document["protocol_digest"], protocol, tuple(_score(each, path) for each in scores))


def _score(values: Any, path: Path) -> Score:
    """One score, every value of the kind that it has to be."""
    if not isinstance(values, dict) or not {"task", "metric", "value", "n"} <= set(values) <= {"task", "metric", "value", "stderr", "n", "chance"}:
        raise DamagedError(f"{path} holds a score that is not valid.")
    for key, kinds in {"task": str, "metric": str, "n": int}.items():
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise DamagedError(f"{path}: '{key}' of a score is {values[key]!r:.40}.")
    for key in ("value", "stderr", "chance"):
        number = values.get(key)
        if not (is_number(number) or number is None):
            raise DamagedError(f"{path}: '{key}' of a score is {number!r:.40}, not a finite number.")
    value, stderr = (math.nan if values.get(key) is None else float(values[key]) for key in ("value", "stderr"))
    return Score(values["task"], values["metric"], value, stderr, values["n"], values.get("chance"))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a table can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def within(home: Path) -> Iterator[tuple[Path, Kept | DamagedError]]:
    """Every result file of a folder with its contents, or with what is wrong with it."""
    # What was seen item by item lies there too, under longer names.
    for path in sorted(home.glob(f"{'?' * 16}-{'?' * 16}.json")):
        try:
            yield path, read(path)
        except DamagedError as error:
            yield path, error
        except OSError as error:
            yield path, DamagedError(f"{path} cannot be read: {error.strerror or error}.")


def of(checkpoint: Checkpoint) -> Iterator[Kept]:
    """What was measured of a checkpoint, wherever it is kept. A file that is no sound result is passed over and named."""
    for home in dict.fromkeys((folder(checkpoint), elsewhere(checkpoint))):
        for path, kept in within(home):
            if isinstance(kept, DamagedError):
                warnings.warn(Notice(f"{str(kept).rstrip('.')}; passed over."), stacklevel=2)
            elif kept.model_digest == checkpoint.model_digest and path.name.startswith(checkpoint.model_digest[:16]):
                yield kept


def there(checkpoint: Checkpoint, protocol_digest: str) -> bool:
    """Whether a result is kept."""
    return find(checkpoint, name(checkpoint, protocol_digest)).exists()


def stored(checkpoint: Checkpoint, protocol_digest: str) -> list[Score] | None:
    """The scores of a checkpoint under a protocol, if they are kept. A file that is damaged counts as none, and is named."""
    try:
        return list(read(find(checkpoint, name(checkpoint, protocol_digest))).scores)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        warnings.warn(Notice(f"{str(error).rstrip('.')}; measured anew."), stacklevel=2)
        return None


def keep(checkpoint: Checkpoint, protocol: Mapping[str, Any], digest: str, scores: Sequence[Score]) -> Path | None:
    """Keep scores beside the checkpoint, else in the user's cache, else nowhere; where it is not beside, that is said."""
    document = {
        "model_digest": checkpoint.model_digest,
        "protocol_digest": digest,
        "protocol": dict(protocol),
        "versions": lineage.versions(),
        "scores": [asdict(score) | {key: _plain(getattr(score, key)) for key in ("value", "stderr")} for score in scores],
    }
    return keep_file(checkpoint, name(checkpoint, digest), document)


def _plain(value: float) -> float | None:
    """A number as JSON can say it: None where there is none."""
    return value if math.isfinite(value) else None


def keep_file(checkpoint: Checkpoint, file: str, document: Mapping[str, Any]) -> Path | None:
    """Keep a JSON file among the results of a checkpoint; by the first of several processes alone."""
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    beside, other = folder(checkpoint) / file, elsewhere(checkpoint) / file
    try:
        documents.keep_json(beside, document, indent=1)
        return beside
    except OSError as error:
        why = error.strerror or str(error)
    try:
        documents.keep_json(other, document, indent=1)
    except OSError:
        warnings.warn(Notice(f"Results are not kept: {beside.parent} cannot be written ({why}), nor can {other.parent}."), stacklevel=2)
        return None
    warnings.warn(Notice(f"{beside.parent} cannot be written ({why}); results are kept in {other.parent}."), stacklevel=2)
    return other
