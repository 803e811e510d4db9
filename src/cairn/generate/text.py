"""Continue a text from a checkpoint: what `cairn generate` calls."""

from __future__ import annotations

from pathlib import Path

from cairn.checkpoint import read
from cairn.errors import InputError
from cairn.generate.sample import generate_text


def generate(
    checkpoint: str | Path | read.Checkpoint,
    prompt: str,
    *,
    new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The text that the model of `checkpoint` (a checkpoint, a run, a transformers directory) writes after `prompt`.

    Options as in `cairn.generate.sample.generate`. Raises `InputError` when the checkpoint has no tokenizer.
    """
    opened = checkpoint if isinstance(checkpoint, read.Checkpoint) else read.open(checkpoint)
    if opened.tokenizer is None:
        raise InputError(f"{opened.path} has no tokenizer.json, so text can not become tokens; copy its tokenizer files there.")
    options = {"max_new_tokens": new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return generate_text(opened.model(), opened.tokenizer, prompt, **options)  # type: ignore[arg-type]
