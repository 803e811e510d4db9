"""Import: a checkpoint of another program becomes one of ours, a few tensors in memory at a time.

The plan (`checkpoint/import_plan.py`) has refused what can be seen from headers; here values are read, compared, joined,
renamed and written to their places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn.checkpoint.foreign.import_plan import STEMS, ImportPlan, TensorGroup, plan
from cairn.checkpoint.foreign.layouts import WEIGHT, Slice
from cairn.checkpoint.foreign.patterns import AveragedCopies, spread
from cairn.checkpoint.foreign.spec import ShardSpec
from cairn.checkpoint.format import documents
from cairn.checkpoint.format.carried import TOKENIZER, carried_among
from cairn.checkpoint.format.dtypes import DTYPES
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.values import refuse_non_finite
from cairn.checkpoint.saving.write import Writer, as_bytes
from cairn.errors import NotFoundError

DRIFT = 1e-6
"""Relative distance of averaged copies from their mean above which the report names them."""


def import_(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    spec: ShardSpec | str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    pickles: bool = False,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    allow_non_finite: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Make a checkpoint at `out` from the folder or the file `source` of another program.

    Parameters
    ----------
    source
        The folder that the other program wrote, or a GGUF file.
    out
        Where the checkpoint goes; nothing may be there.
    layout
        A name of `cairn catalog layout`; by default the one that recognises the folder.
    spec
        How tensors were cut, which are dropped and how they are called, where the files do not say so.
    config
        The model's config.json where the folder has none.
    tokenizer
        A folder with the tokenizer's files; by default the source.
    pickles
        Read pickled files, by torch's restricted reader, which runs no code from them.
    dtype
        Casts the weights, not the optimizer's state: float32, bfloat16, float16 or float64.
    shard_bytes
        Split the weights into files of at most so many bytes.
    allow_non_finite
        Import values that are not finite; by default they are refused by name.
    workers
        How many tensors are in memory at a time.
    progress
        Told (bytes done, bytes in all).

    Raises
    ------
    CairnError
        Before anything is visible.
    """
    made = plan(source, layout=layout, spec=spec, config=config, pickles=pickles, dtype=dtype, own_tokenizer=tokenizer is not None)
    carried = {**_tokenizer_files(Path(tokenizer) if tokenizer is not None else made.folder, asked=tokenizer is not None), **made.source.documents}
    made.refuse_untied()
    total, done = sum(spec.nbytes for stem in STEMS for spec in made.specs(stem)), 0
    with Writer(out) as writer:
        writer.put_json("config.json", made.config)
        for name, data in carried.items():
            writer.put_file(name, data)
        for stem in STEMS:
            if made.specs(stem):
                writer.declare(stem, made.specs(stem), shard_bytes)
        with ThreadPoolExecutor(workers) as pool:
            for count in pool.map(functools.partial(_write, writer, made, allow_non_finite), made.groups):
                done += count
                if progress is not None:
                    progress(done, total)
        return writer.publish(_lineage(made, dtype))


def _write(writer: Writer, made: ImportPlan, allow_non_finite: bool, group: TensorGroup) -> int:
    """Write what one tensor becomes; returns the bytes."""
    specs, written = {spec.name: (stem, spec) for stem, spec in group.outputs}, 0
    for name, tensor in made.translated(group, Slice.read):
        stem, spec = specs[name if group.key == WEIGHT else f"{name}/{group.key}"]
        cast = tensor.to(DTYPES[spec.dtype])
        if not allow_non_finite:
            refuse_non_finite(spec.name, cast, tensor)
        writer.put_bytes(stem, spec.name, 0, as_bytes(cast))
        written += spec.nbytes
    if isinstance(group.rule, AveragedCopies) and (drift := spread([piece.read() for piece in group.slices])) > DRIFT:
        made.notes.append(f"the {len(group.slices)} copies of '{group.name}' that were averaged differ by {drift:.1e} of its largest value")
    return written


def _lineage(made: ImportPlan, dtype: str | None) -> Lineage:
    spec = made.rules.spec.model_dump(mode="json", exclude_defaults=True)
    facts = made.source.plain | ({"digest": _digest(made.source.file)} if made.source.file is not None else {})
    options = {"layout": made.layout, "grid": made.source.grid, "source": made.folder.resolve().name, "spec": spec, "dtype": dtype, "facts": facts}
    return Lineage.record("import", made.layout, options=options, changed=[f"left out: {item}" for item in made.source.left_out] + made.notes)


def _digest(path: Path) -> str:
    """blake3 of a file, read in pieces."""
    hasher = blake3()
    with path.open("rb") as file:
        for piece in iter(functools.partial(file.read, 2**22), b""):
            hasher.update(piece)
    return hasher.hexdigest()


def _tokenizer_files(folder: Path, *, asked: bool) -> dict[str, bytes]:
    if asked and not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder} with a tokenizer.")
    if not folder.is_dir():
        return {}  # the one file that is imported
    there = carried_among(path.name for path in folder.iterdir() if path.is_file())
    found = {name: documents.read_bytes(folder / name) for name in there}
    if asked and not any(name in TOKENIZER for name in found):
        raise NotFoundError(f"{folder} holds no files of a tokenizer.")
    return found
