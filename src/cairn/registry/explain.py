"""What goes into a model, what comes out, and a stored example that must still hold.

The signature names every input and output with dtype, shape and the meaning of each axis; the example is a prompt with the scores that
followed it. Asked again, the example is computed anew: it is a regression test of the checkpoint on this machine ("Deep
Learning Model Reuse in the HuggingFace Community", card 13, B).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.device import computes
from cairn.registry import statements
from cairn.training.fields import field_of

TOLERANCE = 1e-5
"""Largest difference of a stored score that counts as the same."""


@dataclass(frozen=True)
class Explanation:
    """The signature of a model, the example, and whether a stored example still held (None: there was none yet)."""

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    example: dict[str, Any]
    holds: bool | None
    difference: float | None
    weight_bytes: int
    seconds: float


@computes
def explain(source: str | Path | Checkpoint, *, prompt: str | None = None, store: bool = True, device: Any = None) -> Explanation:
    """Run the example of a checkpoint and say what its inputs and outputs are.

    What that is, the field of the checkpoint says: text, images, words. With `prompt` (a text, or the path of a picture), that is shown and
    nothing is stored; `device` as `cairn.device.choose`. Raises `NotExplained` with a category where the tokenizer or the labels are missing
    without which numbers mean nothing.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    field = field_of(checkpoint)
    signature = field.signature(checkpoint)
    stored = statements.kept(checkpoint, "example") if prompt is None else None
    began = time.perf_counter()
    example = field.example(checkpoint, stored["example"]["prompt"] if stored else prompt, device)
    seconds = time.perf_counter() - began
    difference = _difference(stored["example"], example) if stored else None
    if stored is None and prompt is None and store:
        statements.keep(checkpoint, "example", {**signature, "example": example})
    holds = None if difference is None else difference <= TOLERANCE
    return Explanation(signature["inputs"], signature["outputs"], example, holds, difference, checkpoint.tensors.nbytes, seconds)


def _difference(stored: dict[str, Any], now: dict[str, Any]) -> float:
    """Largest difference of a stored score; infinite where other tokens came in or scores are missing."""
    if stored["input_digest"] != now["input_digest"]:
        return float("inf")
    # Of two nearly equal tokens another may come out on top: what was stored is asked for by its id.
    return max(abs(score - now["scores"].get(token, float("inf"))) for token, score in stored["scores"].items())
