"""Which matrices of a model an adapter or a recipe means: by what they do, by the last part of their names, or by a pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from cairn.errors import InputError, suggestion
from cairn.models.anatomy import Anatomy, Matrix

_ATTENTION = ("q", "k", "v", "qkv", "o", "cross_q", "cross_k", "cross_v", "cross_o")
_MLP = ("gate", "up", "gate_up", "down")
ROLES: dict[str, tuple[str, ...]] = {
    **{part: (part,) for part in (*_ATTENTION, *_MLP)},
    "query": ("q", "cross_q"),
    "key": ("k", "cross_k"),
    "value": ("v", "cross_v"),
    "output": ("o", "cross_o"),
    "attention": _ATTENTION,
    "mlp": _MLP,
    "all": _ATTENTION + _MLP,
    "all-linear": _ATTENTION + _MLP,
}
"""Words for parts of a block, and the parts of `cairn.models.anatomy` that they mean."""


def matrices_for(anatomy: Anatomy, targets: Sequence[str]) -> dict[str, Matrix]:
    """The matrices that `targets` mean, by the names of their modules, in the order of the model.

    Raises `InputError` for a target that matches nothing, with the nearest names that would.
    """
    there = {matrix.weight.removesuffix(".weight"): (role, matrix) for block in anatomy.blocks for role, matrix in block.matrices().items()}
    chosen: set[str] = set()
    for target in targets:
        found = [name for name, (role, _) in there.items() if role in ROLES.get(target, ()) or names_match(name, target)]
        if not found:
            roles = list(dict.fromkeys(role for role, _ in there.values()))
            words = [*(word for word, parts in ROLES.items() if set(parts) & set(roles)), *dict.fromkeys(name.rsplit(".", 1)[-1] for name in there)]
            near = suggestion(target, [*words, *there] if "." in target else words)
            raise InputError(
                f"adapter.targets: '{target}' matches no matrix in the blocks of this model.{near} "
                f"Its matrices are {', '.join(roles)}, the first is '{next(iter(there))}'."
            )
        chosen.update(found)
    return {name: matrix for name, (_, matrix) in there.items() if name in chosen}


def names_match(name: str, pattern: str) -> bool:
    """Whether a dotted name is the pattern, ends with it after a dot, or fits it as a shell pattern (`*`, `?`, `[0-3]`), whole or from a dot on."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def parameters_for(names: Iterable[str], patterns: Sequence[str], key: str = "trainable") -> list[str]:
    """The parameters whose names fit one of the patterns; a pattern may also name a module, which means all of its parameters.

    Raises `InputError` for a pattern that matches nothing, with the nearest names.
    """
    known = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in known if any(names_match(part, pattern) for part in _and_around(name))]
        if not found:
            words = dict.fromkeys(part.rsplit(".", 1)[-1] for name in known for part in _and_around(name))
            near = suggestion(pattern, known if "." in pattern else words)
            raise InputError(f"{key}: '{pattern}' matches no parameter of this model.{near} The first is '{known[0]}'.")
        chosen.update(found)
    return [name for name in known if name in chosen]


def _and_around(name: str) -> list[str]:
    """A parameter's name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
