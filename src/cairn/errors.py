"""Errors that a user is meant to read: one plain sentence that says what was wrong, where, and what to do.

Everything raised on purpose derives from `CairnError`. The command line prints the sentence without a
traceback and leaves with `exit_status`; anything else that escapes is a defect of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CairnError(Exception):
    """Base of all errors that are answers to a user, not defects. `exit_status` is what the command returns."""

    exit_status = 2


class InputError(CairnError):
    """What was asked for cannot be done as asked: a bad option, a missing file, an impossible combination."""


class NotFoundError(InputError):
    """Something that was named does not exist; the message names the nearest thing that does."""


class MismatchError(InputError):
    """Inputs that do not belong together: other shapes, another tokenizer, another family."""


class NotExplained(InputError):
    """Something without which a model's inputs or outputs have no meaning is not there; `category` says what kind of help there is."""

    def __init__(self, sentence: str, category: str) -> None:
        super().__init__(f"{sentence} (cairn doctor {category})")
        self.category = category


class DamagedError(CairnError):
    """Bytes on disk are not the bytes that were written."""


class ResumeError(CairnError):
    """A run cannot be continued exactly; the message says what is missing."""


class DivergedError(CairnError):
    """Training met a non-finite loss or gradient and the recipe's policy is to stop."""

    exit_status = 1


class Notice(UserWarning):
    """Something that a user should know and that stops nothing: a strange name or a broken line that was passed over. Said once."""


class WorkerError(CairnError):
    """A process that works for this one has failed and said why; `exit_status` is its own."""

    def __init__(self, sentence: str, exit_status: int = 2) -> None:
        super().__init__(sentence)
        self.exit_status = exit_status


class InterruptedRun(KeyboardInterrupt):
    """Somebody has ended a run on purpose; the message says what is saved and how to go on."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of `known`, or a list of what there is. Begins with a blank; never empty if `known` is not."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    if not names:
        return ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f" There is: {shown}."
