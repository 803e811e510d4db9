"""cairn generate"""

from typing import Annotated

import typer

from cairn.cli import console, places


def generate(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, a run, or a transformers directory.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the most probable tokens of this total probability.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    metadata: Annotated[str | None, typer.Option(help="What the text comes from, for a model trained with metadata: a host, say.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the continuation; may be given several times.")] = None,
    device: console.Device = None,
    dtype: Annotated[console.Precision | None, typer.Option(help="What the model computes in; default: as its weights are stored.")] = None,
    json: console.Json = False,
) -> None:
    """Continue a text."""
    from cairn.generation.text import generate as write

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    precision = dtype.value if dtype is not None else None
    text = write(checkpoint, prompt, new_tokens=new_tokens, metadata=metadata, stop=stop or (), device=device, dtype=precision, **sampling)  # type: ignore[arg-type]
    console.emit({"prompt": prompt, "text": text}) if json else print(prompt + text)
