"""cairn continue"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cairn.cli import console, places
from cairn.cli.train import report
from cairn.errors import InputError


def continue_(
    checkpoint: Annotated[str, places.anywhere("The checkpoint (or run) that goes on.")],
    settings: console.Settings = None,
    data: Annotated[list[str] | None, typer.Option(metavar="NAME=CORPUS", help="New data; may be given several times.")] = None,
    tokens: Annotated[str, typer.Option(help="How long: tokens or steps.")] = "",
    run: Annotated[Path | None, places.local("The new run directory.", "--run", "--run-directory")] = None,
    schedule: Annotated[Literal["rewarm", "keep"], typer.Option(help="Raise the rate once more, or go on with the checkpoint's schedule.")] = "rewarm",
    rate: Annotated[float | None, typer.Option(help="Highest learning rate; default: the checkpoint's.")] = None,
    warmup: Annotated[str, typer.Option(help="Length of the rise, of these new tokens.")] = "1%",
    final: Annotated[float, typer.Option(help="Share of the rate that is left at the end.")] = 0.1,
    replay: Annotated[float, typer.Option(help="Share of the sequences that comes from the old data.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Read a subset of the new data so often instead of more of them once.")] = 1,
    quality: Annotated[str | None, places.named("Read only the documents that are most like this corpus.", "--quality")] = None,
    keep: Annotated[float, typer.Option(help="With --quality: share of the text that is read.")] = 0.25,
    fresh: console.Fresh = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Continue a finished checkpoint on new data.

    With a re-warmed learning rate and replay of the old data.
    """
    from cairn.continual.plan import TokenBudget
    from cairn.continual.pretrain import continue_ as start
    from cairn.continual.pretrain import settings_to_continue
    from cairn.training.run import recipe_to_fork

    if run is None or not tokens:
        raise InputError("Name the new run directory with --run DIR and how long to go on with --tokens, for example --tokens 5M.")
    corpora = _pairs(data or [])
    plan = TokenBudget.parse({"epochs": epochs, "quality": quality, "keep": keep}, "plan")
    words = {"schedule": schedule, "rate": rate, "warmup": warmup, "final": final, "replay": replay, "plan": plan}
    asked = [*settings_to_continue(checkpoint, corpora, tokens, **words), *(settings or [])]  # type: ignore[arg-type]
    if console.launched_instead(recipe_to_fork(checkpoint, asked).parallel):
        return
    again = [part.value for part in fresh or []]
    finished = start(checkpoint, run, corpora, tokens, settings or [], **words, fresh=again, device=device, quiet=False)  # type: ignore[arg-type]
    report(finished.path, json)


def _pairs(settings: list[str]) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in settings]
    for name, equals, corpus in pairs:
        if not (name and equals and corpus):
            raise InputError(f"--data is written NAME=CORPUS, not '{name}{equals}{corpus}'.")
    return {name: places.checked_name(corpus) for name, _, corpus in pairs}
