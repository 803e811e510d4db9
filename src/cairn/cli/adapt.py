"""cairn adapt"""

from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.cli.merge import announce

app = typer.Typer(help="Fold an adapter into its base, or say what it is.", no_args_is_help=True)

Adapter = Annotated[str, places.anywhere("An adapter checkpoint, a run that trains one, or a directory that PEFT has written.")]


@app.command()
def fold(
    adapter: Adapter,
    out: console.Out,
    base: console.Base = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64; default: that of the base.")] = None,
    json: console.Json = False,
) -> None:
    """Write the whole model that an adapter and its base make together."""
    from cairn.adaptation import folding

    with console.Bytes("folding") as progress:
        result = folding.fold(adapter, out, base=base, dtype=dtype, progress=progress)
    announce(result, json)


@app.command()
def show(adapter: Adapter, json: console.Json = False) -> None:
    """Say what an adapter is: kind, matrices, size of each change, bytes, and its base."""
    from cairn.adaptation.folding import adapter_summary

    figures = adapter_summary(adapter)
    if json:
        console.emit(figures)
        return
    matrices = figures.pop("matrices")
    figures["adapter"] = ", ".join(f"{key} {value}" for key, value in figures["adapter"].items() if value is not None)
    figures["base"] = f"{(figures['base']['model_digest'] or 'unknown')[:12]}, {figures['base']['found'] or 'not found'}"
    figures["bytes"] = console.size(figures["bytes"])
    console.values(figures)
    console.table(("matrix", "shape", "numbers", "norm of the change"), [(row["matrix"], row["shape"], row["numbers"], row["norm"]) for row in matrices])
