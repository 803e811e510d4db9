"""What becomes of the memory that a training step on a CPU frees."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
LARGEST = 1 << 30
"""Larger blocks still come from the system and go back to it at once."""


def keep() -> bool:
    """Keep what is freed for the next step, which wants the same sizes again, instead of giving it back to the system.

    glibc returns large blocks when they are freed, and every page that a step gets anew is a fault and is filled with
    zeros first: a ninth to a seventh of a step of transformers' (docs/benchmarks/train_step.md). The process then stays as
    large as its largest step was. False where the C library is another one, and nothing is changed.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        assert library.gnu_get_libc_version is not None
    except (OSError, AttributeError, TypeError):
        return False
    # Versions before 2.35 take no threshold above 32 MiB.
    large = any(mallopt(MMAP_THRESHOLD, size) for size in (LARGEST, 32 << 20))
    return bool(large and mallopt(TRIM_THRESHOLD, 2**31 - 1))
