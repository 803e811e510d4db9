"""cairn audit leakage | formats | flips | stability | claims | risks | portability"""

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places

app = typer.Typer(help="Find out whether it can be trusted.", no_args_is_help=True)

Items = Annotated[Path, places.local("The items: JSON lines, or a JSON list.", "--items")]
Dtype = Annotated[console.Precision, typer.Option(help="What scores are computed in.")]
Out = Annotated[Path | None, places.local("Also write everything that was found into this JSON file.", "-o", "--out")]
Plot = Annotated[Path | None, places.local("Draw what was found into this PNG file.", "--plot")]


@app.command()
def leakage(
    source: Annotated[str, places.anywhere("A checkpoint, or a run: then its checkpoints.")],
    items: Items,
    settings: console.Settings = None,
    control: Annotated[Path | None, places.local("Items of the same form that cannot have been trained on.", "--control")] = None,
    reference: Annotated[str | None, places.anywhere("A model that cannot have seen the items, such as an earlier checkpoint.", "--reference")] = None,
    every: Annotated[int, typer.Option(min=1, help="Of a run, every so many-th checkpoint, counted from the last.")] = 1,
    known: Annotated[bool, typer.Option("--known", help="Also look for copies of the questions in the run's own training data.")] = False,
    device: console.Device = None,
    dtype: Dtype = console.Precision.float32,
    out: Out = None,
    plot: Plot = None,
    json: console.Json = False,
) -> None:
    """Was a multiple-choice set in the training data? Always read against a control."""
    from cairn.evaluation.audits import audit

    where = {"device": device, "dtype": dtype.value, "progress": console.say}
    found = audit.leakage(source, _options(settings, path=items, control=control), reference=reference, every=every, known=known, **where)  # type: ignore[arg-type]
    _deliver(found, out, plot and audit.draw_leakage(found, plot), json)
    if json:
        return
    columns = ("checkpoint", "n", "a_first", "a_first_interval", "a_first_control", "a_first_p", "a_auc", "a_p", "b_flagged", "b_p")
    console.table(columns, [[each[column] for column in columns] for each in found])
    for rate in found[-1]["b_published"] or []:
        print(f"published threshold {rate['threshold']:.2f} would flag {rate['items']:.0%} of the items and {rate['control']:.0%} of the control")
    if known:
        print("copies in the training data: " + ", ".join(f"{key} {value}" for key, value in found[-1]["agreement"].items()))
    if control is None:
        print("Without --control, published orders are compared with orders drawn by us; people's orders may be likelier by their content.")


@app.command()
def formats(
    source: Annotated[str, places.anywhere("A checkpoint, or a run: then its newest checkpoint.")],
    items: Items,
    settings: console.Settings = None,
    compare: Annotated[str | None, places.anywhere("Another checkpoint: how likely do formats turn the order of both around?", "--compare")] = None,
    device: console.Device = None,
    dtype: Dtype = console.Precision.float32,
    out: Out = None,
    plot: Plot = None,
    json: console.Json = False,
) -> None:
    """How far do prompt formats that mean the same move a score, beyond what noise does?"""
    from cairn.evaluation.audits import audit

    found = audit.formats(source, _options(settings, path=items), compare=compare, device=device, dtype=dtype.value, progress=console.say)
    _deliver(found, out, plot and audit.draw_formats(found, plot), json)
    if json:
        return
    columns = ("checkpoint", "n", "n_formats", "default", "low", "high", "spread", "null", "excess", "p", "held_out", "quantiles")
    console.table(columns, [[each[column] for column in columns] for each in [found, *([found["compared"]] if compare else [])]])
    for end in ("low", "high"):
        print(f"{end}: {', '.join(f'{slot} {value!r}' for slot, value in found[f'{end}_format'].items())}")
    if compare:
        order = found["order"]
        print(
            f"the order under the default format (gap {order['default_gap']:+.3f}) flips in {order['flip']:.0%} of the formats "
            f"({order['low']:.0%} to {order['high']:.0%})"
        )


@app.command()
def flips(
    old: Annotated[str, places.anywhere("The checkpoint before the update.")],
    new: Annotated[str, places.anywhere("The checkpoint after it.")],
    task: Annotated[str, typer.Option(help="A measurement whose items are right or wrong: exact-answer, choice, light-instruction.")],
    settings: console.Settings = None,
    twin: Annotated[str | None, places.anywhere("A checkpoint like the old one but for its seed: flips to it are the floor.", "--twin")] = None,
    gate: Annotated[float | None, typer.Option(min=0, max=1, help="Leave with status 1 when more than this share flips from right to wrong.")] = None,
    device: console.Device = None,
    dtype: Dtype = console.Precision.float32,
    out: Out = None,
    plot: Plot = None,
    json: console.Json = False,
) -> None:
    """What did an update break? Items that were right and are wrong now, whatever the means say."""
    from cairn.evaluation.audits import audit
    from cairn.evaluation.audits.flips import flips as compare

    result = compare(old, new, _options(settings, name=task), twin=twin, device=device, dtype=dtype.value, progress=console.say)
    found = asdict(result)
    _deliver(found, out, plot and audit.draw_flips(result, plot), json)
    if not json:
        console.values({key: value for key, value in found.items() if key != "flipped"})
    if gate is not None and found["negative"] > gate:
        console.say(f"{found['negative']:.4f} of the items flip from right to wrong, more than the gate of {gate}.")
        raise typer.Exit(1)


@app.command()
def stability(
    run: Annotated[str, places.anywhere("A run with at least three checkpoints.")],
    items: Items,
    settings: console.Settings = None,
    ask: Annotated[str, typer.Option(help="Ways to ask, separated by commas: blank, content, letter.")] = "blank,letter",
    device: console.Device = None,
    dtype: Dtype = console.Precision.float32,
    out: Out = None,
    plot: Plot = None,
    json: console.Json = False,
) -> None:
    """Which way of asking gives scores that rise with training? One half of the items chooses, the other half reports."""
    from cairn.evaluation.audits import audit
    from cairn.evaluation.audits import stability as stable

    tasks = [_options(settings, name="choice", path=items, ask=way.strip()) for way in ask.split(",")]
    found = stable.stability(run, tasks, device=device, dtype=dtype.value, progress=console.say)
    _deliver(found, out, plot and audit.draw_stability(found, plot), json)
    if json:
        return
    columns = ("label", "tau", "interval", "p", "violations", "checkpoints", "final", "chance", "above_chance")
    console.table(columns, [[each[column] for column in columns] for each in found["tasks"]])
    chosen = found["chosen"]
    print(f"chosen: {chosen['ask']}" if chosen else "chosen: none, no way of asking is above chance at the last checkpoint")


@app.command()
def claims(
    source: Annotated[str, places.anywhere("A checkpoint or a run.")], device: console.Device = None, out: Out = None, json: console.Json = False
) -> None:
    """Is what is claimed of it true? Every claim with a protocol is measured again; status 1 where one is over-claimed."""
    from cairn.registry import audit

    found = [asdict(each) | {"claim": each.claim.model_dump(mode="json")} for each in audit.claims(source, device=device, progress=console.say)]
    _deliver(found, out, None, json)
    if not json:
        columns = ("verdict", "measured", "difference", "low", "high", "z", "n", "reason")
        console.table(("metric", "claimed", *columns), [[e["claim"]["metric"], e["claim"]["value"], *(e[c] for c in columns)] for e in found])
    if any(each["verdict"] == "over-claimed" for each in found):
        raise typer.Exit(1)


@app.command()
def risks(
    source: Annotated[str, places.anywhere("A checkpoint or a run; with --all, a folder.")],
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint under a folder.")] = False,
    names: Annotated[Path | None, places.local("File of names, one a line, that others must not be taken for.", "--names")] = None,
    signers: Annotated[Path | None, places.local("File of allowed signers.", "--signers")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure claims again; default: judge them by what was measured.")] = False,
    device: console.Device = None,
    out: Out = None,
    json: console.Json = False,
) -> None:
    """What could go wrong when it is reused? Pickles, altered files, licenses along the lineage, names, signatures, claims; status 1 at an alarm."""
    from cairn.registry import audit

    known = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()] if names is not None else []
    audited = audit.risks(source, every=every, names=known, signers=signers, measure=measure, device=device)
    found = [{"path": str(path), **asdict(risk)} for path, each in audited.items() for risk in each]
    _deliver(found, out, None, json)
    if not json:
        console.table(("path", "level", "kind", "what"), [[e["path"], e["level"], e["kind"], e["sentence"]] for e in found])
    if any(each["level"] == "alarm" for each in found):
        raise typer.Exit(1)


@app.command()
def portability(
    source: Annotated[str, places.anywhere("A checkpoint or a run.")], device: console.Device = None, out: Out = None, json: console.Json = False
) -> None:
    """Will it run elsewhere, and how fast is it here? Parity of exports, latency, memory; status 1 where an export gives other scores."""
    from cairn.registry.portability import portability as measure

    found = measure(source, device=device)
    _deliver(found, out, None, json)
    if not json:
        console.table(
            ("format", "passed", "difference", "reason"),
            [[e["format"], e["passed"], f"{e['difference']:.1e}" if e["difference"] is not None else None, e["reason"]] for e in found["parity"]],
        )
        console.values({key: value for key, value in found.items() if key not in ("parity", "versions", "hardware", "own_difference", "allowed_difference")})
    if not all(each["passed"] for each in found["parity"]):
        raise typer.Exit(1)


def _options(settings: list[str] | None, **given: Any) -> dict[str, Any]:
    from cairn.options import override

    return override({key: str(value) for key, value in given.items() if value is not None}, settings or [])


def _deliver(found: Any, out: Path | None, plot: Path | None, json: bool) -> None:
    """Everything as a file and as the one document on stdout, where asked for."""
    if out is not None:
        from cairn.checkpoint.format import documents

        documents.keep(out, json_.dumps(console.plain(found), indent=1, default=str) + "\n")
    if plot is not None:
        console.say(f"drawn into {plot}")
    if json:
        console.emit(found)
