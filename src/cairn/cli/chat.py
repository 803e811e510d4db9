"""cairn chat"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places


def chat(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, a run, or a transformers directory.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this one thing and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A message in front that says how to answer.")] = None,
    template: Annotated[Path | None, places.local("A file with another chat template.", "--template")] = None,
    new_tokens: Annotated[int, typer.Option(help="How many tokens an answer has at most.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most probable token each time; default: as generation_config.json says, else 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the most probable tokens of this total probability.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed answers the same.")] = 0,
    device: console.Device = None,
    dtype: Annotated[console.Precision | None, typer.Option(help="What the model computes in; default: as its weights are stored.")] = None,
    json: console.Json = False,
) -> None:
    """Talk with a checkpoint.

    Ctrl-C stops an answer. /new begins anew, /quit or Ctrl-D leaves.
    """
    from cairn.errors import InputError
    from cairn.generation.chat import Chat

    if json and message is None:
        raise InputError("--json prints the answer to one --message.")
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "device": device}
    precision = dtype.value if dtype is not None else None
    talk = Chat(checkpoint, system=system, template=template, new_tokens=new_tokens, dtype=precision, **options)
    if message is not None:
        answer = talk.ask(message, None if json else console.tell)
        console.emit({"messages": talk.messages, "answer": answer}) if json else print()
        return
    _converse(talk)


def _converse(talk: Any) -> None:
    """Questions from standard input, answers as they come, until /quit or the end."""
    from cairn.errors import CairnError

    if sys.stdin.isatty():
        print("Ctrl-C stops an answer, /new begins anew, /quit leaves.", file=sys.stderr)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return
        if said in ("/quit", "/exit"):
            return
        if said == "/new":
            talk.begin()
        elif said:
            try:
                talk.ask(said, console.tell)
                print()
            except CairnError as error:
                print(f"cairn: {error}", file=sys.stderr)
