"""Adaptation: what is done with adapters once they are trained. They themselves live in `cairn.models.adapters`."""

from __future__ import annotations

from typing import ClassVar

from cairn.checkpoint.operating.stream import Operation


class Adaptation(Operation):
    """An adapter and its base to a whole model."""

    catalog_kind: ClassVar[str] = "adaptation"
