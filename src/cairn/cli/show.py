"""cairn show"""

from typing import Annotated

import typer

from cairn.cli import console, places


def show(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, a run, or a transformers directory.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
    json: console.Json = False,
) -> None:
    """Say what a checkpoint is."""
    from cairn.checkpoint.format import read
    from cairn.checkpoint.format.summary import summary

    opened = read.open(checkpoint)
    figures = summary(opened)
    stages = None
    if read.has_stages(checkpoint):
        from cairn.training.stages import progress

        stages = progress(checkpoint)
    listed = [{"name": name, "dtype": t.spec.dtype, "shape": list(t.shape)} for name, t in opened.stored.items()] if tensors else None
    if json:
        console.emit(figures | ({"stages": stages} if stages is not None else {}) | ({"tensors": listed} if listed is not None else {}))
        return
    figures["bytes"] = ", ".join(f"{name} {console.size(count)}" for name, count in figures["bytes"].items())
    console.values(figures)
    if stages is not None:
        columns = ("stage", "from", "act", "state", "step", opened.unit, "checkpoint")
        console.table(columns, [[row.get(column) for column in columns] for row in stages])
    if listed is not None:
        console.table(("tensor", "dtype", "shape"), [(row["name"], row["dtype"], row["shape"]) for row in listed])
