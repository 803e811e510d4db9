"""cairn doctor"""

from dataclasses import asdict
from typing import Annotated

import typer

from cairn.cli import console


def doctor(
    category: Annotated[str | None, typer.Argument(help="A category, as an error names it; without one, all.")] = None, json: console.Json = False
) -> None:
    """Find what answers a difficulty of reusing a model."""
    from cairn.registry import challenges

    found = [asdict(each) for each in challenges.doctor(category)]
    if json:
        console.emit(found)
    else:
        console.table(("category", "question", "answer"), [(each["id"], each["asks"], each["answer"]) for each in found])
