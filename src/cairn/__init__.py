"""cairn: the whole life of a pretrained language model, checkpoint by checkpoint.

Every command is a function here of the same name. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.adaptation.folding import fold
    from cairn.checkpoint.foreign.export import export
    from cairn.checkpoint.foreign.importing import import_
    from cairn.checkpoint.format.read import Checkpoint, open  # noqa: F401  (not in __all__: `from cairn import *` must not shadow the builtin)
    from cairn.checkpoint.format.summary import log
    from cairn.checkpoint.format.summary import summary as show
    from cairn.checkpoint.format.verify import verify
    from cairn.checkpoint.memory.survival import survival
    from cairn.checkpoint.saving.modules import Saver
    from cairn.compression.compress import compress
    from cairn.continual.generations import generations
    from cairn.continual.pretrain import anneal, continue_
    from cairn.evaluation.audits.training_stability import stability
    from cairn.evaluation.measure import evaluate
    from cairn.generation.text import generate
    from cairn.growth.enlarge import grow
    from cairn.merging.ablate import ablate
    from cairn.merging.combine import average, merge
    from cairn.registry.card import card
    from cairn.registry.compare import diff
    from cairn.registry.explain import explain
    from cairn.registry.replay import replay
    from cairn.selection.final_phase import ablate_sources
    from cairn.studies.demo import demo
    from cairn.studies.runner import study
    from cairn.training.run import Run, fork, resume, train

_HOMES = {  # where each public name lives; `module:attribute` where it has another name there
    "Checkpoint": "cairn.checkpoint.format.read",
    "Run": "cairn.training.run",
    "Saver": "cairn.checkpoint.saving.modules",
    "ablate": "cairn.merging.ablate",
    "ablate_sources": "cairn.selection.final_phase",
    "anneal": "cairn.continual.pretrain",
    "average": "cairn.merging.combine",
    "card": "cairn.registry.card",
    "compress": "cairn.compression.compress",
    "continue_": "cairn.continual.pretrain",
    "demo": "cairn.studies.demo",
    "diff": "cairn.registry.compare",
    "evaluate": "cairn.evaluation.measure",
    "explain": "cairn.registry.explain",
    "export": "cairn.checkpoint.foreign.export",
    "fold": "cairn.adaptation.folding",
    "fork": "cairn.training.run",
    "generate": "cairn.generation.text",
    "generations": "cairn.continual.generations",
    "grow": "cairn.growth.enlarge",
    "import_": "cairn.checkpoint.foreign.importing",
    "log": "cairn.checkpoint.format.summary",
    "merge": "cairn.merging.combine",
    "open": "cairn.checkpoint.format.read",
    "replay": "cairn.registry.replay",
    "resume": "cairn.training.run",
    "show": "cairn.checkpoint.format.summary:summary",
    "stability": "cairn.evaluation.audits.training_stability",
    "study": "cairn.studies.runner",
    "survival": "cairn.checkpoint.memory.survival",
    "train": "cairn.training.run",
    "verify": "cairn.checkpoint.format.verify",
}

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "Run",
    "Saver",
    "ablate",
    "ablate_sources",
    "anneal",
    "average",
    "card",
    "compress",
    "continue_",
    "demo",
    "diff",
    "evaluate",
    "explain",
    "export",
    "fold",
    "fork",
    "generate",
    "generations",
    "grow",
    "import_",
    "log",
    "merge",
    "replay",
    "resume",
    "show",
    "stability",
    "study",
    "survival",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cairn' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    return globals().setdefault(name, getattr(importlib.import_module(module), attribute or name))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
