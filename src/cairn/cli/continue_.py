"""cairn continue"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cairn.cli import console, places
from cairn.cli.train import report, tell
from cairn.errors import InputError


def continue_(
    checkpoint: Annotated[str, places.anywhere("The checkpoint (or run) that goes on.")],
    settings: console.Settings = None,
    data: Annotated[list[str] | None, typer.Option(metavar="[NAME=]CORPUS", help="New data: a text, or another corpus; may be given several times.")] = None,
    tokens: Annotated[str, typer.Option(help="How long: tokens or steps; default: one pass over the new data.")] = "",
    run: Annotated[Path | None, places.local("The new run directory; default: runs/CHECKPOINT-DATA.", "--run", "--run-directory")] = None,
    schedule: Annotated[Literal["rewarm", "keep"], typer.Option(help="Raise the rate once more, or go on with the checkpoint's schedule.")] = "rewarm",
    rate: Annotated[float | None, typer.Option(help="Highest learning rate; default: the checkpoint's.")] = None,
    warmup: Annotated[str, typer.Option(help="Length of the rise, of these new tokens.")] = "1%",
    final: Annotated[float, typer.Option(help="Share of the rate that is left at the end.")] = 0.1,
    replay: Annotated[float, typer.Option(help="Share of the sequences that comes from the old data.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Read a subset of the new data so often instead of more of them once.")] = 1,
    quality: Annotated[str | None, places.named("Read only the documents that are most like this corpus.", "--quality")] = None,
    keep: Annotated[float, typer.Option(help="With --quality: share of the text that is read.")] = 0.25,
    fresh: console.Fresh = None,
    dry_run: console.DryRun = False,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Continue a finished checkpoint on new data.

    Ours or an open one, without a recipe; with a re-warmed learning rate and replay of the old data.
    """
    from cairn.checkpoint.format import read
    from cairn.continual.plan import TokenBudget
    from cairn.continual.pretrain import continue_ as start
    from cairn.continual.pretrain import settings_to_continue, starting_values
    from cairn.training.run import recipe_to_fork
    from cairn.training.starting import called

    corpora, source = named(data or []), read.open(checkpoint)
    plan = TokenBudget.parse({"epochs": epochs, "quality": quality, "keep": keep}, "plan")
    words = {"schedule": schedule, "rate": rate, "warmup": warmup, "final": final, "replay": replay, "plan": plan}
    values = starting_values(source, corpora, rate=rate)
    asked = [*settings_to_continue(source, corpora, tokens or None, recipe=values, overrides=settings or [], **words), *(settings or [])]  # type: ignore[arg-type]
    recipe = recipe_to_fork(source, asked, recipe=values)
    if dry_run:
        tell(recipe, "h100", 1, json)
        return
    if console.launched_instead(recipe.parallel):
        return
    run = run or Path("runs") / f"{called(source.path)}-{next(iter(corpora))}"
    again = [part.value for part in fresh or []]
    finished = start(source, run, corpora, tokens or None, settings or [], **words, fresh=again, device=device, quiet=False)  # type: ignore[arg-type]
    report(finished.path, json)


def named(settings: list[str]) -> dict[str, str]:
    """Corpora by name: NAME=CORPUS, or a path, which is called as its file."""
    from cairn.training.starting import name_of

    found: dict[str, str] = {}
    for setting in settings:
        name, equals, corpus = setting.partition("=")
        if not equals or Path(setting).exists():
            name, corpus = name_of(setting), setting
        if not (name and corpus):
            raise InputError(f"--data is written NAME=CORPUS or as the path of a text, not '{setting}'.")
        if name in found:
            raise InputError(f"--data names '{name}' twice; give one of them another name: NAME=CORPUS.")
        found[name] = places.checked_name(corpus)
    return found
