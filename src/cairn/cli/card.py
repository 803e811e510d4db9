"""cairn card"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def card(
    source: Annotated[str, places.anywhere("A checkpoint or a run; with --score, also a card.")],
    out: Annotated[Path | None, places.local("Write the card into this file.", "-o", "--out")] = None,
    score: Annotated[bool, typer.Option("--score", help="Say how complete the card is instead of printing it.")] = False,
    run: Annotated[bool, typer.Option("--run", help="With --score: also run its Python blocks; only for cards that you trust.")] = False,
    json: console.Json = False,
) -> None:
    """Write a model card, or score one.

    It is made from lineage and measurements; what nobody knows is said to be unknown.
    """
    from cairn.registry import modelcard
    from cairn.registry.card import card as make

    is_file = Path(source).is_file()
    text = modelcard.text_of(Path(source)) if is_file else make(source)
    if out is not None:
        modelcard.write(out, text)
    if score:
        found = asdict(modelcard.score(text, run=run))
        console.emit(found) if json else console.values(found)
    elif json:
        console.emit({"card": text, "front_matter": modelcard.front_matter(text)})
    elif out is None:
        print(text, end="")
