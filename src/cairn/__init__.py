"""cairn: the whole life of a pretrained language model, checkpoint by checkpoint.

Every command is a function here of the same name; commands with words below them (`cairn audit flips`, `cairn catalog`) are modules whose
functions do the work (`cairn.audit.flips`, `cairn.catalog.entries` and `named`). Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn import catalog
    from cairn.adaptation import folding as adapt
    from cairn.adaptation import vocabulary as tokenizer
    from cairn.adaptation.folding import fold
    from cairn.checkpoint.foreign.export import export
    from cairn.checkpoint.foreign.importing import import_
    from cairn.checkpoint.format.read import Checkpoint, open  # noqa: F401  (not in __all__: `from cairn import *` must not shadow the builtin)
    from cairn.checkpoint.format.summary import log
    from cairn.checkpoint.format.summary import summary as show
    from cairn.checkpoint.format.verify import verify
    from cairn.checkpoint.memory import attend as keeper
    from cairn.checkpoint.memory.survival import survival
    from cairn.checkpoint.saving.modules import Saver
    from cairn.compression.compress import compress
    from cairn.continual.generations import generations
    from cairn.continual.pretrain import anneal, continue_
    from cairn.evaluation.analysis import trajectory
    from cairn.evaluation.audits.gap import gap
    from cairn.evaluation.audits.training_stability import stability
    from cairn.evaluation.measure import evaluate
    from cairn.generation.chat import chat
    from cairn.generation.text import generate
    from cairn.growth.enlarge import grow
    from cairn.merging.ablate import ablate
    from cairn.merging.combine import average, merge
    from cairn.registry import audit
    from cairn.registry.card import card
    from cairn.registry.challenges import doctor
    from cairn.registry.compare import diff
    from cairn.registry.explain import explain
    from cairn.registry.index import index
    from cairn.registry.query import search
    from cairn.registry.replay import replay
    from cairn.registry.signing import sign
    from cairn.registry.statements import claim, describe
    from cairn.registry.trends import trends
    from cairn.registry.web.server import serve
    from cairn.selection.final_phase import ablate_sources
    from cairn.studies.demo import demo
    from cairn.studies.runner import study
    from cairn.training.run import Run, fork, resume, train
    from cairn.training.sparsity import sparsity
    from cairn.training.starting import init

_HOMES = {  # where each public name lives; `module:attribute` where it has another name there, `module:` where it is the module
    "Checkpoint": "cairn.checkpoint.format.read",
    "Run": "cairn.training.run",
    "Saver": "cairn.checkpoint.saving.modules",
    "ablate": "cairn.merging.ablate",
    "ablate_sources": "cairn.selection.final_phase",
    "adapt": "cairn.adaptation.folding:",
    "anneal": "cairn.continual.pretrain",
    "audit": "cairn.registry.audit:",
    "average": "cairn.merging.combine",
    "card": "cairn.registry.card",
    "catalog": "cairn.catalog:",
    "chat": "cairn.generation.chat",
    "claim": "cairn.registry.statements",
    "compress": "cairn.compression.compress",
    "continue_": "cairn.continual.pretrain",
    "demo": "cairn.studies.demo",
    "describe": "cairn.registry.statements",
    "diff": "cairn.registry.compare",
    "doctor": "cairn.registry.challenges",
    "evaluate": "cairn.evaluation.measure",
    "explain": "cairn.registry.explain",
    "export": "cairn.checkpoint.foreign.export",
    "fold": "cairn.adaptation.folding",
    "fork": "cairn.training.run",
    "gap": "cairn.evaluation.audits.gap",
    "generate": "cairn.generation.text",
    "generations": "cairn.continual.generations",
    "grow": "cairn.growth.enlarge",
    "import_": "cairn.checkpoint.foreign.importing",
    "index": "cairn.registry.index",
    "init": "cairn.training.starting",
    "keeper": "cairn.checkpoint.memory.attend:",
    "log": "cairn.checkpoint.format.summary",
    "merge": "cairn.merging.combine",
    "open": "cairn.checkpoint.format.read",
    "replay": "cairn.registry.replay",
    "resume": "cairn.training.run",
    "search": "cairn.registry.query",
    "serve": "cairn.registry.web.server",
    "show": "cairn.checkpoint.format.summary:summary",
    "sign": "cairn.registry.signing",
    "sparsity": "cairn.training.sparsity",
    "stability": "cairn.evaluation.audits.training_stability",
    "study": "cairn.studies.runner",
    "survival": "cairn.checkpoint.memory.survival",
    "tokenizer": "cairn.adaptation.vocabulary:",
    "train": "cairn.training.run",
    "trajectory": "cairn.evaluation.analysis",
    "trends": "cairn.registry.trends",
    "verify": "cairn.checkpoint.format.verify",
}

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "Run",
    "Saver",
    "ablate",
    "ablate_sources",
    "adapt",
    "anneal",
    "audit",
    "average",
    "card",
    "catalog",
    "chat",
    "claim",
    "compress",
    "continue_",
    "demo",
    "describe",
    "diff",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "fold",
    "fork",
    "gap",
    "generate",
    "generations",
    "grow",
    "import_",
    "index",
    "init",
    "keeper",
    "log",
    "merge",
    "replay",
    "resume",
    "search",
    "serve",
    "show",
    "sign",
    "sparsity",
    "stability",
    "study",
    "survival",
    "tokenizer",
    "train",
    "trajectory",
    "trends",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cairn' has no attribute '{name}'")
    module, colon, attribute = _HOMES[name].partition(":")
    home = importlib.import_module(module)
    return globals().setdefault(name, home if colon and not attribute else getattr(home, attribute or name))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
