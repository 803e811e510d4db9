"""cairn generations"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cairn.cli import console, places


def generations(
    recipe: Annotated[str, places.named("Recipe of the first generation, with one real source.")],
    folder: Annotated[Path, places.local("Where runs and texts are kept and found again.", "--folder")],
    settings: console.Settings = None,
    policy: Annotated[Literal["replace", "accumulate", "subsample", "mix"], typer.Option(help="What each generation reads.")] = "accumulate",
    count: Annotated[int, typer.Option(help="Generations.")] = 5,
    share: Annotated[float, typer.Option(help="With mix: share of real data.")] = 0.5,
    longer: Annotated[bool, typer.Option(help="Train longer on a larger pool, or every generation as long as the first.")] = True,
    warm_start: Annotated[bool, typer.Option("--warm-start", help="From the weights of the generation before, instead of from scratch.")] = False,
    temperature: Annotated[float, typer.Option(help="Of the texts; 1 is what the model believes.")] = 1.0,
    longest: Annotated[int, typer.Option(help="Tokens after which a document is cut off.")] = 256,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Train models on each other's text, and see what stays.

    Generation after generation, measured against the real data.
    """
    from cairn.continual.generations import generations as run

    words = {"policy": policy, "count": count, "share": share, "longer": longer, "warm_start": warm_start}
    found = run(recipe, folder, settings or [], **words, temperature=temperature, longest=longest, device=device, say=console.say)  # type: ignore[arg-type]
    if json:
        console.emit([each.plain() for each in found])
        return
    of_text = ("distinct_4", "self_bleu", "duplicates", "coverage", "tail")
    rows = [(g.number, g.loss, g.tail_mass, *(getattr(g.diversity, figure, None) for figure in of_text), g.composition) for g in found]
    console.table(("generation", "loss on real text", "tail mass", "distinct-4", "self-BLEU", "duplicates", "coverage", "tail", "read"), rows)
