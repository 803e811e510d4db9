"""Kernels in C, compiled for this very processor when they are first needed.

There are few, and each earns its place by a benchmark: what torch and numpy do well stays theirs. Where a kernel cannot
be had, for want of a C compiler or because CAIRN_NATIVE=0, its caller takes torch's own path, which computes the same up
to rounding. Compiled files lie in the user's cache, one for each source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

from cairn import cache

FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared"]
"""-march=native: the file serves this processor alone, which is why the processor is part of its key."""
THREADS = "#pragma omp"
"""Sources with this run on torch's own threads: import torch first, whose OpenMP then serves both."""
_LOADED: set[str] = set()


def loaded() -> list[str]:
    """Names of the kernels that this process uses: they matter for the last bits of what it computes."""
    return sorted(_LOADED)


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled C file, or None where there is none to be had; a compiler that fails is warned of."""
    compiler = _compiler()
    if compiler is None or os.environ.get("CAIRN_NATIVE") == "0":
        return None
    try:
        found = ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        warnings.warn(f"{source.name} could not be compiled, torch's own kernels serve instead: {said[0] if said else error}", stacklevel=2)
        return None
    _LOADED.add(source.stem)
    return found


@functools.cache
def compiler() -> str:
    """What compiles the kernels here, as it names itself, or why torch's own serve instead: either decides the last bits of what is computed."""
    found = _compiler()
    if os.environ.get("CAIRN_NATIVE") == "0":
        return "off"
    if found is None:
        return "no compiler"
    said = subprocess.run([*found, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0] if said else found[0]


@functools.cache
def processor_name() -> str:
    """The processor, as it names itself."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))), platform.processor() or platform.machine())


def _compiler() -> list[str] | None:
    """The words of $CC, else the first C compiler on the path."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _compiled(source: Path, compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    flags = [*FLAGS, *(["-fopenmp"] if THREADS in texts[0] else [])]
    key = hashlib.blake2b("\0".join([*texts, *compiler, version, *flags, processor()]).encode(), digest_size=12)
    folder = cache.directory() / "native" / f"{source.stem}-{key.hexdigest()}"
    name = f"{source.stem}.so"
    if not folder.exists():
        cache.publish(
            folder, lambda hidden: subprocess.run([*compiler, *flags, str(source), "-o", str(hidden / name), "-lm"], capture_output=True, text=True, check=True)
        )
    return folder / name


@functools.cache
def processor() -> str:
    """What tells processors apart whose instructions differ: a home directory may be shared among several."""
    lines = [platform.machine(), platform.processor()]
    if (described := Path("/proc/cpuinfo")).exists():
        first = described.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
        lines += [line for line in first if line.startswith(("vendor_id", "model", "flags", "Features", "CPU part", "CPU implementer"))]
    return "\n".join(lines)
