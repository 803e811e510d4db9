"""cairn import"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places
from cairn.cli.export import size_limit
from cairn.cli.merge import announce


def import_(
    source: Annotated[Path, places.local("The folder that another program wrote, or a GGUF file.")],
    out: Annotated[str | None, places.anywhere("Where the new checkpoint goes; must not exist.", "-o", "--out")] = None,
    layout: Annotated[str | None, typer.Option(help="`cairn catalog layout` lists them; default: the one that recognises the folder.")] = None,
    spec: Annotated[Path | None, places.local("YAML or TOML file that says how tensors were cut, where the files do not.", "--spec")] = None,
    config: Annotated[Path | None, places.local("The model's config.json, where the folder has none.", "--config")] = None,
    tokenizer: Annotated[Path | None, places.local("A folder with the tokenizer's files; default: the source.", "--tokenizer")] = None,
    pickle: Annotated[bool, typer.Option("--pickle", help="Read pickled files, with torch's restricted reader, which runs no code.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Cast the weights: float32, bfloat16, float16 or float64.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Split the weights into files of this size, e.g. '4 GiB'.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Tensors in memory at a time.")] = 1,
    allow_non_finite: console.AllowNonFinite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone; write nothing.")] = False,
    json: console.Json = False,
) -> None:
    """Make a checkpoint from what another program saved.

    DeepSpeed, FSDP, Megatron, Meta's LLaMA, torch.distributed.checkpoint, transformers, GGUF.
    """
    from cairn.checkpoint.foreign import importing
    from cairn.checkpoint.foreign.import_plan import plan
    from cairn.errors import InputError

    asked: dict[str, Any] = {"layout": layout, "spec": spec, "config": config, "pickles": pickle, "dtype": dtype}
    writing: dict[str, Any] = {"tokenizer": tokenizer, "allow_non_finite": allow_non_finite, "workers": workers}
    if dry_run:
        _report(plan(source, **asked).plain(), json)
        return
    if out is None:
        raise InputError("Say with -o where the new checkpoint goes, or --dry-run to see the plan.")
    with console.Bytes("importing") as progress:
        result = importing.import_(source, out, **asked, **writing, shard_bytes=size_limit(shard_size), progress=progress)
    announce(result, json)


def _report(plan: dict[str, Any], json: bool) -> None:
    if json:
        console.emit(plan)
        return
    rows = [(t["name"], t["dtype"], "x".join(map(str, t["shape"])), t["pieces"], t["rule"], t["from"]) for t in plan["tensors"]]
    console.table(("tensor", "dtype", "shape", "pieces", "rule", "from"), rows)
    console.values(
        {
            "layout": plan["layout"],
            "ranks": plan["grid"],
            "weights": console.size(plan["bytes"]["model"]),
            "optimizer": f"{console.size(plan['bytes']['optimizer'])} ({', '.join(plan['optimizer']) or 'none'})",
            "largest": console.size(plan["largest"]),
            "left out": plan["left_out"],
            **plan["facts"],
        }
    )
