"""What a checkpoint is, in a few plain values."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import adapter, descent, read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.place import sizes
from cairn.checkpoint.format.read import Checkpoint


def summary(source: str | Path | Checkpoint) -> dict[str, Any]:
    """Family, size, progress, origin and files of a checkpoint; reads headers only."""
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    tensors = checkpoint.stored
    origin = checkpoint.lineage
    return {
        "path": str(checkpoint.path),
        "digest": checkpoint.digest,
        "model_digest": checkpoint.model_digest,
        "family": checkpoint.config.get("model_type"),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "dtypes": dict(Counter(tensor.spec.dtype for tensor in tensors.values())),
        "step": checkpoint.step,
        checkpoint.unit: checkpoint.units,
        "resumable": checkpoint.trainer is not None and checkpoint.optimizer is not None,
        **({"adapter_of": adapter.base_digest(checkpoint)} if checkpoint.is_adapter else {}),
        "stage": _stage(origin),
        "made_by": f"{origin.kind}: {origin.name}" if origin else "unknown (no lineage)",
        "parents": [parent.digest for parent in origin.parents] if origin else [],
        "created": origin.created if origin else None,
        "bytes": {name: size for name, size in sorted(sizes(checkpoint.path).items()) if not name.startswith(".")},
    }


def log(source: str | Path | Checkpoint) -> list[dict[str, Any]]:
    """The descent of a checkpoint, itself first: each with its generation, act, what was changed, how its data came to be mixed
    otherwise since its parent, and whether it is still here."""
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    entries = [_entry(0, checkpoint.digest, checkpoint.step, str(checkpoint.path), checkpoint)]
    for depth, parent, found in descent.ancestors(checkpoint):
        entries.append(_entry(depth, parent.digest, parent.step, str(found.path) if found else parent.path, found))
    return entries


def _entry(generation: int, digest: str, step: int | None, path: str | None, found: Checkpoint | None) -> dict[str, Any]:
    origin = found.lineage if found is not None else None
    return {
        "generation": generation,
        "digest": digest,
        "parents": [parent.digest for parent in origin.parents] if origin else [],
        "step": step,
        "path": path,
        "here": found is not None,
        "act": f"{origin.kind}: {origin.name}" if origin else None,
        "stage": _stage(origin),
        "changed": origin.changed if origin else [],
        "mixture": _mixture_changes(found) if found is not None else [],
        "created": origin.created if origin else None,
        "hardware": origin.hardware if origin else {},
    }


def shares(checkpoint: Checkpoint) -> dict[str, float]:
    """The share of each source in the mixture that holds where the checkpoint was written; empty where that is not known."""
    history = mixture_history(checkpoint)
    return _normalised(history[-1][1]) if history else {}


def mixture_history(checkpoint: Checkpoint) -> list[Any]:
    """`[first sequence, {source: weight}]` for every mixture so far."""
    return ((checkpoint.trainer or {}).get("feed") or {}).get("mixture", [])


def _mixture_changes(checkpoint: Checkpoint) -> list[str]:
    """Changes of the mixture that the parent, where it is here, did not know."""
    origin = checkpoint.lineage
    parent = descent.find(origin.parents[0], checkpoint.path) if origin and origin.parents else None
    known = mixture_history(parent) if parent is not None else []
    later = [entry for entry in mixture_history(checkpoint)[1:] if entry not in known]
    return [f"from sequence {begin}: {', '.join(f'{name} {share:.4g}' for name, share in _normalised(weights).items())}" for begin, weights in later]


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _stage(origin: Lineage | None) -> str | None:
    """The stage of a larger recipe that made a checkpoint, if it was one."""
    options = origin.options if origin is not None else {}
    return options.get("stage") or (options.get("recipe") or {}).get("stage")
