"""Continue a text from a checkpoint: what `cairn generate` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.data.text.metadata import Metadata
from cairn.errors import InputError
from cairn.generation.limits import model_of
from cairn.generation.sample import generate_text


def generate(
    checkpoint: str | Path | read.Checkpoint,
    prompt: str,
    *,
    new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    metadata: str | None = None,
    stop: Sequence[str] = (),
    device: Any = None,
    dtype: str | None = None,
) -> str:
    """The text that the model of `checkpoint` (a checkpoint, a run, a transformers directory) writes after `prompt`.

    Options as in `cairn.generation.sample.generate`. stop: strings that end the text, which may be tokens that are no text; device: as
    `cairn.device.choose`; dtype: `float32` or `bfloat16`, by default that of the stored weights; metadata: what the text is said to come
    from (a host, say), in the form in which the model has seen it in training. Raises `InputError` when the checkpoint has no
    tokenizer, or was not trained with metadata.
    """
    opened = checkpoint if isinstance(checkpoint, read.Checkpoint) else read.open(checkpoint)
    if opened.tokenizer is None:
        family = str(opened.config.get("model_type"))
        if catalog.has("architecture", family) and (reads := catalog.get("architecture", family).implementation.reads) != "tokens":
            raise InputError(f"{opened.path} is a '{family}', which reads {reads} and writes no text; `cairn explain {opened.path}` shows what it says.")
        raise InputError(f"{opened.path} has no tokenizer.json, so text cannot become tokens; copy its tokenizer files there.")
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options["front"] = _shown(opened, metadata) if metadata is not None else ""
    return generate_text(model_of(opened, device, dtype), opened.tokenizer, prompt, stop=stop, **options)


def _shown(checkpoint: read.Checkpoint, value: str) -> str:
    """The text in front of a document that has this metadata."""
    recipe = checkpoint.lineage.options.get("recipe", {}) if checkpoint.lineage is not None else {}
    described = recipe.get("data", {}).get("metadata")
    if described is None:
        raise InputError(f"{checkpoint.path} was not trained with metadata (data.metadata), so it has no form for them; write what you mean into the prompt.")
    return Metadata.parse(described).shown(value)
