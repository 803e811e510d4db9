"""Values that operations refuse by name: numbers that are not finite, and codes of quantized weights, which are no numbers to compute with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError, MismatchError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Codes of the dtypes in which operations compute."""


def finite(values: torch.Tensor) -> bool:
    """Whether all values are finite; values of dtypes without infinities are.

    Examples
    --------
    >>> finite(torch.tensor([1.0, 2.0])), finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if not values.is_floating_point() or values.dtype.itemsize == 1:
        return True
    # A sum is one pass; only where it is not finite (it may also be too large) the values are looked at one by one.
    total = values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def refuse_non_finite(name: str, values: torch.Tensor, before: torch.Tensor | None = None, begin: int = 0) -> None:
    """Raise `InputError` with the tensor and the item if `values`, items from `begin` on, are not all finite; `before` are they before a cast."""
    if finite(values):
        return
    flat = values.reshape(-1)
    at = int(torch.isfinite(flat).logical_not_().nonzero()[0])
    item = begin + at
    if before is not None and finite(before):
        raise InputError(
            f"'{name}' holds {float(before.reshape(-1)[at]):g} (item {item}), which {_called(values.dtype)} cannot say; choose bfloat16 or float32, or say "
            "that infinities are to be written (--allow-non-finite)."
        )
    raise InputError(
        f"'{name}' would hold {float(flat[at])} (item {item}): an input holds such values, or the options make them. "
        "Nothing was written; --allow-non-finite writes them nevertheless."
    )


def refuse_quantized(parents: Sequence[Checkpoint]) -> None:
    """Raise `MismatchError` with the tensor's name for weights that are stored as codes instead of numbers.

    Codes are: everything of a checkpoint whose config.json has a `quantization_config`; float8 values, which mean nothing without scales
    that lie elsewhere; integers where another parent has floating-point numbers.
    """
    for parent in parents:
        said = None if parent.is_adapter else parent.config.get("quantization_config")
        if said is not None:
            method = said.get("quant_method") if isinstance(said, dict) else None
            raise MismatchError(
                f"{parent.path} is quantized ({method or 'quantization_config in config.json'}): its tensors are codes, not numbers to compute with. "
                "Write it as bfloat16 with the library that quantized it, then give that."
            )
        for name, tensor in parent.stored.items():
            code = tensor.spec.dtype
            if code.startswith("F8"):
                raise MismatchError(
                    f"'{name}' of {parent.path} is stored as float8, whose values mean nothing without the scales beside them. "
                    "Write it as bfloat16 with the library that quantized it, then give that."
                )
            floating = next((other for other in parents if name in other.stored and other.stored[name].spec.dtype in FLOATS), None)
            if code not in FLOATS and floating is not None:
                raise MismatchError(
                    f"'{name}' is stored as {code} in {parent.path} and as {floating.stored[name].spec.dtype} in {floating.path}: integers are codes of a "
                    "quantized weight there. Write it as bfloat16 with the library that quantized it, then give that."
                )


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
