"""The whole state of a run as named tensors and plain values, to a checkpoint and back.

`model` and `optimizer` tensors go under the names of DESIGN 3 (`<parameter>/exp_avg`); everything small goes into
trainer.json. Restoring takes all of it or refuses and says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cairn import catalog
from cairn.checkpoint import write
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.parts import local_of, part_of
from cairn.checkpoint.read import Checkpoint, LazyTensor
from cairn.errors import MismatchError, ResumeError
from cairn.train.loop import Progress, Trainer

FORMAT = 1


def model_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names; a tied head is left out, as transformers does."""
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """`<parameter>/<key>` for every tensor of the optimizer's state (moments and step counts)."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def event_names(trainer: Trainer) -> list[str]:
    """A stable name for each event of the run: its catalog name, numbered where it appears more than once."""
    names: list[str] = []
    for event in trainer.recipe.events:
        name = catalog.name_of(event) or type(event).__name__
        names.append(name if name not in names else f"{name}-{names.count(name) + 1}")
    return names


def event_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """`<event>/<tensor>` for every tensor that an event keeps."""
    pairs = zip(event_names(trainer), trainer.handlers, strict=True)
    return {f"{event}/{name}": tensor for event, handler in pairs for name, tensor in handler.tensors().items()}


def plain_state(trainer: Trainer) -> dict[str, Any]:
    """What trainer.json holds. Nothing in it depends on the clock or on the machine: equal states give equal bytes."""
    progress = trainer.progress
    return {
        "format": FORMAT,
        "step": progress.step,
        "tokens": progress.tokens,
        "position": progress.position,
        "skipped": progress.skipped,
        "feed": trainer.feed.state(progress.position),
        "events": {name: handler.state() for name, handler in zip(event_names(trainer), trainer.handlers, strict=True)},
    }


def save(trainer: Trainer, path: Path, lineage: Lineage) -> Checkpoint:
    """Write the state as it stands to the new checkpoint `path`."""
    return write.save(
        path,
        model=model_tensors(trainer),
        config=trainer.recipe.model.to_hf(),
        tokenizer=trainer.tokenizer,
        optimizer=optimizer_tensors(trainer),
        ingredients=event_tensors(trainer),
        trainer=plain_state(trainer),
        lineage=lineage,
        peers=trainer.world.peers,
    )


def restore(trainer: Trainer, checkpoint: Checkpoint, *, fresh_optimizer: bool = False, new_data: bool = False) -> None:
    """Put the state of `checkpoint` into `trainer`.

    `fresh_optimizer` leaves the moments at zero, `new_data` starts the feed at its beginning; both must be asked for.
    Raises `ResumeError` when something that a resume needs is not in the checkpoint, `MismatchError` when shapes differ.
    """
    plain = checkpoint.trainer
    if plain is None:
        raise ResumeError(f"{checkpoint.path} has no trainer.json, so it can not be resumed; `cairn fork` starts a new run from its weights.")
    load_weights(trainer, checkpoint)
    if not fresh_optimizer:
        _restore_optimizer(trainer, checkpoint)
    if not new_data:
        trainer.feed.restore(plain["feed"])
    trainer.progress = Progress(plain["step"], plain["tokens"], 0 if new_data else plain["position"], plain.get("skipped", 0))
    _restore_events(trainer, checkpoint, plain.get("events", {}))


def load_weights(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Copy the weights of `checkpoint` into the model; names and shapes must agree."""
    _copy(dict(trainer.model.named_parameters()), checkpoint.tensors, f"weights of {checkpoint.path}")


def _restore_optimizer(trainer: Trainer, checkpoint: Checkpoint) -> None:
    if checkpoint.optimizer is None and not trainer_has_updated(checkpoint):
        return  # the very beginning: there are no moments yet
    if checkpoint.optimizer is None:
        raise ResumeError(
            f"{checkpoint.path} holds no optimizer state, and continuing without it makes the loss jump; "
            "ask for a fresh optimizer by name (--fresh optimizer) if that is what you want."
        )
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, tensor in checkpoint.optimizer.items():
        owner, _, key = name.rpartition("/")
        by_parameter.setdefault(owner, {})[key] = tensor
    wanted = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    missing = sorted(set(wanted) - set(by_parameter))
    if missing and trainer_has_updated(checkpoint):
        raise ResumeError(f"{checkpoint.path}: the optimizer state of {len(missing)} parameters is missing, the first is '{missing[0]}'.")
    for name, parameter in wanted.items():
        for key, tensor in by_parameter.get(name, {}).items():
            trainer.optimizer.state[parameter][key] = _like(parameter, tensor)


def _like(parameter: torch.Tensor, tensor: LazyTensor) -> torch.Tensor:
    """A piece of an optimizer's state, laid out as its parameter where it has its shape."""
    if tensor.shape != tuple(parameter.shape) or not parameter.dim():
        value = tensor.load()
        # Step counts stay where torch keeps them (host memory unless the kernel wants them on the device).
        return value.to(parameter.device) if value.dim() or parameter.is_cuda else value
    state = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    fill(state, tensor)
    return state


def fill(target: torch.Tensor, tensor: LazyTensor) -> None:
    """Read into a tensor, wherever and however it lies, the part of the stored one that this process holds, and no other bytes."""
    local, part = local_of(target), part_of(tensor.name, target)
    if local.device.type == "cpu" and local.dtype == tensor.dtype and local.is_contiguous():
        tensor.read_part(part, local)
    else:
        local.copy_(tensor.read_part(part))


def trainer_has_updated(checkpoint: Checkpoint) -> bool:
    """Whether any update had been made when the checkpoint was written (a step-0 checkpoint has no moments yet)."""
    plain = checkpoint.trainer or {}
    return plain.get("step", 0) > plain.get("skipped", 0)


def _restore_events(trainer: Trainer, checkpoint: Checkpoint, states: Mapping[str, Any]) -> None:
    kept = checkpoint.ingredients
    for name, handler in zip(event_names(trainer), trainer.handlers, strict=True):
        if name not in states:
            continue  # an event that the resumed recipe adds begins afresh; lineage records the change
        tensors = {}
        for key, like in handler.tensors().items():
            if kept is not None and f"{name}/{key}" in kept:
                tensors[key] = torch.empty_like(like)
                fill(tensors[key], kept[f"{name}/{key}"])
        missing = sorted(set(handler.tensors()) - set(tensors))
        if missing:
            raise ResumeError(f"{checkpoint.path}: event '{name}' kept no tensor '{missing[0]}', so it can not go on exactly.")
        handler.restore(states[name], tensors)


def _copy(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, Any], what: str) -> None:
    missing, extra = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or extra:
        names = [f"no '{name}'" for name in missing[:1]] + [f"an unknown '{name}'" for name in extra[:1]]
        raise MismatchError(f"The {what} do not fit this model: there is {' and '.join(names)}.")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tuple(tensors[name].shape):
            raise MismatchError(f"The {what} do not fit this model: '{name}' is {tuple(tensors[name].shape)}, the model needs {tuple(parameter.shape)}.")
    for name, parameter in parameters.items():
        fill(parameter, tensors[name])
