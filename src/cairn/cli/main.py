"""The command `cairn`: finds the command, turns errors into one plain sentence and an exit status.

0: done. 1: done, and the answer is no (damage found, a claim fails, training diverged). 2: bad input. 130: Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from cairn import __version__
from cairn.cli import (
    average,
    catalog,
    data,
    demo,
    diff,
    evaluate,
    export,
    fork,
    generate,
    log,
    merge,
    resume,
    show,
    study,
    train,
    verify,
)
from cairn.errors import CairnError

app = typer.Typer(
    name="cairn",
    help="The whole life of a pretrained language model, checkpoint by checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for module in (demo, train, resume, fork, generate, evaluate, show, log, diff, verify, average, merge, export, study, catalog):
    name = module.__name__.rpartition(".")[2]
    app.command(name)(getattr(module, name))
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line and leave the process with its exit status."""
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        status = app(standalone_mode=False)
    except CairnError as error:
        if debug:
            raise
        print(f"cairn: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        print(f"cairn: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("cairn: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
