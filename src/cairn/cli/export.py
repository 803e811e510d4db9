"""cairn export"""

from enum import Enum
from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.cli.merge import announce


class ExportFormat(Enum):
    """For whom an export is written."""

    hf = "hf"
    dcp = "dcp"
    hub = "hub"
    gguf = "gguf"


def export(
    checkpoint: Annotated[str, places.anywhere("A checkpoint or a run.")],
    out: console.Out,
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="hf: a transformers directory; dcp: a folder of torch.distributed.checkpoint; hub: with card and signature; gguf: a file for llama.cpp."
        ),
    ] = ExportFormat.hf,
    dtype: Annotated[str | None, typer.Option(help="Cast the weights: float32, bfloat16, float16 or float64.")] = None,
    type: Annotated[str | None, typer.Option(help="With gguf: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; default: as the weights are stored.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Split the weights into files of this size, e.g. '4 GiB'.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Copy everything, the training state too: the same checkpoint in another place.")] = False,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="With dcp: the optimizer's state, too.")] = False,
    allow_non_finite: console.AllowNonFinite = False,
    json: console.Json = False,
) -> None:
    """Write the weights for other programs.

    A directory that transformers opens, a folder of torch.distributed.checkpoint, or a GGUF file.
    """
    from cairn.checkpoint.foreign.export import copy, export_dcp
    from cairn.checkpoint.foreign.export import export as write
    from cairn.errors import InputError

    limit = size_limit(shard_size)
    if whole and (dtype is not None or limit is not None or format is not ExportFormat.hf):
        raise InputError("--whole copies a checkpoint as it is; --format, --dtype and --shard-size belong to an export of the weights.")
    if type is not None and format is not ExportFormat.gguf:
        raise InputError("--type belongs to --format gguf; --dtype casts the weights of the other formats.")
    if format is ExportFormat.gguf:
        _gguf(checkpoint, out, type, dtype, limit, allow_non_finite, json)
        return
    if format is ExportFormat.hub:
        from cairn.registry.hub import export_hub

        with console.Bytes("exporting") as progress:
            made = export_hub(checkpoint, out, dtype=dtype, shard_bytes=limit, progress=progress)
        console.emit(made) if json else print(f"{made['path']}  {', '.join(made['files'])}  card {made['completeness']:.0%} complete")
        return
    if format is ExportFormat.dcp:
        written = export_dcp(checkpoint, out, dtype=dtype, optimizer=optimizer, allow_non_finite=allow_non_finite)
        console.emit(written) if json else print(f"{written['path']}  {written['tensors']} tensors for torch.distributed.checkpoint")
        return
    with console.Bytes("exporting") as progress:
        if whole:
            result = copy(checkpoint, out, progress=progress)
        else:
            result = write(checkpoint, out, dtype=dtype, shard_bytes=limit, allow_non_finite=allow_non_finite, progress=progress)
    announce(result, json)


def _gguf(checkpoint: str, out: str, type: str | None, dtype: str | None, limit: int | None, allow_non_finite: bool, json: bool) -> None:
    from cairn.checkpoint.foreign.gguf.writing import export_gguf
    from cairn.errors import InputError

    if dtype is not None or limit is not None:
        raise InputError("A GGUF file has one --type for its matrices and is never split; leave --dtype and --shard-size out.")
    with console.Bytes("exporting") as progress:
        written = export_gguf(checkpoint, out, type=type, allow_non_finite=allow_non_finite, progress=progress)
    kinds = ", ".join(f"{count} {name}" for name, count in written["types"].items())
    console.emit(written) if json else print(f"{written['path']}  {console.size(written['bytes'])}  tensors: {kinds}")


def size_limit(text: str | None) -> int | None:
    """The bytes that --shard-size asks for."""
    from pydantic import TypeAdapter, ValidationError

    from cairn.errors import InputError
    from cairn.options import Bytes

    try:
        return TypeAdapter(Bytes | None).validate_python(text)
    except ValidationError:
        raise InputError(f"--shard-size '{text}' is not a size; write for example '4 GiB' or '500 MB'.") from None
