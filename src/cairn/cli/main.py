"""The command `cairn`: finds the command, turns errors into one plain sentence and an exit status.

0: done. 1: done, and the answer is no (damage found, a claim fails, training diverged). 2: bad input. 130: Ctrl-C.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cairn import __version__
from cairn.checkpoint.format.place import permit, refusals
from cairn.cli import (
    ablate,
    ablate_sources,
    adapt,
    anneal,
    audit,
    average,
    card,
    catalog,
    chat,
    claim,
    compress,
    console,
    continue_,
    data,
    demo,
    describe,
    diff,
    doctor,
    evaluate,
    explain,
    export,
    fork,
    gap,
    generate,
    generations,
    grow,
    import_,
    index,
    init,
    keeper,
    log,
    merge,
    replay,
    resume,
    search,
    serve,
    show,
    sign,
    sparsity,
    stability,
    study,
    survival,
    tokenizer,
    train,
    trajectory,
    trends,
    verify,
)
from cairn.errors import CairnError, Notice


class _Interrupted(CairnError):
    """Ctrl-C, in the words of the work that was interrupted."""

    exit_status = 130


class _Commands(TyperGroup):
    """The commands; typer would end an interrupted one without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(str(error) or "interrupted") from None


app = typer.Typer(
    name="cairn",
    cls=_Commands,
    help="The whole life of a pretrained language model, checkpoint by checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Open stores that files of a run name by URL.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_tell_version)] = False,
) -> None:
    """Options of every command; `main` itself looks for --debug and --follow, which may stand anywhere."""


GROUPS = {
    "Train": (demo, init, train, resume, keeper, survival, stability),
    "Adapt": (fork, continue_, anneal, adapt, gap, generations),
    "Change": (average, merge, grow, compress, tokenizer, export, import_),
    "Measure": (evaluate, generate, chat, trajectory, audit, explain, sparsity, study),
    "Data": (data, ablate, ablate_sources),
    "Keep track": (show, log, diff, verify, replay, index, search, serve, card, describe, claim, sign, catalog, doctor, trends),
}
"""The commands by what people want to do, in the order of `cairn --help`."""

for group, modules in GROUPS.items():
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        word = name.rstrip("_").replace("_", "-")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=word, rich_help_panel=group)
        else:
            app.command(word, rich_help_panel=group)(getattr(module, name))


# Typer builds on click, its own copy or the installed one: the base of all complaints about a command line is found by name.
_Misuse: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main() -> None:
    """Run the command line and leave the process with its exit status."""
    debug = _asked("--debug")
    if _asked("--follow"):
        permit()
    warnings.showwarning = _show(warnings.showwarning)
    try:
        with console.one_document() if "--json" in sys.argv[1:] else nullcontext():
            status = app(standalone_mode=False)
    except BrokenPipeError:
        _leave_quietly()
    except (KeyboardInterrupt, typer.Abort) as error:
        _complain(str(error) or "Interrupted.", 130)
    except _answers() as error:
        if debug:
            raise
        _complain(_sentence(error), getattr(error, "exit_status", 2))
    _leave(status if isinstance(status, int) else 0)


def _asked(flag: str) -> bool:
    """Whether an option of every command was given; it is taken out of the command line."""
    given = flag in sys.argv[1:]
    if given:
        sys.argv.remove(flag)
    return given


def _show(other: Callable[..., None]) -> Callable[..., None]:
    """A `Notice` is one line for a person; other warnings look as ever."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            print(f"cairn: {message}", file=sys.stderr)
        else:
            other(message, category, *rest, **more)

    return show


def _leave(status: int) -> NoReturn:
    """End the process. A worker ends without tearing the interpreter down: a gloo thread that still holds the last tensor that
    was exchanged would abort the process there, its work done, and the launcher would take that for a failure."""
    if os.environ.get("WORLD_SIZE"):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _answers() -> tuple[type[Exception], ...]:
    """What is an answer to a user; everything else is a defect."""
    return (CairnError, _Misuse, *refusals())


def _sentence(error: Any) -> str:
    """What is wrong, on one line."""
    if isinstance(error, CairnError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{(error.strerror or str(error)).rstrip('.')}."
    complaint = getattr(error, "format_message", None)
    if complaint is None:
        return f"{str(error).rstrip('.')}."
    message = " ".join(complaint().split()) or "Name a command."
    context = getattr(error, "ctx", None)
    return f"{message} See '{context.command_path} --help'." if context is not None else message


def _complain(sentence: str, status: int) -> NoReturn:
    print(f"cairn: {sentence}", file=sys.stderr)
    _leave(status)


def _leave_quietly() -> NoReturn:
    """The reader of our output has left; Python must not complain about that when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
