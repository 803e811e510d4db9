"""What becomes of the memory that a training step on a CPU frees."""

from __future__ import annotations

import ctypes
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
LARGEST = 1 << 30
"""Larger blocks still come from the system and go back to it at once. The heap grows by as much at a time."""
HUGE_PAGES = 14
"""MADV_HUGEPAGE of madvise(2)."""


def keep() -> bool:
    """Keep what is freed for the next step, which wants the same sizes again, instead of giving it back to the system; in huge pages, where
    the system has them on request.

    glibc returns large blocks when they are freed, and every page that a step gets anew is a fault and is filled with
    zeros first: in virtual machines up to a fifth of a step (docs/benchmarks/train_step.md). The process then stays as large
    as its largest step was. False where the C library is another one, and nothing is changed.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        assert library.gnu_get_libc_version is not None
    except (OSError, AttributeError, TypeError):
        return False
    # Versions before 2.35 take no threshold above 32 MiB.
    large = any(mallopt(MMAP_THRESHOLD, size) for size in (LARGEST, 32 << 20))
    kept = bool(large and mallopt(TRIM_THRESHOLD, 2**31 - 1))
    if kept and mallopt(TOP_PAD, LARGEST):
        _grow(library)
        _advise(library)
    return kept


def _grow(library: ctypes.CDLL) -> None:
    """Make the heap as large as it will be for a while, in addresses: memory is only what is written to."""
    library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    library.free(library.malloc(LARGEST // 2))


def _advise(library: ctypes.CDLL) -> None:
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    maps = Path("/proc/self/maps")
    for line in maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []:
        if line.endswith("[heap]"):
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            library.madvise(begin, end - begin, HUGE_PAGES)  # advice: a system that takes none goes on as before
