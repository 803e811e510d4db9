"""Adapters: a few new numbers beside a model whose own weights stay as they are.

An adapter's options say what is added to which matrices; `cairn.models.adapters.container.attach` puts it onto any causal language
model or encoder-decoder whose anatomy is known. Files have PEFT's names, so that `peft` loads them and its files are read here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator

from cairn.options import Options

if TYPE_CHECKING:
    from cairn.models.adapters.layer import AdapterLayer
    from cairn.models.anatomy import Matrix


class Adapter(Options, ABC):
    """Base of all adapters' options."""

    catalog_kind: ClassVar[str] = "adapter"
    peft_type: ClassVar[str]
    """What `adapter_config.json` calls this adapter."""

    targets: list[str] = ["all"]
    """Which matrices of the blocks: by what they do (`q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `gate_up`, `down`, or `attention`, `mlp`, `all`), by
    the last part of their names (`q_proj`), or by a pattern of whole names (`model.layers.[0-3].*.down_proj`)."""

    @field_validator("targets", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _some(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("an adapter without targets changes nothing; name some, or leave targets out for all matrices of the blocks.")
        return value

    @abstractmethod
    def layer(self, matrix: Matrix) -> AdapterLayer:
        """What is added to one matrix, on the default device; its values are drawn later."""

    @abstractmethod
    def shape_of(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(outputs, inputs) of the matrix, from the shapes of what is stored for it. Raises `MismatchError` where these do not fit."""

    @abstractmethod
    def count(self, matrix: Matrix) -> int:
        """Numbers that are trained for one matrix."""

    @abstractmethod
    def to_peft(self) -> dict[str, Any]:
        """The keys of `adapter_config.json` that belong to this kind of adapter."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The options that an `adapter_config.json` of this kind describes. Raises `MismatchError` for what is not supported here."""
