"""Filters: which training sequences count in the loss.

A filter looks at whole sequences as they come from the feed, on the loader's thread. What it does not keep is still read,
in its place of the global order, with weight 0: the order, and the resume, do not depend on the filter's answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cairn.options import Options


class Filter(Options, ABC):
    """Base of all filters."""

    catalog_kind: ClassVar[str] = "filter"

    @abstractmethod
    def keeps(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of n sequences of `tokens` (n, L) counts, (n,). Padding is there as negative numbers, all different."""
