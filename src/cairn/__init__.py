"""cairn: the whole life of a pretrained language model, checkpoint by checkpoint.

Every command is a function here of the same name. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.checkpoint.diff import diff
    from cairn.checkpoint.export import export
    from cairn.checkpoint.read import Checkpoint, open
    from cairn.checkpoint.verify import verify
    from cairn.evaluate.measure import evaluate
    from cairn.generate.sample import generate
    from cairn.merge import average, merge
    from cairn.studies.runner import study
    from cairn.train.run import Run, fork, resume, train

_HOMES = {
    "Checkpoint": "cairn.checkpoint.read",
    "Run": "cairn.train.run",
    "average": "cairn.merge",
    "diff": "cairn.checkpoint.diff",
    "evaluate": "cairn.evaluate.measure",
    "export": "cairn.checkpoint.export",
    "fork": "cairn.train.run",
    "generate": "cairn.generate.sample",
    "merge": "cairn.merge",
    "open": "cairn.checkpoint.read",
    "resume": "cairn.train.run",
    "study": "cairn.studies.runner",
    "train": "cairn.train.run",
    "verify": "cairn.checkpoint.verify",
}

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "Run",
    "average",
    "diff",
    "evaluate",
    "export",
    "fork",
    "generate",
    "merge",
    "open",
    "resume",
    "study",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cairn' has no attribute '{name}'")
    home = importlib.import_module(_HOMES[name])
    value = getattr(home, name)
    globals()[name] = value
    return value
