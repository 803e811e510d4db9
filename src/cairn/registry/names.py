"""Names that are meant to be taken for others, and what a name says of the type of a model.

A near-duplicate is a name that few keystrokes or look-alike letters turn into a known one. Names that differ only in a number are
versions and sizes, not disguises ("An Empirical Study of Pre-Trained Model Reuse", card 42, D: edit distance at most 2).
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

DISTANCE = 2
_ALIKE = str.maketrans({"0": "o", "1": "l", "3": "e", "5": "s", "|": "l", "а": "a", "е": "e", "о": "o", "р": "p", "с": "c", "і": "i", "ѕ": "s"})
_TYPES = {
    "deberta": "deberta", "xlm-roberta": "xlm-roberta", "xlm_roberta": "xlm-roberta", "xlmr": "xlm-roberta", "roberta": "roberta", "distilbert": "distilbert",
    "distilroberta": "roberta", "albert": "albert", "camembert": "camembert", "mobilebert": "mobilebert", "bert": "bert", "distilgpt2": "gpt2",
    "gpt2": "gpt2", "gpt-2": "gpt2", "gpt-neox": "gpt-neox", "gpt-neo": "gpt-neo", "gpt-j": "gpt-j", "gpt": "gpt", "mt5": "mt5", "byt5": "t5", "flan-t5": "t5",
    "t5": "t5", "wav2vec2": "wav2vec2", "wav2vec": "wav2vec2", "hubert": "hubert", "whisper": "whisper", "opus-mt": "marian", "marian": "marian",
    "mbart": "mbart", "bart": "bart", "pegasus": "pegasus", "electra": "electra", "xlnet": "xlnet", "xlm": "xlm", "vit": "vit", "deit": "deit", "swin": "swin",
    "clip": "clip", "llama": "llama", "bloom": "bloom", "opt": "opt", "longformer": "longformer", "bigbird": "bigbird", "layoutlm": "layoutlm",
}  # fmt: skip
"""What a part of a name says of the type; the longest that fits decides, so that deberta is no bert."""
_WHOLE = {"opt", "vit", "gpt", "clip", "xlm", "bloom", "swin", "t5", "bart"}
"""Parts so short that they must stand alone between separators, or at least begin there."""


def distance(a: str, b: str, limit: int | None = None) -> int:
    """Edit distance (insertions, deletions, exchanges of one letter, swaps of neighbours); anything above `limit` comes out as limit + 1."""
    if limit is not None and abs(len(a) - len(b)) > limit:
        return limit + 1
    before, row = list[int](), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, earlier[j - 2] + 1)
            row.append(best)
        if limit is not None and min(row) > limit:
            return limit + 1
    return row[-1] if limit is None else min(row[-1], limit + 1)


@dataclass(frozen=True)
class Lookalike:
    """`name` may be taken for `known`, and why."""

    name: str
    known: str
    reason: str


class Known:
    """Names that others must not be taken for."""

    def __init__(self, names: Iterable[str], limit: int = DISTANCE) -> None:
        self.names = set(names)
        self.limit = limit
        self._by_length: dict[int, list[tuple[str, str, list[str]]]] = defaultdict(list)
        self._by_look: dict[str, str] = {}
        for name in sorted(self.names):
            low = name.lower()
            self._by_look.setdefault(look(name), name)
            # An edit touches at most two of the pieces (a swap over a cut): a near name holds at least one of them as it is.
            cuts = [len(low) * part // (2 * limit + 1) for part in range(2 * limit + 2)]
            self._by_length[len(low)].append((low, name, [low[a:b] for a, b in itertools.pairwise(cuts)]))

    def lookalike(self, name: str) -> Lookalike | None:
        """The known name that `name` may be taken for; None for a known name itself and for one unlike all of them."""
        if name in self.names:
            return None
        same = self._by_look.get(look(name))
        if same is not None and numbers_apart(name, same) is None:
            return Lookalike(name, same, "looks the same")
        low = name.lower()
        for length in range(len(low) - self.limit, len(low) + self.limit + 1):
            for other, known, pieces in self._by_length.get(length, ()):
                # Of a short name a single keystroke is already much.
                allowed = min(self.limit, len(other) // 4)
                if allowed and any(piece in low for piece in pieces) and numbers_apart(low, other) is None:
                    found = distance(low, other, allowed)
                    if found <= allowed:
                        return Lookalike(name, known, f"{found} keystroke{'s' if found > 1 else ''} apart")
        return None


def look(name: str) -> str:
    """A name as a hasty reader sees it: no case, no separators, look-alike letters as one."""
    return re.sub(r"[-_. ]", "", name.lower()).translate(_ALIKE).replace("rn", "m").replace("vv", "w")


def numbers_apart(a: str, b: str) -> str | None:
    """What two names that differ only in numbers have in common; None for others."""
    stems = [re.sub(r"\d+", "#", name.lower()) for name in (a, b)]
    return stems[0] if stems[0] == stems[1] and "#" in stems[0] and a.lower() != b.lower() else None


def model_type(name: str) -> str | None:
    """The type that a name speaks of: the longest known part of it decides; None if it speaks of none."""
    low = name.lower()
    found = [part for part in _TYPES if (re.search(rf"(?:^|[^a-z]){re.escape(part)}", low) if part in _WHOLE else part in low)]
    return _TYPES[max(found, key=len)] if found else None
