"""Small checkpoints of drawn tensors: a base and experts that lie near it."""

from __future__ import annotations

from pathlib import Path

import torch

from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving import write

SHAPES = {"model.a.weight": (7, 5), "model.b.mlp.weight": (13,), "lm_head.weight": (3, 3)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return write.save(path, model=tensors, config={"model_type": "drawn"}, lineage=Lineage(kind="run", name="train"))


def drawn(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, spread: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: spread * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def family(folder: Path, experts: int = 3, *, shapes: dict[str, tuple[int, ...]] = SHAPES, size: float = 0.1) -> list[Checkpoint]:
    """A base and experts, the base first."""
    base = drawn(0, shapes)
    members = [saved(folder / "base", base)]
    for number in range(1, experts + 1):
        change = drawn(number, shapes, size)
        members.append(saved(folder / f"expert-{number}", {name: base[name] + change[name] for name in base}))
    return members


def vectors(members: list[Checkpoint], name: str | None = None) -> torch.Tensor:
    """Task vectors (N, items) of one tensor, or of the whole model in sorted-name order, in float32."""
    names = [name] if name is not None else sorted(members[0].tensors)
    flat = [torch.cat([member.tensors[each].load().float().reshape(-1) for each in names]) for member in members]
    return torch.stack([expert - flat[0] for expert in flat[1:]])


def whole(checkpoint: Checkpoint) -> torch.Tensor:
    """All weights in sorted-name order."""
    return torch.cat([checkpoint.tensors[name].load().float().reshape(-1) for name in sorted(checkpoint.tensors)])
