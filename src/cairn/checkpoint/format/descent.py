"""Descent: from a checkpoint to its parents and theirs, as far as they can still be found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from cairn.checkpoint.format import read
from cairn.checkpoint.format.lineage import Parent, bytes_in
from cairn.checkpoint.format.place import follow, permitted
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import CairnError


def ancestors(checkpoint: Checkpoint) -> Iterator[tuple[int, Parent, Checkpoint | None]]:
    """Walk the whole descent, nearest first: (generations back, parent, the checkpoint if it can still be found)."""
    seen = {checkpoint.digest}
    level: list[Checkpoint] = [checkpoint]
    depth = 0
    while level:
        depth += 1
        following = []
        for child in level:
            for parent in child.lineage.parents if child.lineage else []:
                if parent.digest in seen:
                    continue
                seen.add(parent.digest)
                found = find(parent, child.path)
                yield depth, parent, found
                if found is not None:
                    following.append(found)
        level = following


def find(parent: Parent, child: Path) -> Checkpoint | None:
    """The parent of the checkpoint at `child`: at its hinted path, else among the child's neighbours; the digest decides.

    A plain directory is digested only where the number of its bytes is that of the parent. A hint that is a URL is passed over unless it may be
    opened (`place.permitted`).
    """
    home = child.resolve().parent
    hinted: list[str | Path] = [parent.path] if parent.path and ("://" not in parent.path or permitted(parent.path)) else []
    beside = (path for path in sorted(home.iterdir()) if path.is_dir() and not path.name.startswith("."))
    for path in itertools.chain(hinted, beside):
        try:
            candidate = read.open(follow(home, path) if isinstance(path, str) else path)
            if (candidate.is_ours or parent.bytes == bytes_in(candidate.path)) and candidate.digest == parent.digest:
                return candidate
        except (CairnError, OSError, ValueError):  # ValueError: a hint that is no path, such as one with a zero byte
            continue  # not a checkpoint, or no longer readable: not the parent that we look for
    return None
