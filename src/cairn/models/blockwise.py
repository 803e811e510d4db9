"""A causal language model run block by block, with the weights of one block in memory at a time.

Works on our models and on those of `transformers`. The network stands without memory for its weights; what lies before the blocks is
loaded to turn token ids into the first block's inputs, then each block is loaded, run and let go. How a block is called (rotary angles,
masks, positions) is found by running the model with placeholders instead of blocks, which also shows whether anything but the hidden
states passes from block to block. A model for which that is not so is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cairn import catalog
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import DamagedError, InputError, MismatchError
from cairn.models.anatomy import Anatomy, Matrix, anatomy
from cairn.models.config import architecture

Observe = Callable[[str, Tensor], None]
"""Told the name of a weight and what its matrix reads, (..., inputs)."""


class Blockwise:
    """The blocks of a checkpoint's model, to be run one after the other.

    Parameters
    ----------
    checkpoint
        An open checkpoint of a causal language model, ours or any that `transformers` builds.
    dtype
        In which weights and activations are computed; stored weights are cast when a block is loaded.
    device
        Where a block is computed.

    Raises
    ------
    MismatchError
        For a model that is no stack of blocks which hand on hidden states alone.
    DamagedError
        For weights that are missing or of another shape than config.json says.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        family = str(checkpoint.config.get("model_type"))
        ours = catalog.get("architecture", family).implementation if catalog.has("architecture", str(family)) else None
        if getattr(ours, "encoder_decoder", False) or checkpoint.config.get("is_encoder_decoder"):
            raise MismatchError(f"{checkpoint.path} is an encoder-decoder; block by block only a causal language model is run.")
        self.model = without_weights(checkpoint.config, dtype)
        self.anatomy: Anatomy = anatomy(self.model)
        self._blocks = [self.model.get_submodule(block.name) for block in self.anatomy.blocks]
        self._stored_names = self._names()
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._in_tuples: dict[type, bool] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def matrices(self, block: int) -> dict[str, Matrix]:
        """The matrices of a block by the stored names of their weights."""
        return {self._stored_names[matrix.weight]: matrix for matrix in self.anatomy.blocks[block].matrices().values()}

    def parts(self, block: int) -> dict[str, str]:
        """Which part of a block (`q`, `down`, ...) each matrix is, by the stored names of their weights."""
        return {self._stored_names[matrix.weight]: part for part, matrix in self.anatomy.blocks[block].matrices().items()}

    @torch.no_grad()
    def inputs(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """What enters the first block, (B, T, width), for each batch of token ids (B, T).

        Also finds how each block is called; batches may have several numbers of rows, but one length.
        """
        outside = [name for name in self._outside() if name != self.anatomy.head or self.anatomy.tied]
        self._fill(outside)
        try:
            for batch in batches:
                ids = batch.to(self.device)
                if len(ids) not in self._calls:
                    self._calls[len(ids)] = self._found_calls(ids)
                yield self._stopped_at(0, ids)[0][0].detach()
        finally:
            self._let_go(outside)

    @contextmanager
    def opened(self, block: int) -> Iterator[Block]:
        """A block with its weights in memory."""
        prefix = f"{self.anatomy.blocks[block].name}."
        names = [name for name in self._parameters() if name.startswith(prefix)]
        self._fill(names)
        try:
            yield Block(self, block, {self._stored_names[name]: name for name in names})
        finally:
            self._let_go(names)

    # -- how blocks are called ----------------------------------------------------------------------------------

    def _found_calls(self, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of each block besides the hidden states, for batches of this many rows."""
        other = (ids + 1) % self.anatomy.vocabulary
        while (unknown := self._first_unknown(ids)) is not None:
            with self.opened(unknown) as block:
                args, kwargs = self._stopped_at(unknown, ids)
                self._in_tuples[type(block.module)] = isinstance(block.module(*args, **kwargs), tuple)
        calls = []
        for number in range(len(self)):
            args, kwargs = self._stopped_at(number, ids)
            if number and not torch.equal(args[0], self._stopped_at(number - 1, ids)[0][0]):
                raise self._refusal(f"changes the hidden states between block {number - 1} and block {number}")
            calls.append((args[1:], kwargs))
        args, kwargs = self._stopped_at(len(self) - 1, other)
        if not _same((args[1:], kwargs), calls[-1]):
            raise self._refusal("hands its blocks more of the text than hidden states")
        return calls

    def _first_unknown(self, ids: Tensor) -> int | None:
        """The first block of a class of which it is not yet known whether it returns a tuple."""
        return next((number for number, block in enumerate(self._blocks) if type(block) not in self._in_tuples), None)

    def _stopped_at(self, number: int, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """With what block `number` is called, the hidden states first, where the blocks before it hand on what they are given."""
        try:
            for i, block in enumerate(self._blocks[: number + 1]):
                block.forward = self._placeholder(type(block), stop=i == number)
            self.model(ids, **self._settings())
        except _Reached as reached:
            return _hidden_first(reached.given, reached.named)
        finally:
            for block in self._blocks[: number + 1]:
                del block.__dict__["forward"]
        raise self._refusal(f"does not call block {number}")

    def _placeholder(self, kind: type, *, stop: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if stop:
                raise _Reached(args, kwargs)
            hidden = _hidden_first(args, kwargs)[0][0]
            return (hidden,) if self._in_tuples[kind] else hidden

        return forward

    def _settings(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self.model, "config") else {}

    def _refusal(self, reason: str) -> MismatchError:
        return MismatchError(f"{self.checkpoint.path}: {type(self.model).__name__} {reason}, so it cannot be run block by block.")

    # -- weights ------------------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, Tensor]:
        """Parameters and stored buffers of the network by state-dict name, a tied one under its first name."""
        return dict(self.model.named_parameters()) | {name: b for name, b in self.model.named_buffers() if name in self._stored_names}

    def _outside(self) -> list[str]:
        prefixes = tuple(f"{block.name}." for block in self.anatomy.blocks)
        return [name for name in self._parameters() if not name.startswith(prefixes)]

    def _names(self) -> dict[str, str]:
        """The name in the file for each name in the network; files of base models lack the outermost module's name."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        stored = self.checkpoint.tensors
        found = {}
        for name in [n for n, _ in self.model.named_parameters()] + list(self.model.state_dict()):
            for candidate in (name, name.removeprefix(prefix)):
                if candidate in stored:
                    found[name] = candidate
                    break
        return found

    def _fill(self, names: list[str]) -> None:
        for name in names:
            if name not in self._stored_names:
                raise DamagedError(f"{self.checkpoint.path} does not hold '{name}', which the model of config.json has.")
            lazy = self.checkpoint.tensors[self._stored_names[name]]
            owner, leaf = _owner(self.model, name)
            if lazy.shape != tuple(getattr(owner, leaf).shape):
                raise DamagedError(f"{self.checkpoint.path}: '{lazy.name}' is {lazy.shape}, config.json asks for {tuple(getattr(owner, leaf).shape)}.")
            values = lazy.load().to(self.device, self.dtype if lazy.dtype.is_floating_point else None)
            _set(owner, leaf, values)

    def _let_go(self, names: list[str]) -> None:
        for name in names:
            owner, leaf = _owner(self.model, name)
            _set(owner, leaf, torch.empty_like(getattr(owner, leaf), device="meta"))


class Block:
    """One block in memory: `weights` by their stored names, and `forward`."""

    def __init__(self, owner: Blockwise, number: int, names: dict[str, str]) -> None:
        self._owner, self.number, self._names = owner, number, names
        self.module = owner._blocks[number]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The block's tensors by the names that they have in the checkpoint, in the dtype in which it computes."""
        return {stored: getattr(*_owner(self._owner.model, name)).data for stored, name in self._names.items()}

    def replace(self, changed: Mapping[str, Tensor]) -> None:
        """Give the block other weights."""
        for stored, values in changed.items():
            owner, leaf = _owner(self._owner.model, self._names[stored])
            _set(owner, leaf, values.to(self._owner.device, self._owner.dtype))

    @torch.no_grad()
    def forward(self, hidden: Tensor, observe: Observe | None = None) -> Tensor:
        """What the block makes of hidden states (B, T, width); `observe` is told what each of its matrices reads."""
        args, kwargs = self._owner._calls[len(hidden)][self.number]
        handles = []
        if observe is not None:
            for stored, matrix in self._owner.matrices(self.number).items():
                reader = self._owner.model.get_submodule(matrix.weight.removesuffix(".weight"))
                handles.append(reader.register_forward_pre_hook(lambda _, given, stored=stored: observe(stored, given[0])))
        try:
            made = self.module(hidden.to(self._owner.device), *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return made[0] if isinstance(made, tuple) else made


class _Reached(Exception):
    """A placeholder was called, with these arguments."""

    def __init__(self, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.given, self.named = given, named


def _hidden_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    return (kwargs["hidden_states"],), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; objects that are no data are taken to be."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, type(b)) or isinstance(b, type(a))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _set(owner: nn.Module, leaf: str, values: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    else:
        owner._buffers[leaf] = values


def without_weights(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network that a config.json describes, ours or transformers', in evaluation mode: its parameters take no memory, its buffers
    (rotary frequencies, masks) are there."""
    with _parameters_on_meta():
        if catalog.has("architecture", str(config.get("model_type"))):
            ours: Any = architecture(config)
            if not hasattr(ours, "network"):
                raise MismatchError(f"A model of type '{config.get('model_type')}' is not passed block by block; causal language models are.")
            network: nn.Module = ours.network()
            return network.eval()
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError:
            raise InputError(f"A model of type '{config.get('model_type')}' needs transformers: pip install 'cairn-lm[hf]'.") from None
        values = {key: value for key, value in config.items() if key != "auto_map"}
        described = AutoConfig.for_model(values.pop("model_type"), **values)
        theirs: nn.Module = AutoModelForCausalLM.from_config(described, dtype=dtype, trust_remote_code=False)
        return theirs.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are built here get parameters without memory, but real buffers, which no file holds."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":  # what is tied stays one parameter
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
