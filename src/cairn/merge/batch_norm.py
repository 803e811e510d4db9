"""BatchNorm in averages: statistics are pooled, or made again on data, never averaged like weights.

The mean of variances leaves out how far the means lie apart. Pooled are the first two moments:

    mean = sum_i w_i mean_i        var = sum_i w_i (var_i + mean_i^2) - mean^2

Exact for the data behind the parents' statistics; the averaged network's own activations may still differ, which is what
`reestimated` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cairn.checkpoint import write
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.modules import fill_all
from cairn.checkpoint.place import place
from cairn.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from cairn.checkpoint.read import Checkpoint

MEAN, VARIANCE, COUNTER = "running_mean", "running_var", "num_batches_tracked"
"""The last parts of the names under which torch keeps a BatchNorm's statistics."""


def pooled_variance(
    variances: Sequence[torch.Tensor], means: Sequence[torch.Tensor], mean_of: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> torch.Tensor:
    """Variance of the pooled data, from variances and means of one shape and the weighted mean that pools; float64, never negative."""
    wide_means = [mean.double() for mean in means]
    second = mean_of([variance.double() + mean.square() for variance, mean in zip(variances, wide_means, strict=True)])
    return (second - mean_of(wide_means).square()).clamp_(min=0)


def mean_beside(name: str, tensors: Iterable[str]) -> str | None:
    """The name of the running mean that belongs to a running variance; None for any other tensor."""
    stem, _, last = name.rpartition(".")
    beside = f"{stem}.{MEAN}" if stem else MEAN
    return beside if last == VARIANCE and beside in tensors else None


def is_counter(name: str) -> bool:
    """Whether a tensor counts the batches of a BatchNorm."""
    return name.rpartition(".")[2] == COUNTER


def reestimated(checkpoint: Checkpoint, model: nn.Module, batches: Iterable[Any], out: str | Path) -> Checkpoint:
    """Write `checkpoint` again with the BatchNorm statistics that its weights give on `batches`, over one pass in their order.

    `model` is a torch module with the checkpoint's names, which its weights and the new statistics are left in; each of
    `batches` is what it is called with, or a tuple that begins with that (`torch.optim.swa_utils.update_bn`). Raises
    `InputError` for a model without BatchNorm or no batches, `MismatchError` where names or shapes do not fit.
    """
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.optim.swa_utils import update_bn

    if not any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules()):
        raise InputError("The model keeps no BatchNorm statistics, so there is nothing to make again.")
    path = place(out)
    held = model.state_dict()
    with torch.no_grad():
        fill_all(held, checkpoint.tensors, f"weights of {checkpoint.path}")
    seen = 0

    def counted() -> Iterable[Any]:
        nonlocal seen
        for batch in batches:
            seen += 1
            yield batch

    update_bn(counted(), model)  # type: ignore[arg-type]
    if not seen:
        raise InputError("No batches were given, so there are no statistics.")
    lineage = Lineage.record("operation", "re-estimate", parents=[checkpoint], options={"batches": seen}, directory=path.parent)
    return write.save(
        path, model=model.state_dict(), config=checkpoint.config, tokenizer=checkpoint.tokenizer, generation=checkpoint.generation, lineage=lineage
    )
