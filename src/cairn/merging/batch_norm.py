"""BatchNorm in averages: statistics are pooled, or made again on data, never averaged like weights.

The mean of variances leaves out how far the means lie apart. Pooled are the first two moments:

    mean = sum_i w_i mean_i        var = sum_i w_i (var_i + mean_i^2) - mean^2 = sum_i w_i (var_i + (mean_i - mean)^2)

of which the last form cancels no digits, and gives equal parents exactly what each of them has. Exact for the data behind the
parents' statistics; the averaged network's own activations may still differ, which is what `reestimated` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PrivateAttr

from cairn.checkpoint.format import read
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.checkpoint.saving.modules import fill_all, module_tensors
from cairn.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

MEAN, VARIANCE, COUNTER = "running_mean", "running_var", "num_batches_tracked"
"""The last parts of the names under which torch keeps a BatchNorm's statistics."""


def pooled_variance(
    variances: Sequence[torch.Tensor], means: Sequence[torch.Tensor], mean_of: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> torch.Tensor:
    """Variance of the pooled data, from variances and means of one shape and the weighted mean that pools; float64, never negative."""
    wide = [mean.double() for mean in means]
    center = mean_of(wide)
    return mean_of([variance.double() + (mean - center).square() for variance, mean in zip(variances, wide, strict=True)])


def mean_beside(name: str, tensors: Iterable[str]) -> str | None:
    """The name of the running mean that belongs to a running variance; None for any other tensor."""
    stem, _, last = name.rpartition(".")
    beside = f"{stem}.{MEAN}" if stem else MEAN
    return beside if last == VARIANCE and beside in tensors else None


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running mean or variance."""
    return name.rpartition(".")[2] in (MEAN, VARIANCE)


def is_counter(name: str) -> bool:
    """Whether a tensor counts the batches of a BatchNorm."""
    return name.rpartition(".")[2] == COUNTER


def reestimated(checkpoint: str | Path | Checkpoint, model: nn.Module, batches: Iterable[Any], out: str | Path) -> Checkpoint:
    """Write `checkpoint` again with the BatchNorm statistics that its weights give on `batches`, over one pass in their order.

    `model` is a torch module with the checkpoint's names, which its weights and the new statistics are left in; each of
    `batches` is what it is called with, or a tuple that begins with that (`torch.optim.swa_utils.update_bn`). The statistics are
    the plain mean over the batches of their means and unbiased variances, in training mode: dropout is at work. All else comes
    out as it was stored, a training state too. Raises `InputError` for a model without BatchNorm, for no batches, one without a
    variance, or a taken place, and `MismatchError` where names or shapes do not fit; nothing is written then.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    opened = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.running_mean is not None}
    if not layers:
        raise InputError("The model keeps no BatchNorm statistics, so there is nothing to make again.")
    if place(out).exists():
        raise InputError(f"{out} exists; a checkpoint is never overwritten, choose another name.")
    fill_all(module_tensors(model), opened.tensors, f"weights of {opened.path}")
    operation = Reestimated(batches=_pass(batches, model, list(layers.values())))
    made = module_tensors(model).items()
    operation._made = {name: tensor for name, tensor in made if name.rpartition(".")[0] in layers and (is_statistic(name) or is_counter(name))}
    return stream.apply(operation, [opened], out, name="re-estimate")


def _pass(batches: Iterable[Any], model: nn.Module, layers: Sequence[_BatchNorm]) -> int:
    """Pass all batches through the model and leave its layers with their statistics; returns how many they were."""
    from torch.optim.swa_utils import update_bn

    seen, mode, momenta = 0, model.training, [layer.momentum for layer in layers]

    def counted() -> Iterable[Any]:
        nonlocal seen
        for batch in batches:
            seen += 1
            yield batch

    try:
        update_bn(counted(), model)  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"Batch {seen} has no statistics: {str(error).rstrip('.')}.") from error
    finally:
        model.train(mode)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    if not seen:
        raise InputError("No batches were given, so there are no statistics.")
    return seen


class Reestimated(stream.Operation):
    """A checkpoint as it is stored, but for BatchNorm statistics that were made elsewhere."""

    batches: int

    _made: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    def continues(self) -> int | None:
        return 0

    def copies(self) -> bool:
        return True

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        return [f"BatchNorm statistics: kept -> of {self.batches} batches"]

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        if spec.name in self._made:
            yield self._made[spec.name].reshape(-1).cpu()
        else:
            yield from stream.copied(parents[0].tensors[spec.name])
