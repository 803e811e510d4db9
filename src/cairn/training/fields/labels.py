"""Models that tell classes apart: their names, under the keys of config.json that Hugging Face has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator

from cairn.options import Options


class Labelled(Options):
    """A part of the options of a family: the classes by their numbers, from 0 without a gap."""

    id2label: dict[str, str] = {"0": "LABEL_0", "1": "LABEL_1"}
    """The classes by their numbers; left open, the data's."""

    @field_validator("id2label", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return {str(number): name for number, name in value.items()} if isinstance(value, Mapping) else value

    @field_validator("id2label")
    @classmethod
    def _without_gaps(cls, value: dict[str, str]) -> dict[str, str]:
        if not value or set(value) != {str(number) for number in range(len(value))}:
            raise ValueError(f"id2label: classes are numbered from 0 without a gap, not {', '.join(value) or 'none at all'}.")
        return {str(number): value[str(number)] for number in range(len(value))}

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by number."""
        return list(self.id2label.values())


def class_logits(classes: Sequence[str], shape: Sequence[str], axes: Sequence[str]) -> dict[str, Any]:
    """What a model of these classes gives, for its signature: the last axis are the classes."""
    named = f"{', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}"
    return {
        **{"name": "logits", "dtype": "float32", "shape": list(shape), "axes": [*axes, f"class, by its number in id2label: {named}"]},
        "units": "natural logarithm of unnormalised probability; softmax over the last axis gives probabilities",
    }
