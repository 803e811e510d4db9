"""cairn export"""

from typing import Annotated

import typer

from cairn.cli import console
from cairn.cli.merge import announce


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint or a run.")],
    out: console.Out,
    dtype: Annotated[str | None, typer.Option(help="Cast the weights: float32, bfloat16, float16 or float64.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Split the weights into files of this size, e.g. '4 GiB'.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Copy everything, the training state too: the same checkpoint in another place.")] = False,
    json: console.Json = False,
) -> None:
    """Write the weights without training state (or, with --whole, everything) as a directory that transformers opens."""
    from pydantic import TypeAdapter, ValidationError

    from cairn.checkpoint.export import copy
    from cairn.checkpoint.export import export as write
    from cairn.errors import InputError
    from cairn.options import Bytes

    try:
        limit = TypeAdapter(Bytes | None).validate_python(shard_size)
    except ValidationError:
        raise InputError(f"--shard-size '{shard_size}' is not a size; write for example '4 GiB' or '500 MB'.") from None
    if whole and (dtype is not None or limit is not None):
        raise InputError("--whole copies a checkpoint as it is; --dtype and --shard-size belong to an export of the weights.")
    with console.Bytes("exporting") as progress:
        result = copy(checkpoint, out, progress=progress) if whole else write(checkpoint, out, dtype=dtype, shard_bytes=limit, progress=progress)
    announce(result, json)
