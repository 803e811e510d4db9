"""Compression: operations that make a checkpoint sparser or smaller. One file per method in `methods/`."""

from __future__ import annotations

from typing import ClassVar

from cairn.checkpoint.operating.stream import Operation


class Compression(Operation):
    """A checkpoint (and texts) to a sparser or smaller one; what sees texts is a `Calibrated` operation too."""

    catalog_kind: ClassVar[str] = "compression"
