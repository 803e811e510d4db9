"""What may change the bits that a run computes, from one process to the next: libraries, processor, threads, kernels."""

from __future__ import annotations

from typing import Any

from cairn.checkpoint.format.lineage import Lineage, hardware, versions

LIBRARIES = ("cairn-lm", "torch", "numpy")
MACHINE = ("machine", "processor", "instructions", "threads", "kernels", "gpu", "cuda")


def differences(before: Lineage) -> dict[str, tuple[Any, Any]]:
    """What is otherwise here than where a checkpoint was written: `{what: (there, here)}`."""
    here, there = versions(), before.versions
    found: dict[str, tuple[Any, Any]] = {name: (there.get(name), here.get(name)) for name in LIBRARIES if there.get(name) != here.get(name)}
    now, then = hardware(), before.hardware
    return found | {name: (then.get(name), now.get(name)) for name in MACHINE if then.get(name) != now.get(name)}


def told(differences: dict[str, tuple[Any, Any]]) -> str:
    """Them in words."""
    words = {None: "not said"}
    return "; ".join(f"{name}: {words.get(before, before)} -> {words.get(now, now)}" for name, (before, now) in differences.items())
