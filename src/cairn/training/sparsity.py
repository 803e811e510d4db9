"""Sparse weights: how many entries each matrix keeps, which ones, how masks move, and what operations they save.

    uniform   every matrix keeps the share 1 - s
    erk       share_l = e (n_in + n_out) / (n_in n_out), at most 1, with e such that all together keep 1 - s

A mask holds exactly the number of entries that it should, as a random permutation gives them, and depends on the seed and
the tensor's name alone. Only the matrices of attention and MLP are masked, never embeddings, head, norms and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cairn.checkpoint.format import read
from cairn.errors import NotFoundError
from cairn.randomness import permutation, seed_for

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from cairn.checkpoint.format.parts import Part
    from cairn.models.config import LanguageModelConfig


Distribution = Literal["uniform", "erk"]
CALLBACK = "sparse"


def masked_shapes(model: LanguageModelConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices that are masked: all of attention and MLP."""
    from cairn.models.anatomy import anatomy

    blocks = anatomy(model.meta_model()).blocks
    return {matrix.weight: (matrix.outputs, matrix.inputs) for block in blocks for matrix in block.matrices().values()}


def kept(shapes: Mapping[str, tuple[int, int]], sparsity: float, distribution: Distribution = "uniform") -> dict[str, int]:
    """How many entries each matrix keeps ("SPDF", section 2.1; ERK: "Rigging the Lottery", section 3)."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    if distribution == "uniform":
        return {name: round((1 - sparsity) * size) for name, size in sizes.items()}
    dense: set[str] = set()
    while True:
        # What is already dense has no say in how the rest is shared out.
        budget = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        raw = {name: sum(shape) for name, shape in shapes.items() if name not in dense}
        full = {name for name, weight in raw.items() if budget * weight / sum(raw.values()) >= sizes[name]}
        if not full:
            return {name: sizes[name] if name in dense else round(budget * raw[name] / sum(raw.values())) for name in shapes}
        dense |= full


def random_mask(name: str, shape: tuple[int, int], count: int, seed: int, part: Part) -> NDArray[np.bool_]:
    """The part of a mask that a process holds: true for exactly `count` entries of the whole, at random."""
    rows, columns = (np.arange(begin, begin + size) for begin, size in zip(part.offset, part.shape, strict=True))
    places = rows[:, None] * shape[1] + columns
    return permutation(seed_for(seed, CALLBACK, name), shape[0] * shape[1], places) < count


def moved_mask(weight: torch.Tensor, mask: torch.Tensor, gradient: torch.Tensor, share: float) -> torch.Tensor:
    """The mask without the `share` of its entries whose weights are smallest and with as many others whose gradients are largest.

    All of one shape; the gradient is that of the dense matrix. An entry that was dropped may come back at once ("Rigging the
    Lottery", algorithm 1).
    """
    count = int(share * int(mask.sum()))
    moved, active = mask.flatten().clone(), mask.flatten()
    by_weight = weight.flatten().abs().masked_fill(~active, float("inf")).argsort(stable=True)
    moved[by_weight[:count]] = False
    by_gradient = gradient.flatten().abs().masked_fill(moved, -1.0).argsort(descending=True, stable=True)
    moved[by_gradient[:count]] = True
    return moved.view_as(mask)


def flops_per_token(model: LanguageModelConfig, sequence_length: int, counts: Mapping[str, int]) -> tuple[float, float]:
    """Operations to train on one token, dense and with the masked entries left out: 6 for each of them less.

    Counted as in `LanguageModelConfig.flops_per_token`, attention's scores and the head included, which no mask makes cheaper.
    """
    dense = model.flops_per_token(sequence_length)
    masked = sum(rows * columns for rows, columns in masked_shapes(model).values())
    return dense, dense - 6 * (masked - sum(counts.values()))


def sparsity(source: str | Path | read.Checkpoint) -> dict[str, Any]:
    """What the masks of a checkpoint keep, by part of a block, and what they save.

    Parameters
    ----------
    source
        A checkpoint of a sparse run, or the run: then its newest one.

    Returns
    -------
    dict
        Counts and shares of the weights that are kept, and the operations of a token with all of them and without.

    Raises
    ------
    NotFoundError
        Where the checkpoint holds no masks.

    Examples
    --------
    >>> cairn.sparsity("runs/sparse")["sparsity_of_masked"]  # doctest: +SKIP
    0.75

    Source: "SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models" (arXiv:2303.10464).
    """
    from cairn.models.config import LanguageModelConfig, architecture
    from cairn.training.recipe import load

    checkpoint = source if isinstance(source, read.Checkpoint) else read.open(source)
    kept_here: Mapping[str, Any] = checkpoint.ingredients or {}
    masks = {name.removeprefix(f"{CALLBACK}/"): tensor for name, tensor in kept_here.items() if name.startswith(f"{CALLBACK}/")}
    if not masks or checkpoint.lineage is None:
        raise NotFoundError(f"{checkpoint.path} holds no masks: it was not trained sparsely, or has been made dense by a fork.")
    counts = {name: int(mask.load().sum()) for name, mask in masks.items()}
    sizes = {name: int(np.prod(mask.shape)) for name, mask in masks.items()}
    whole = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())
    parts = {name.rsplit(".", 2)[-2] for name in masks}
    length, model = load(checkpoint.lineage.options["recipe"]).data.sample_units, architecture(checkpoint.config)
    assert isinstance(model, LanguageModelConfig)  # the callback masks no other
    dense, sparse = flops_per_token(model, length, counts)
    tokens = checkpoint.tokens or 0
    return {
        "path": str(checkpoint.path),
        "masked_parameters": sum(sizes.values()),
        "kept_parameters": sum(counts.values()),
        "sparsity_of_masked": 1 - sum(counts.values()) / sum(sizes.values()),
        "sparsity_of_model": (sum(sizes.values()) - sum(counts.values())) / whole,
        "kept_by_part": {part: _share(part, counts) / _share(part, sizes) for part in sorted(parts)},
        "dense_flops_per_token": dense,
        "sparse_flops_per_token": sparse,
        "reduction": dense / sparse,
        "dense_flops": dense * tokens,
        "sparse_flops": sparse * tokens,
    }


def _share(part: str, counts: Mapping[str, int]) -> int:
    return sum(count for name, count in counts.items() if f".{part}." in name)
