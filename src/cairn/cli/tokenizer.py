"""cairn tokenizer extend | trim | transplant | union"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places

app = typer.Typer(help="Give models another vocabulary.", no_args_is_help=True)

Model = Annotated[str, places.anywhere("A checkpoint or a run of a causal language model.")]
Multiple = Annotated[int, typer.Option(min=1, help="The embedding gets a multiple of so many rows.")]
Text = Annotated[str | None, places.anywhere("A corpus on which bits per byte are measured before and after.", "--text")]


@app.command()
def extend(
    checkpoint: Model,
    tokens: Annotated[list[str], typer.Argument(help="The new tokens.")],
    out: console.Out,
    special: Annotated[bool, typer.Option("--special", help="The tokens are no text.")] = False,
    multiple: Multiple = 1,
    text: Text = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Add tokens behind those of a model; old ids and rows stay."""
    from cairn.adaptation import vocabulary

    with console.Bytes("writing") as progress:
        made = vocabulary.extend(checkpoint, tokens, out, special=special, multiple=multiple, text=text, device=device, progress=progress)
    _tell([made], json)


@app.command()
def trim(
    checkpoint: Model,
    corpus: Annotated[str, places.anywhere("The texts whose tokens stay.", "--corpus")],
    out: console.Out,
    documents: Annotated[int, typer.Option(min=1, help="Documents of the corpus that are read at most.")] = 10_000,
    multiple: Multiple = 1,
    text: Text = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Leave out the tokens that a corpus does not need."""
    from cairn.adaptation import vocabulary

    with console.Bytes("writing") as progress:
        made = vocabulary.trim(checkpoint, corpus, out, documents=documents, multiple=multiple, text=text, device=device, progress=progress)
    _tell([made], json)


@app.command()
def transplant(
    checkpoint: Model,
    donor: Annotated[str, places.anywhere("The checkpoint whose tokenizer it gets.")],
    out: console.Out,
    multiple: Multiple = 1,
    text: Text = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Give a model the tokenizer of another one."""
    from cairn.adaptation import vocabulary

    with console.Bytes("writing") as progress:
        made = vocabulary.transplant(checkpoint, donor, out, multiple=multiple, text=text, device=device, progress=progress)
    _tell([made], json)


@app.command()
def union(
    checkpoints: Annotated[list[str], places.anywhere("Two checkpoints or more.")],
    out: Annotated[Path, places.local("A new folder for the models with one vocabulary.", "-o", "--out")],
    multiple: Multiple = 1,
    text: Text = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Give several models one vocabulary, so that they can be merged."""
    from cairn.adaptation import vocabulary

    with console.Bytes("writing") as progress:
        made = vocabulary.union(checkpoints, out, multiple=multiple, text=text, device=device, progress=progress)
    _tell(made, json)


def _tell(made: list[Any], json: bool) -> None:
    figures = [surgery.plain() for surgery in made]
    if json:
        console.emit(figures[0] if len(figures) == 1 else figures)
        return
    for row in figures:
        print(f"{row['path']}  {row['digest'][:12]}  {row['tokens'][0]} -> {row['tokens'][1]} tokens: {row['kept']} rows as they were, {row['made']} made")
        if row["bits_per_byte"] is not None:
            print(f"bits per byte of the text: {row['bits_per_byte'][0]:.4f} before, {row['bits_per_byte'][1]:.4f} after")
