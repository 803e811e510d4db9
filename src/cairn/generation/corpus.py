"""Let a checkpoint write a corpus: documents from nothing, drawn from its plain distribution, none left out.

The folder that comes of it is a corpus of the data room (`{name: generated, path: FOLDER}`) and says which checkpoint wrote it and how.
What a document says depends on the seed and its number alone, up to rounding where another batch size adds up in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn import cache
from cairn.checkpoint.format import documents, read
from cairn.data.corpora.generated import PROVENANCE, TEXTS
from cairn.errors import InputError
from cairn.generation import limits
from cairn.generation.sample import generate
from cairn.randomness import seed_for

FORMAT = 1


def write_corpus(
    checkpoint: str | Path | read.Checkpoint,
    out: str | Path,
    size: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    longest: int = 256,
    seed: int = 0,
    batch: int = 64,
    device: Any = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:
    """Write documents into the new folder `out` until they hold `size` bytes of text; returns it.

    temperature, top_k, top_p: as in `generate`; the default is what the model believes. longest: tokens after which a document is cut off; batch:
    documents written at once; device: as `cairn.device.choose`; progress: told the bytes done. Raises
    `InputError` if `out` exists, or a checkpoint has no end-of-text token.
    """
    opened, out = checkpoint if isinstance(checkpoint, read.Checkpoint) else read.open(checkpoint), Path(out)
    _refuse(opened, out, size, longest)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "longest": longest, "seed": seed}
    texts: list[str] = []
    done = 0
    for text in _documents(opened, sampling, batch, device):
        texts.append(text)
        done += len(text.encode(errors="surrogatepass"))
        progress(done)
        if done >= size:
            break
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    provenance = {
        "format": FORMAT,
        "checkpoint": opened.digest,
        "model": opened.model_digest,
        "step": opened.step,
        "sampling": sampling,
        "filter": None,
        "documents": len(texts),
        "bytes": done,
        "texts": blake3(data).hexdigest(),
    }

    def fill(folder: Path) -> None:
        (folder / TEXTS).write_bytes(data)
        documents.keep_json(folder / PROVENANCE, provenance, indent=1)

    cache.publish(out, fill)
    return out


def as_source(folder: str | Path) -> dict[str, Any]:
    """The corpus as a recipe names it: with the digest of the checkpoint that wrote it."""
    provenance = documents.read_object(Path(folder) / PROVENANCE)
    return {"name": "generated", "path": str(folder), "checkpoint": provenance["checkpoint"]}


EMPTY = 1000
"""Documents without a byte in a row after which a model is taken to have fallen silent."""


def _documents(opened: read.Checkpoint, sampling: dict[str, Any], batch: int, device: Any) -> Iterator[str]:
    model, tokenizer = limits.model_of(opened, device).eval(), opened.tokenizer
    options = {key: sampling[key] for key in ("temperature", "top_k", "top_p")}
    begin, ends = tokenizer.prompt(""), limits.end_ids(model, tokenizer)
    number = silent = 0
    while True:
        seeds = [seed_for(sampling["seed"], "document", number + i) for i in range(batch)]
        found = generate(model, [begin] * batch, max_new_tokens=sampling["longest"], seed=seeds, end_ids=ends, **options)
        for ids in found:
            text = tokenizer.continuation(begin, ids)
            silent = 0 if text else silent + 1
            if silent == EMPTY:
                raise InputError(f"{opened.path} writes nothing but empty documents ({EMPTY} in a row), so the corpus cannot be filled.")
            yield text
        number += batch


def _refuse(opened: read.Checkpoint, out: Path, size: int, longest: int) -> None:
    if out.exists():
        raise InputError(f"{out} exists; a generated corpus is never overwritten, choose another place.")
    if opened.tokenizer is None or opened.tokenizer.begin_id is None:
        raise InputError(f"{opened.path} has no tokenizer with an end-of-text token, so it cannot begin a document.")
    if size < 1:
        raise InputError(f"A corpus has at least one byte, not {size}.")
    room = int(opened.config.get("max_position_embeddings", longest + 1))
    if longest + 1 > room:
        raise InputError(f"longest is {longest}, but the model has {room} positions, one of them for the end of the text before; ask for at most {room - 1}.")
