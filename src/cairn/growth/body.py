"""What of a model can grow: its layers, and the spaces that its tensors reach from and to. Names and shapes alone, no values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from cairn.checkpoint.format.building import hold_against
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import MismatchError
from cairn.models.anatomy import Anatomy, BlockParts, anatomy_of_config

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys of config.json that say how many layers there are."""

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Keys that grow with the width; the size of a head stays, so that rope turns it as before."""

WIDE = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
"""Families that can be widened: RMS norms, rope, separate projections, no constant that hangs on the width."""

_SPACES: dict[str, tuple[str | None, ...]] = {
    "q": ("queries", "hidden"),
    "k": ("keys", "hidden"),
    "v": ("keys", "hidden"),
    "o": ("hidden", "queries"),
    "gate": ("inner", "hidden"),
    "up": ("inner", "hidden"),
    "down": ("hidden", "inner"),
    "embedding": (None, "hidden"),
    "head": (None, "hidden"),
    "norm": ("hidden",),
}
_INNER = {"q_norm": "queries", "k_norm": "keys"}


@dataclass(frozen=True)
class AxisPosition:
    """Where a tensor belongs: its `layer` (None outside the blocks), its name inside the layer, its part (`q`, `o.bias`, `norm`,
    `q_norm`, `other`, ...), and which space each dimension grows with (None: with none)."""

    layer: int | None
    rest: str
    part: str
    spaces: tuple[str | None, ...]


class Body:
    """The layers and parts of a checkpoint's model. Raises `MismatchError` for a model whose parts are not understood."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.config = checkpoint.path, checkpoint.config
        hold_against(self.config, (tensor.spec for tensor in checkpoint.tensors.values()), self.path)
        anatomy = anatomy_of_config(self.config)
        self.layers, self.tied = len(anatomy.blocks), anatomy.tied
        self.prefix = _prefix(anatomy.blocks[0], checkpoint)
        self._pattern = re.compile(rf"^{re.escape(self.prefix)}(\d+)\.(.+)$")
        self._parts = _parts_of_block(anatomy.blocks[0]) | _parts_outside(anatomy)
        self.output_norms = _output_norms(anatomy.blocks[0])
        self.closed = "down" in anatomy.blocks[0].matrices()
        shapes = {self._inside(name): tensor.shape for name, tensor in checkpoint.tensors.items()}
        self._inner = {part: shapes[rest] for rest, part in self._parts.items() if part in _INNER and rest in shapes}
        self._checkpoint_names = list(checkpoint.tensors)

    @property
    def heads(self) -> dict[str, int]:
        """Heads of queries and of keys."""
        queries = int(self.config["num_attention_heads"])
        return {"queries": queries, "keys": int(self.config.get("num_key_value_heads") or queries)}

    @property
    def head_size(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def normed(self) -> bool:
        """Whether queries and keys are normalised, of each head alone or of all together."""
        return bool(self._inner)

    @property
    def normed_over_heads(self) -> bool:
        """Whether queries and keys are normalised over all their heads together, so that added heads change what is there."""
        return any(self._grows(part) for part in self._inner)

    def place(self, name: str) -> AxisPosition:
        """Where the tensor of this name belongs."""
        match = self._pattern.match(name)
        layer, rest = (int(match[1]), match[2]) if match else (None, name)
        part = self._parts.get(rest, "other")
        base, _, kind = part.partition(".")
        if part in self._inner:
            return AxisPosition(layer, rest, part, (_INNER[part] if self._grows(part) else None,))
        spaces = _SPACES.get("norm" if base in ("norm", "final_norm") else base, ())
        return AxisPosition(layer, rest, part, spaces[:1] if kind == "bias" else spaces)

    def name(self, layer: int | None, rest: str) -> str:
        """The name of a tensor of a layer."""
        return rest if layer is None else f"{self.prefix}{layer}.{rest}"

    def deepened(self, layer_of: list[int]) -> dict[str, Any]:
        """config.json with as many layers as `layer_of` names, each with what the config says of its small layer."""
        key = next((key for key in DEPTHS if key in self.config), None)
        if key is None:
            raise MismatchError(f"{self.path}: config.json has none of {', '.join(DEPTHS)}, so its number of layers cannot be changed.")
        each = {
            k: [v[i] for i in layer_of] for k, v in self.config.items() if isinstance(v, list) and len(v) == self.layers and k.startswith(("layer", "no_rope"))
        }
        return {**self.config, key: len(layer_of), **each}

    def refuse_width(self) -> None:
        """Raise `MismatchError` if this model cannot be widened."""
        family = self.config.get("model_type")
        if family not in WIDE:
            raise MismatchError(
                f"{self.path} is of the family '{family}'; widening is known for {', '.join(WIDE)}. Any family grows in depth (factor, layers)."
            )
        strange = next((name for name in self._checkpoint_names if self.place(name).part == "other"), None)
        if strange is not None:
            raise MismatchError(f"{self.path}: what '{strange}' does is not known, so it cannot be widened.")

    def refuse_open(self) -> None:
        """Raise `MismatchError` if no single matrix ends the MLP, as in mixtures of experts."""
        if not self.closed:
            raise MismatchError(
                f"{self.path}: the MLP has no single matrix that ends it, so a layer cannot be made to do nothing; `cairn grow stack` copies layers whole."
            )

    def _grows(self, part: str) -> bool:
        size = self.heads[_INNER[part]] * self.head_size
        return self._inner[part] == (size,) and size != self.head_size

    def _inside(self, name: str) -> str:
        match = self._pattern.match(name)
        return match[2] if match else name


_bodies: WeakKeyDictionary[Checkpoint, Body] = WeakKeyDictionary()


def body_of(checkpoint: Checkpoint) -> Body:
    """The body of a checkpoint, found once."""
    if checkpoint not in _bodies:
        _bodies[checkpoint] = Body(checkpoint)
    return _bodies[checkpoint]


def _prefix(block: BlockParts, checkpoint: Checkpoint) -> str:
    """What stands before a layer's number in this checkpoint's names; files from elsewhere may lack the outermost module."""
    whole = block.name.removesuffix("0")
    for prefix in (whole, whole.partition(".")[2]):
        if prefix and any(name.startswith(f"{prefix}0.") for name in checkpoint.tensors):
            return prefix
    raise MismatchError(f"{checkpoint.path}: no tensor begins with '{whole}0.', so its layers are not where its family has them.")


def _parts_of_block(block: BlockParts) -> dict[str, str]:
    cut = len(block.name) + 1
    found = {}
    for part, matrix in block.matrices().items():
        found[matrix.weight[cut:]] = part
        if matrix.bias is not None:
            found[matrix.bias[cut:]] = f"{part}.bias"
    for norm in block.norms:
        found[f"{norm[cut:]}.weight"], found[f"{norm[cut:]}.bias"] = "norm", "norm.bias"
    for norm in block.inner_norms:
        found[f"{norm[cut:]}.weight"] = "q_norm" if norm.rpartition(".")[2].startswith("q") else "k_norm"
    return found


def _parts_outside(anatomy: Anatomy) -> dict[str, str]:
    found = {anatomy.embedding: "embedding"}
    if not anatomy.tied:
        found[anatomy.head] = "head"
    if anatomy.final_norm is not None:
        found[f"{anatomy.final_norm}.weight"], found[f"{anatomy.final_norm}.bias"] = "final_norm", "final_norm.bias"
    return found


def _output_norms(block: BlockParts) -> set[str]:
    """Weights of the norms that stand behind attention and MLP where nothing is normalised before them (OLMo 2)."""
    names = [norm.rpartition(".")[2] for norm in block.norms]
    if "post_feedforward_layernorm" not in names or any(name.startswith(("pre_", "input_")) for name in names):
        return set()
    return {f"{name}.weight" for name in names if name.startswith("post_")}
