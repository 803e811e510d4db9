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

from blake3 import blake3

from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.sameness import vocabulary_digest
from cairn.device import choose, computes
from cairn.registry import statements
from cairn.registry.challenges import NotExplained

PROMPT = "The first stone of the trail is"
TOLERANCE = 1e-5
"""Largest difference of a stored score that counts as the same."""
KEPT_SCORES = 16


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

    With `prompt`, that text is shown and nothing is stored; `device` as `cairn.device.choose`. Raises `NotExplained` with a category where the tokenizer or
    the labels are missing without which numbers mean nothing.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    signature = signature_of(checkpoint)
    stored = statements.kept(checkpoint, "example") if prompt is None else None
    began = time.perf_counter()
    example = _run(checkpoint, stored["example"]["prompt"] if stored else prompt or PROMPT)
    seconds = time.perf_counter() - began
    difference = _difference(stored["example"], example) if stored else None
    if stored is None and prompt is None and store:
        statements.keep(checkpoint, "example", {**signature, "example": example})
    holds = None if difference is None else difference <= TOLERANCE
    return Explanation(signature["inputs"], signature["outputs"], example, holds, difference, checkpoint.tensors.nbytes, seconds)


def signature_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Names, dtypes, shapes and meanings of a language model's inputs and outputs. Raises `NotExplained`."""
    config = checkpoint.config
    if any("Classification" in str(name) for name in config.get("architectures") or []) and not config.get("id2label"):
        raise NotExplained(f"{checkpoint.path}: config.json has no id2label, so nobody knows which class an output is.", "outputs")
    if checkpoint.tokenizer is None:
        raise NotExplained(f"{checkpoint.path} has no tokenizer.json, so nobody knows which text an id is.", "tokenizer")
    tokenizer, width = checkpoint.tokenizer, int(config["vocab_size"])
    made_by = vocabulary_digest(checkpoint)
    longest = config.get("max_position_embeddings")
    ids = {
        **{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "longest_sequence": longest},
        **{"values": f"ids of tokens, 0 to {width - 1}", "made_by": f"tokenizer.json{f' {made_by[:12]}' if made_by else ''}"},
        "named_ids": tokenizer.vocab_size,
    }
    axes = ["one text of the batch", "position: scores for the token AFTER it", f"token: id 0 to {width - 1} in the tokenizer's vocabulary"]
    logits = {
        **{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", "vocabulary"], "axes": axes},
        "units": "natural logarithm of unnormalised probability; softmax over the last axis gives probabilities",
    }
    return {"inputs": [ids], "outputs": [logits]}


def _run(checkpoint: Checkpoint, prompt: str) -> dict[str, Any]:
    import torch

    tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode(prompt)
    if not ids:
        raise NotExplained(f"{checkpoint.path}: its tokenizer makes no token of {prompt!r}.", "tokenizer")
    where = choose()
    model = checkpoint.model(dtype=torch.float32, device=where)
    with torch.no_grad():
        scores = model(torch.tensor([ids], device=where)).logits[0, -1].cpu().double()
    chances = scores.softmax(-1)
    top = torch.topk(chances, min(5, len(chances))).indices.tolist()
    shown = list(range(0, len(scores), max(1, len(scores) // KEPT_SCORES)))[:KEPT_SCORES]
    return {
        "prompt": prompt,
        "input_ids": ids,
        "input_digest": blake3(repr(ids).encode()).hexdigest(),
        "top": [{"id": token, "text": tokenizer.decode([token]), "probability": float(chances[token])} for token in top],
        "scores": {str(token): float(scores[token]) for token in dict.fromkeys([*top, *shown])},
    }


def _difference(stored: dict[str, Any], now: dict[str, Any]) -> float:
    """Largest difference of a stored score; infinite where other tokens came in or scores are missing."""
    if stored["input_digest"] != now["input_digest"]:
        return float("inf")
    # Of two nearly equal tokens another may come out on top: what was stored is asked for by its id.
    return max(abs(score - now["scores"].get(token, float("inf"))) for token, score in stored["scores"].items())
