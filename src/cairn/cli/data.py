"""cairn data list | fetch | prepare"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places

app = typer.Typer(help="List, fetch and prepare data.", no_args_is_help=True)


@app.command("list")
def list_(json: console.Json = False) -> None:
    """List the named data sets and where they are on this machine."""
    from cairn.data import datasets

    rows = datasets.list_()
    if json:
        console.emit(rows)
    else:
        shown = [(r["name"], r["about"], r["license"], console.size(float(str(r["bytes"]))), "yes" if r["path"] else "no") for r in rows]
        console.table(("name", "what", "license", "size", "here"), shown)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A named data set.")],
    tests_only: Annotated[bool, typer.Option("--tests-only", help="Also a set whose license allows tests only.")] = False,
    json: console.Json = False,
) -> None:
    """Get a named data set from its origin and check its digests."""
    from cairn.data import datasets

    with console.Bytes(f"fetching {name}") as progress:
        path = datasets.fetch(name, allow_tests_only=tests_only, progress=progress)
    damaged = datasets.check(name)
    if json:
        console.emit({"name": name, "path": str(path), "damaged": damaged})
    else:
        print(f"{name}: {path}" + (f", damaged: {', '.join(damaged)}" if damaged else ""))
    if damaged:
        raise typer.Exit(1)


@app.command()
def generate(
    checkpoint: Annotated[str, places.anywhere("The checkpoint (or run) that writes.")],
    out: Annotated[Path, places.local("The new folder; a recipe names it as {name: generated, path: FOLDER}.", "-o", "--out")],
    size: Annotated[int, typer.Option(help="Bytes of text.")] = 1_000_000,
    temperature: Annotated[float, typer.Option(help="1 is what the model believes.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the most probable tokens of this total probability.")] = None,
    longest: Annotated[int, typer.Option(help="Tokens after which a document is cut off.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed writes the same corpus.")] = 0,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Let a checkpoint write a corpus, which says who wrote it and how."""
    from cairn.data.corpora.generated import Generated
    from cairn.generation.corpus import write_corpus

    with console.Bytes("writing") as progress:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "longest": longest, "seed": seed}
        folder = write_corpus(checkpoint, out, size, device=device, progress=lambda done: progress(done, size), **options)  # type: ignore[arg-type]
    figures = {"path": str(folder), **Generated(path=str(folder)).provenance}
    console.emit(figures) if json else console.values(figures)


@app.command()
def prepare(
    corpus: Annotated[str, places.named("A corpus: a name, a data set, or a path.")],
    out: Annotated[Path, places.local("The new token store.", "-o", "--out")],
    tokenizer: Annotated[str, places.named("`byte`, `bpe:4096` (trained on the corpus), or the path of a tokenizer or checkpoint.", "--tokenizer")] = "byte",
    held_out: Annotated[float, typer.Option(help="Share of the documents kept out of training.")] = 0.01,
    settings: Annotated[list[str] | None, typer.Argument(help="Options of the corpus, key=value: field=body, longest=4096.")] = None,
    json: console.Json = False,
) -> None:
    """Turn a corpus into memory-mapped token files; a recipe then names the folder as its corpus and as its tokenizer."""
    from cairn.data.corpora import with_settings
    from cairn.data.text.tokenizer import resolve_tokenizer
    from cairn.data.text.tokens import prepare as make

    named = {"bpe": int(tokenizer.removeprefix("bpe:"))} if tokenizer.removeprefix("bpe:").isdigit() and tokenizer.startswith("bpe:") else tokenizer
    with console.Bytes("preparing") as progress:
        source = with_settings(corpus, settings or ())
        store = make(source, resolve_tokenizer(named, [source]), out, held_out=held_out, progress=progress)
    use = f"data.sources.NAME.corpus={store.path} data.tokenizer={store.path}"
    figures = {"path": str(store.path), "digest": store.digest, **store.meta["splits"], "use": use}
    console.emit(figures) if json else console.values(figures)
