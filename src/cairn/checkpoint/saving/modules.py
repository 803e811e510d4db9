"""Any torch model and optimizer as named tensors, and back; and a saver for plain training loops.

saver = cairn.Saver("runs/a", model, optimizer, every=1)
for batch in batches:
    loss(model, batch).backward()
    optimizer.step()               # waits here, if at all, until the last save has copied what changes now
    optimizer.zero_grad()
    saver.step({"position": position})

position = saver.restore()["position"]     # in the next process; None where nothing was saved yet
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from cairn.checkpoint.format import read
from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import local_of, part_of
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving.capture import Background, Mode
from cairn.checkpoint.saving.captured import Guard, NamedState
from cairn.checkpoint.saving.peers import Peers
from cairn.errors import InputError, MismatchError, ResumeError


def module_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and persistent buffers by name, each once: tied ones under their first name."""
    return {name: tensor.detach() for name, tensor in _live(model).items()}


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same, as the very objects that an optimizer knows. Walking a model takes a good part of what a save makes the loop wait."""
    found, seen = dict[str, torch.Tensor](), set[int]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"'{name}' of the model's state is a {type(tensor).__name__}, not a tensor, and cannot be saved as one.")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def optimizer_tensors(named: Iterable[tuple[str, torch.Tensor]], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """`<parameter>/<key>` for every tensor of the optimizers' state (moments, step counts, masters)."""
    names = {parameter: name for name, parameter in named}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def short_lived(model: nn.Module) -> set[str]:
    """Names of tensors that a forward pass may change, so that they must be copied at once: all buffers (running statistics,
    power-iteration vectors, scales) and embeddings that renormalise their rows."""
    names = {name for name, _ in model.named_buffers()}
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            names.add(f"{prefix}.weight" if prefix else "weight")
    return names


def fill(target: torch.Tensor, tensor: LazyTensor) -> None:
    """Read into a tensor, wherever and however it lies, the part of the stored one that this process holds, and no other bytes."""
    local, part = local_of(target), part_of(tensor.name, target)
    if local.device.type == "cpu" and local.dtype == tensor.dtype and local.is_contiguous():
        tensor.read_part(part, local)
    else:
        local.copy_(tensor.read_part(part))


def fill_all(targets: Mapping[str, torch.Tensor], tensors: Mapping[str, LazyTensor], what: str) -> None:
    """Fill tensors from stored ones of the same names and shapes. Raises `MismatchError` before anything is changed."""
    missing, extra = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or extra:
        names = [f"no '{name}'" for name in missing[:1]] + [f"an unknown '{name}'" for name in extra[:1]]
        raise MismatchError(f"The {what} do not fit this model: there is {' and '.join(names)}.")
    for name, target in targets.items():
        if tuple(target.shape) != tuple(tensors[name].shape):
            raise MismatchError(f"The {what} do not fit this model: '{name}' is {tuple(tensors[name].shape)}, the model needs {tuple(target.shape)}.")
    for name, target in targets.items():
        fill(target, tensors[name])


def fill_optimizer(optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], stored: Mapping[str, LazyTensor]) -> set[str]:
    """Give an optimizer the stored state of its parameters, each laid out as its parameter; returns the parameters without any."""
    by_parameter: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        owner, _, key = name.rpartition("/")
        by_parameter.setdefault(owner, {})[key] = tensor
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wanted = {name: parameter for name, parameter in named.items() if id(parameter) in mine and parameter.requires_grad}
    for name, parameter in wanted.items():
        for key, tensor in by_parameter.get(name, {}).items():
            optimizer.state[parameter][key] = _like(parameter, tensor)
    return set(wanted) - set(by_parameter)


def _like(parameter: torch.Tensor, tensor: LazyTensor) -> torch.Tensor:
    """A piece of an optimizer's state, laid out as its parameter where it has its shape."""
    if tensor.shape != tuple(parameter.shape) or not parameter.dim():
        value = tensor.load()
        # Step counts stay where torch keeps them (host memory unless the kernel wants them on the device).
        return value.to(parameter.device) if value.dim() or parameter.is_cuda else value
    state = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    fill(state, tensor)
    return state


class Saver:
    """Checkpoints of a plain training loop, saved in the background every `every` calls of `step`.

    `optimizers` may be several, also such as run inside the backward pass: each waits only for what it changes. With `peers`
    (`cairn.checkpoint.saving.peers.Group`) all processes write one checkpoint together; parameters may be DTensors.
    """

    engine: ClassVar[type[Background]] = Background

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        *,
        extra: Mapping[str, torch.Tensor] | None = None,
        every: int = 1,
        mode: Mode = "auto",
        buffer: int | None = None,
        guard: Guard = "version",
        peers: Peers | None = None,
        planning: Peers | None = None,
    ) -> None:
        """Install the wait before each optimizer's step. Checkpoints go to `folder/checkpoints/step-00000001`, ...

        `extra` are further tensors to keep (an average of the weights, say), which change only between an optimizer's step and
        the call of `step`. `mode`, `buffer` and `guard` are those of `cairn.checkpoint.saving.capture.Background`.
        """
        self.folder, self.model, self.every, self.extra = Path(folder), model, every, dict(extra or {})
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.count = 0
        """Calls of `step` so far, over all processes that have continued this run."""
        self.background = self.engine(peers, planning, mode=mode, buffer=buffer, guard=guard, spare=2.0 if every == 1 else 1.1)
        # With several optimizers there is no one moment before which all that is left has its old values.
        extras = self.extra if len(self.optimizers) > 1 else {}
        self._early = {("model", name) for name in short_lived(model)} | {("ingredients", f"extra/{name}") for name in extras}
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in self.optimizers]

    def step(self, values: Mapping[str, Any] | None = None) -> None:
        """Call once after each update; `values` (plain JSON: positions, schedules) come back from `restore`."""
        self.count += 1
        if self.count % self.every == 0:
            self.save(values)

    def save(self, values: Mapping[str, Any] | None = None) -> None:
        """Ask for a checkpoint of the state as it stands. Raises what went wrong in an earlier one."""
        document = {"format": 1, "step": self.count, "tokens": None, "values": dict(values or {}), "groups": [_settings(o) for o in self.optimizers]}
        describe = getattr(getattr(self.model, "config", None), "to_dict", dict)  # a model of transformers says what it is
        files = {"trainer.json": _json(document), "config.json": _json(describe())}
        live = _live(self.model)
        groups = {"model": {name: tensor.detach() for name, tensor in live.items()}, "optimizer": optimizer_tensors(live.items(), self.optimizers)}
        groups["ingredients"] = {"torch/random": torch.get_rng_state(), **{f"extra/{name}": tensor for name, tensor in self.extra.items()}}
        path = self.folder / "checkpoints" / f"step-{self.count:08d}"
        self.background.save(path, NamedState(groups, files, self._early), lambda parent: self._lineage(parent, path.parent))

    def restore(self, source: str | Path | Checkpoint | None = None) -> dict[str, Any] | None:
        """Put a checkpoint (default: the newest of this folder) back into model, optimizers and torch's generator.

        Returns the values given to `step`, or None if there is nothing to restore. Raises `MismatchError` or `ResumeError`
        where the checkpoint does not fit.
        """
        if source is None:
            complete = read.list_checkpoints(self.folder)
            if not complete:
                return None
            source = complete[-1]
        checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
        if checkpoint.trainer is None:
            raise ResumeError(f"{checkpoint.path} has no trainer.json, so training cannot go on from it.")
        fill_all(module_tensors(self.model), checkpoint.tensors, f"tensors of {checkpoint.path}")
        named = dict(self.model.named_parameters())
        for number, optimizer in enumerate(self.optimizers):
            fill_optimizer(optimizer, named, checkpoint.optimizer or {})
            for group, settings in zip(optimizer.param_groups, checkpoint.trainer["groups"][number], strict=True):
                group.update(settings)
        kept = dict(checkpoint.ingredients or {})
        if "torch/random" in kept:
            torch.set_rng_state(kept.pop("torch/random").load())
        fill_all({f"extra/{name}": tensor for name, tensor in self.extra.items()}, kept, f"further tensors of {checkpoint.path}")
        self.count, self.background.newest = checkpoint.trainer["step"], checkpoint
        return checkpoint.trainer["values"]

    def close(self) -> None:
        """Wait until everything is on disk, and take the hooks away. Raises what went wrong."""
        try:
            self.background.close()
        finally:
            for hook in self._hooks:
                hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _before_step(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        everything = len(self.optimizers) == 1
        self.background.before_update(None if everything else _changed_by(optimizer))

    def _lineage(self, parent: Checkpoint | None, directory: Path) -> Lineage:
        return Lineage.record("run", "train", parents=[parent] if parent is not None else [], directory=directory)


def _changed_by(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield from (value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, torch.Tensor))


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The plain options of each parameter group (learning rate, betas, ...)."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _json(document: Any) -> bytes:
    try:
        return as_json(document)
    except TypeError as error:
        raise InputError(f"What goes beside the tensors must be plain values that JSON can say: {error}.") from None
