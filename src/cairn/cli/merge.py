"""cairn merge"""

from typing import Annotated, Any

import typer

from cairn import catalog
from cairn.checkpoint.format.place import place
from cairn.cli import console, places


def merge(
    method: Annotated[str, typer.Argument(help=f"An operation ({catalog.listed('operation')}), or compare, protocols, barrier, greedy-soup, reconstruct.")],
    inputs: Annotated[list[str], places.mixed("Checkpoints and the method's options.", metavar="CHECKPOINT... [KEY=VALUE]...")],
    out: Annotated[str | None, places.anywhere("The new checkpoint; for `protocols` a folder of averages.", "-o", "--out")] = None,
    base: Annotated[str | None, places.anywhere("The checkpoint that the others were trained from.", "--base")] = None,
    measure: Annotated[str | None, typer.Option(help="Tune by this measurement: its options as select.KEY=VALUE, for reporting report.KEY=VALUE.")] = None,
    metric: Annotated[str | None, typer.Option(help="The metric of the measurement; default: loss or accuracy.")] = None,
    budget: Annotated[int, typer.Option(help="How many merges may be tried, for each method.")] = 20,
    methods: Annotated[str | None, typer.Option(help="For `compare`: methods, separated by commas.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    allow_non_finite: console.AllowNonFinite = False,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Combine checkpoints into a new one.

    With fixed coefficients or tuned ones.
    """
    from cairn.merging import combine
    from cairn.merging.barrier import Barrier

    checkpoints, settings = places.separated(inputs)
    with console.Bytes("merging") as progress:
        result = combine.request(
            method,
            checkpoints,
            place(out) if out is not None else None,
            settings,
            base=base,
            measure=measure,
            metric=metric,
            budget=budget,
            methods=methods.split(",") if methods else None,
            seed=seed,
            allow_non_finite=allow_non_finite,
            device=device,
            say=console.say,
            progress=progress,
        )
    if isinstance(result, combine.Compared):
        _table(result, json)
    elif isinstance(result, combine.Selected):
        _choices(result, json)
    elif isinstance(result, Barrier):
        _barrier(result, json)
    else:
        announce(result, json)


def announce(result: Any, json: bool) -> None:
    """Where a new checkpoint lies and what it is, after what was decided on the way."""
    for note in result.lineage.changed:
        console.say(note)
    figures = {"path": str(result.path), "digest": result.digest, "parents": [parent.digest for parent in result.lineage.parents]}
    console.emit(figures) if json else print(f"{result.path}  {result.digest[:12]}  from {len(figures['parents'])} checkpoint(s)")


def _table(compared: Any, json: bool) -> None:
    if json:
        console.emit(compared.plain())
        return
    rows = [(line.what, line.value, f"{line.low:.4f} to {line.high:.4f}", line.chosen_value, line.trials, line.options) for line in compared.table.lines]
    console.table(("", "reported", "95 % interval", "chosen on", "trials", "options"), rows)
    print(compared.table.verdict)
    if compared.written is not None:
        announce(compared.written, json)


def _choices(selected: Any, json: bool) -> None:
    if json:
        console.emit(selected.plain())
        return
    targets = list(selected.choices[0].scores)
    rows = [
        (f"{c.protocol} (oracle)" if c.oracle else c.protocol, "all" if c.run is None else c.run, c.checkpoint, *c.scores.values(), c.mean)
        for c in selected.choices
    ]
    console.table(("protocol", "run", "checkpoint", *targets, "mean"), rows)


def _barrier(found: Any, json: bool) -> None:
    if json:
        console.emit(found.plain())
        return
    console.table(("share of the first", "loss"), list(zip(found.shares, found.losses, strict=True)))
    print(f"barrier {found.height:.4f}")
