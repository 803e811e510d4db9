"""cairn doctor"""

from dataclasses import asdict
from typing import Annotated

import typer

from cairn.cli import console


def doctor(
    category: Annotated[str | None, typer.Argument(help="A category, as an error names it; without one, all.")] = None, json: console.Json = False
) -> None:
    """What people find difficult when they reuse a model, and what answers it."""
    from cairn.registry import challenges

    found = [asdict(each) for each in ([challenges.get(category)] if category else challenges.known().values())]
    if json:
        console.emit(found)
    else:
        console.table(("category", "question", "answer"), [(each["id"], each["asks"], each["answer"]) for each in found])
