"""A folder ready for a model hub: weights, config, tokenizer, the card, and the signature of inputs and outputs with its example."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cairn.checkpoint.foreign.export import export
from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError
from cairn.registry import modelcard
from cairn.registry.card import card
from cairn.registry.explain import explain

ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def export_hub(
    source: str | Path | Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Write a folder to upload as it is. Raises `InputError` if `out` exists; nothing is visible before all is written."""
    checkpoint, path = source if isinstance(source, Checkpoint) else read.open(source), Path(out)
    if path.exists():
        raise InputError(f"{path} exists; an export is never written over something, choose another name.")
    staging = path.with_name(f".exporting-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        made = export(checkpoint, staging, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
        text = card(checkpoint, where=path.name)
        signature = explain(made, store=False)
        modelcard.write(staging / "README.md", text)
        document = {key: value for key, value in asdict(signature).items() if key in ("inputs", "outputs", "example")}
        documents.keep_json(staging / "signature.json", document, indent=1)
        (staging / ".gitattributes").write_text(ATTRIBUTES, encoding="utf-8")
        digest = made.digest
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"path": str(path), "digest": digest, "completeness": modelcard.score(text).completeness, "files": sorted(os.listdir(path))}
