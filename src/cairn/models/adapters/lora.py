"""LoRA: the change of each matrix is a product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cairn.catalog import Paper, register
from cairn.errors import MismatchError
from cairn.models.adapters import Adapter
from cairn.models.adapters.layer import AdapterLayer, drawn_uniform
from cairn.models.anatomy import Matrix


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A x of x (..., inputs), A (rank, inputs) and B (outputs, rank) (section 4.1)."""
    return F.linear(F.linear(x, a), b) * scale


def low_rank_delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A, the change of the matrix (outputs, inputs)."""
    return (b @ a) * scale


def scaling(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """What the product is multiplied by: alpha / rank, or alpha / sqrt(rank) ("A Rank Stabilization Scaling Factor", 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


class LowRank(AdapterLayer):
    """A (rank, inputs) and B (outputs, rank) beside one matrix. B is 0 at first, so that nothing changes."""

    files: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, matrix: Matrix, rank: int, scale: float, dropout: float) -> None:
        super().__init__(matrix)
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, matrix.inputs))
        self.lora_B = nn.Parameter(torch.empty(matrix.outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return low_rank(self.dropped(x.to(self.lora_A.dtype), self.dropout), self.lora_A, self.lora_B, self.scale)

    def delta(self) -> Tensor:
        return low_rank_delta(self.lora_A, self.lora_B, self.scale)

    def draw(self, name: str, seed: int) -> None:
        drawn_uniform(self.lora_A, f"{name}.lora_A", seed, 1 / math.sqrt(self.inputs))  # Kaiming uniform with a = sqrt(5), as PEFT
        nn.init.zeros_(self.lora_B)

    def cut(self, mesh: Any, along: str) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        layouts = {"outputs": (Replicate(), Shard(0)), "inputs": (Shard(1), Replicate())}[along]
        for name, layout in zip(("lora_A", "lora_B"), layouts, strict=True):
            setattr(self, name, nn.Parameter(distribute_tensor(getattr(self, name), mesh, [layout])))


@register(
    "adapter",
    "lora",
    paper=(
        Paper("LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685"),
        Paper("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "arXiv:2312.03732"),
    ),
)
class LoRA(Adapter):
    """LoRA: a product of two thin matrices beside each target (section 4.1), initialised and scaled as in PEFT."""

    peft_type: ClassVar[str] = "LORA"

    rank: int = Field(8, ge=1)
    """Rank of the change."""
    alpha: float | None = Field(None, gt=0)
    """The change is multiplied by alpha / rank; None: by 1."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs of the thin matrices that is set to zero in training."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones."""

    def layer(self, matrix: Matrix) -> LowRank:
        return LowRank(matrix, self.rank, scaling(self.alpha or self.rank, self.rank, self.rank_stabilized), self.dropout)

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        a, b = shapes.get("lora_A", ()), shapes.get("lora_B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != self.rank or b[1] != self.rank:
            raise MismatchError(f"The adapter's file does not fit its configuration: rank {self.rank}, but A is {a} and B is {b}.")
        return b[0], a[1]

    def count(self, matrix: Matrix) -> int:
        return self.rank * (matrix.inputs + matrix.outputs)

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha or self.rank,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "init_lora_weights": True,
            "bias": "none",
            "modules_to_save": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        for key, neutral in _NEUTRAL.items():
            if config.get(key) not in (*neutral, None):
                raise MismatchError(f"adapter_config.json: {key}={config[key]!r} is not supported for LoRA here; merge this adapter with peft.")
        values = {"rank": config.get("r", 8), "alpha": config.get("lora_alpha", 8), "dropout": config.get("lora_dropout", 0.0)}
        return cls.parse(values | {"rank_stabilized": config.get("use_rslora", False)}, "adapter_config.json")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "use_bdlora": ({},),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Keys of PEFT's LoRA and the values that ask for nothing more than two thin matrices beside each target."""
