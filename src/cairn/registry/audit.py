"""Audits by name, as `cairn.audit`: can a checkpoint, its scores and what is claimed of it be trusted?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cairn.checkpoint.format.read import Checkpoint
from cairn.device import computes
from cairn.evaluation.audits.audit import formats, leakage
from cairn.evaluation.audits.flips import flips
from cairn.evaluation.audits.stability import stability
from cairn.registry import claims as _claims
from cairn.registry import risks as _risks
from cairn.registry.claims import Audit
from cairn.registry.portability import portability
from cairn.registry.risks import Risk

__all__ = ["claims", "flips", "formats", "leakage", "portability", "risks", "stability"]


@computes
def claims(source: str | Path | Checkpoint, *, device: Any = None, progress: Callable[[str], object] | None = None) -> list[Audit]:
    """Is what is claimed of a checkpoint true? Every claim with a protocol is measured again.

    Parameters
    ----------
    source
        A checkpoint or a run; the claims of its model card count, too.
    device
        Where the model computes, as `cairn.device.choose`.

    Returns
    -------
    list of Audit
        Each claim with its verdict: confirmed, over-claimed, under-claimed or unverifiable.

    Examples
    --------
    >>> [each.verdict for each in cairn.audit.claims("runs/a")]  # doctest: +SKIP
    ['confirmed']

    Source: "An Empirical Study of Pre-Trained Model Reuse in the Hugging Face Deep Learning Model Registry" (card 42, C).
    """
    return _claims.audit(source, progress=progress)


@computes
def risks(
    source: str | Path,
    *,
    every: bool = False,
    names: Sequence[str] = (),
    signers: str | Path | None = None,
    measure: bool = False,
    device: Any = None,
) -> dict[Path, list[Risk]]:
    """What could go wrong when a checkpoint is reused? Pickles, altered files, licenses along the lineage, names, signatures, claims.

    Parameters
    ----------
    source
        A checkpoint or a run; with `every`, a folder.
    every
        Audit every checkpoint under the folder.
    names
        Names that others must not be taken for.
    signers
        File of allowed signers.
    measure
        Measure claims again; default: judge them by what was measured.
    device
        Where claims are measured, as `cairn.device.choose`.

    Returns
    -------
    dict
        The risks of each checkpoint, gravest first.

    Raises
    ------
    NotFoundError
        Where there is no checkpoint.

    Examples
    --------
    >>> cairn.audit.risks("runs/a")  # doctest: +SKIP

    Source: "An Empirical Study of Pre-Trained Model Reuse in the Hugging Face Deep Learning Model Registry" (card 42, D).
    """
    if every:
        return _risks.audit_all(source, names=names, signers=signers, measure=measure)
    return {Path(source): _risks.audit(source, names=names, signers=signers, measure=measure)}
