"""Result files of lm-evaluation-harness as rows of the tidy table: runs that others measured, beside one's own."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn.checkpoint.format import documents
from cairn.errors import InputError, NotFoundError
from cairn.evaluation.measure import ResultRow

_STEP = re.compile(r"step[_-]?(\d+)")
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)([kmb])(?![a-z])", re.IGNORECASE)
_CHANCE = {
    "lambada_openai": 0.0,
    "piqa": 0.5,
    "winogrande": 0.5,
    "wsc": 0.5,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "sciq": 0.25,
    "logiqa": 0.25,
}
"""What guessing gives, by the beginning of a task's name; tasks of MMLU (hendrycksTest-*) have four choices, minimal pairs two."""
_CHANCE_OF_GROUP = {"hendrycksTest": 0.25, "blimp": 0.5, "mmlu": 0.25}


def load(source: str | Path, tokens_per_step: int | None = None) -> list[ResultRow]:
    """Rows from a result file, a folder or a zip archive of them, one for each task and metric that has a standard error.

    The step stands in the model's revision or in the file's name; `tokens_per_step` turns it into tokens. Tasks measured with
    another number of examples in front are another protocol. Raises `NotFoundError` where there is nothing, `InputError` for a
    file that is no result.
    """
    path = Path(source)
    if not path.exists():
        raise NotFoundError(f"There is no result file or folder {path}.")
    rows = [row for name, document in _documents(path) for row in _rows(name, document, tokens_per_step)]
    if not rows:
        raise InputError(f"{path} holds no results of lm-evaluation-harness: JSON files with 'results' and 'config'.")
    return rows


def size_of(run: str) -> float | None:
    """Number of parameters as a run's name says it (pythia-410m: 410e6), or None."""
    found = _SIZE.search(run)
    return float(found[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()] if found else None


def chance_of(task: str) -> float | None:
    """What guessing gives in accuracy, where it is known."""
    return _CHANCE.get(task, next((value for group, value in _CHANCE_OF_GROUP.items() if task.startswith(group)), None))


def _documents(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(name for name in archive.namelist() if name.endswith(".json")):
                yield member, _parsed(archive.read(member), member)
        return
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        yield str(file.relative_to(path) if path.is_dir() else file.name), _parsed(file.read_bytes(), str(file))


def _parsed(data: bytes, where: str) -> Any:
    return documents.parse(data, where)


def _rows(name: str, document: Any, tokens_per_step: int | None) -> Iterator[ResultRow]:
    if not isinstance(document, dict) or not isinstance(document.get("results"), dict):
        return
    config = document.get("config") or {}
    steps = _STEP.findall(str(config.get("model_args", ""))) or _STEP.findall(name)
    step = int(steps[-1]) if steps else None
    folders = Path(name).parts[:-1]
    run = next((part for part in folders if _SIZE.search(part)), folders[0] if folders else Path(name).stem)
    shots = config.get("num_fewshot")
    # A folder below the run (zero-shot, baseline, intervention) tells apart what was measured on different weights.
    variant = "/".join(folders[folders.index(run) + 1 :]) if run in folders else ""
    digest = blake3(f"{run}/{variant}/{step}".encode()).hexdigest()
    tokens = step * tokens_per_step if step is not None and tokens_per_step else None
    for task, figures in document["results"].items():
        protocol = f"lm-eval {task} v{document.get('versions', {}).get(task, '?')}, {shots}-shot, {variant}"
        for metric, value, error in _figures(figures, f"{name}, task {task}"):
            accuracy = metric in ("acc", "acc_norm")
            n = round(value * (1 - value) / error**2) + 1 if accuracy and error else 0
            yield ResultRow(run, f"step{step}", step, tokens, task, metric, value, error, n, chance_of(task) if accuracy else None, protocol, digest)


def _figures(figures: Any, where: str) -> Iterator[tuple[str, float, float]]:
    """metric, value and standard error, as older (`acc`, `acc_stderr`) and newer versions (`acc,none`, `acc_stderr,none`) write them."""
    for name, value in figures.items() if isinstance(figures, dict) else ():
        metric, comma, which = name.partition(",")
        error = figures.get(f"{metric}_stderr{comma}{which}")
        if isinstance(value, (int, float)) and isinstance(error, (int, float)) and not metric.endswith("_stderr"):
            if not math.isfinite(value):
                raise InputError(f"{where}: {metric} is {value}, which is no result; measure it again, or take it out of the file.")
            if not math.isfinite(error):
                continue
            yield metric if which in ("", "none") else f"{metric} ({which})", float(value), float(error)
