"""The one container of adapters: put an adapter on a model, take it off, merge it into the weights and take it out again.

    adapted = attach(model, LoRA(rank=8, targets=["q", "v"]), seed=0)
    ...                        # train: only the adapter's numbers have gradients
    adapted.merge()            # the same outputs, at the price of the plain model
    adapted.unmerge()          # the weights are those from before, bit for bit
    adapted.detach()

It works on our models and on any of transformers' whose anatomy is known. The model's own names do not change: what is added to a
matrix lies beside it, in a module called `adapter`, and a forward hook adds its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cairn import catalog
from cairn.errors import InputError, MismatchError
from cairn.models.adapters import Adapter
from cairn.models.adapters.layer import AdapterLayer
from cairn.models.adapters.targets import matrices_for
from cairn.models.anatomy import Matrix, anatomy

CHILD = "adapter"
"""Where what is added to a matrix lies: a module of this name inside the matrix's own."""
PREFIX = "base_model.model."
"""What PEFT writes in front of every name in a file."""


class Adapted:
    """An adapter on a model. Only its own parameters have gradients, until it is taken off."""

    def __init__(self, model: nn.Module, adapter: Adapter, matrices: Mapping[str, Matrix]) -> None:
        self.model, self.adapter, self.matrices = model, adapter, dict(matrices)
        self._hooks = []
        self._frozen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        """What had gradients before."""
        model.requires_grad_(False)
        for name, matrix in self.matrices.items():
            module = model.get_submodule(name)
            weight: Any = module.weight
            with torch.device(weight.device):
                layer = adapter.layer(matrix)
            if weight.dtype == torch.float64:
                layer = layer.double()
            if hasattr(weight, "device_mesh"):
                layer.cut(weight.device_mesh, "outputs" if weight.placements[0].is_shard(0) else "inputs")
            layer.train(module.training)
            setattr(module, CHILD, layer)
            self._hooks.append(module.register_forward_hook(_added))

    @property
    def layers(self) -> dict[str, AdapterLayer]:
        """What is added to each matrix, by the name of the matrix's module."""
        return {name: self.model.get_submodule(f"{name}.{CHILD}") for name in self.matrices}  # type: ignore[misc]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names that they have in a file."""
        return {
            f"{PREFIX}{name}.{layer.files[own]}": parameter for name, layer in self.layers.items() for own, parameter in layer.named_parameters(recurse=False)
        }

    def tensors(self) -> dict[str, Tensor]:
        """The same, without gradients."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's numbers, which is what they take in a file."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.named_parameters().values())

    def config(self) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        return peft_config(self.adapter, self.matrices, self.model)

    def draw(self, seed: int) -> None:
        """Give the adapter its first values, which depend on the seed and the matrices' names alone."""
        for name, layer in self.layers.items():
            layer.draw(name, seed)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the adapter from tensors by their names in a file. Raises `MismatchError` where names or shapes differ."""
        mine = self.named_parameters()
        strange = sorted(set(mine) ^ set(tensors))
        if strange:
            raise MismatchError(f"The adapter's file does not fit its configuration: '{strange[0]}' is only in one of them.")
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                raise MismatchError(f"The adapter's file does not fit this model: '{name}' is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}.")
            parameter.copy_(tensors[name])

    def samples(self, streams: Mapping[str, int], numbers: Tensor) -> None:
        """Say what dropout may depend on in the next forward passes: a stream for each layer, and the global indices of the rows' samples."""
        for name, layer in self.layers.items():
            layer.stream, layer.samples = torch.tensor(streams[name], dtype=torch.int64, device=numbers.device), numbers

    @torch.no_grad()
    def merge(self) -> None:
        """Make the adapter part of the weights. The weights as they were are kept beside, so that `unmerge` is exact."""
        for name, layer in self.layers.items():
            if layer.merged is None:
                weight: Any = self.model.get_submodule(name).weight
                layer.merged = weight.detach().clone()
                weight.copy_(merged(weight, layer.delta(), self.matrices[name]))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of the weights, which are then those from before, bit for bit."""
        for name, layer in self.layers.items():
            if layer.merged is not None:
                weight: Any = self.model.get_submodule(name).weight
                weight.copy_(layer.merged)
                layer.merged = None

    def detach(self) -> nn.Module:
        """Take the adapter off; what is merged stays in the weights. Returns the model."""
        for hook in self._hooks:
            hook.remove()
        for name in self.matrices:
            delattr(self.model.get_submodule(name), CHILD)
        for name in self._frozen:
            self.model.get_parameter(name).requires_grad_(True)
        self.matrices, self._hooks, self._frozen = {}, [], []
        return self.model


def attach(model: nn.Module, adapter: Adapter, *, seed: int | None = 0, modules: list[str] | None = None) -> Adapted:
    """Put an adapter on a model.

    `seed` draws its first values; None leaves them undrawn, for `load`. `modules` names the matrices' modules, by default those that
    `adapter.targets` mean. The parameters of the model itself stop having gradients.

    Raises `InputError` where a target matches nothing or the model has an adapter already, `MismatchError` for a model without an anatomy.
    """
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise InputError("This model has an adapter already; merge it or take it off before another one is put on.")
    parts = anatomy(model)
    matrices = matrices_for(parts, adapter.targets) if modules is None else _named(matrices_for(parts, ["all"]), modules)
    adapted = Adapted(model, adapter, matrices)
    if seed is not None:
        adapted.draw(seed)
    return adapted


def attach_stored(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapted:
    """Put the adapter on a model that `adapter_config.json` and the tensors beside it describe.

    Raises `MismatchError` where they do not fit each other or the model, `InputError` for an adapter of an unknown kind.
    """
    adapter = adapter_of(config)
    adapted = attach(model, adapter, seed=None, modules=list(modules_of(adapter, tensors)))
    adapted.load(tensors)
    return adapted


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """The adapter that an `adapter_config.json` describes; its targets are those of the file's tensors. Raises `InputError` for an unknown kind."""
    known = {entry.implementation.peft_type: entry.implementation for entry in catalog.entries("adapter")}
    kind = config.get("peft_type")
    if kind not in known:
        raise InputError(f"adapter_config.json describes an adapter of type {kind!r}; known are {', '.join(known)}.")
    adapter: Adapter = known[kind].from_peft(config)
    return adapter


def modules_of(adapter: Adapter, names: Any) -> dict[str, dict[str, str]]:
    """From names in a file to `{module: {own parameter: name in the file}}`. Raises `MismatchError` for a name of another kind."""
    files = adapter.layer(Matrix("", 1, 1)).files
    found: dict[str, dict[str, str]] = {}
    for name in names:
        own = next((own for own, ending in files.items() if name.endswith(f".{ending}")), None)
        if own is None or not name.startswith(PREFIX):
            raise MismatchError(
                f"'{name}' is no tensor of this kind of adapter; a name looks like '{PREFIX}model.layers.0.self_attn.q_proj.{next(iter(files.values()))}'."
            )
        found.setdefault(name.removeprefix(PREFIX).removesuffix(f".{files[own]}"), {})[own] = name
    return found


def peft_config(adapter: Adapter, matrices: Mapping[str, Matrix], model: nn.Module | None = None) -> dict[str, Any]:
    """`adapter_config.json` of an adapter on these matrices. It names no place of the base, whose digest stands in `adapter_base.json`."""
    ours, theirs = getattr(model, "architecture", None), getattr(model, "config", None)
    pairs = getattr(ours, "encoder_decoder", False) or getattr(theirs, "is_encoder_decoder", False)
    values = {
        "peft_type": adapter.peft_type,
        "task_type": "SEQ_2_SEQ_LM" if pairs else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": any(matrix.transposed for matrix in matrices.values()),
        "target_modules": _shortest(list(matrices), model),
        **adapter.to_peft(),
    }
    return dict(sorted(values.items()))


def _shortest(modules: list[str], model: nn.Module | None) -> list[str]:
    """The last parts of the modules' names where these mean no other module of the model, else the whole names; PEFT reads either."""
    if model is None:
        return modules
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules))
    meant = [name for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in endings and not isinstance(module, AdapterLayer)]
    return endings if set(meant) == set(modules) else modules


def merged(weight: Tensor, delta: Tensor, matrix: Matrix) -> Tensor:
    """A stored weight with a change (outputs, inputs) added, computed in float32 (float64 where either is) and rounded once."""
    wide = torch.float64 if torch.float64 in (weight.dtype, delta.dtype) else torch.float32
    delta = delta.t() if matrix.transposed else delta
    return (weight.to(wide) + delta.to(device=weight.device, dtype=wide)).to(weight.dtype)


def _added(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output of a matrix with what its adapter adds."""
    layer: AdapterLayer = getattr(module, CHILD)
    if layer.merged is not None:
        return output
    added = layer(inputs[0])
    if hasattr(added, "placements"):  # tensor parallelism: as the output of the matrix lies
        from torch.distributed.tensor import Replicate, Shard

        cut = module.weight.placements[0].is_shard(0)
        added = added.redistribute(placements=[Shard(added.dim() - 1) if cut else Replicate()]).to_local()
    return (output + added).to(output.dtype)


def _named(known: Mapping[str, Matrix], modules: list[str]) -> dict[str, Matrix]:
    missing = [name for name in modules if name not in known]
    if missing:
        raise MismatchError(f"This model has no matrix '{missing[0]}' in its blocks; the adapter belongs to a model of another family or size.")
    return {name: matrix for name, matrix in known.items() if name in set(modules)}
