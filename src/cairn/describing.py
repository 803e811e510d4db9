"""The options of a method in words, for people: name, type, default, and what stands below each in the text of its class."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from cairn import catalog
from cairn.options import Amount, Options, method_options


@dataclass(frozen=True)
class OptionRow:
    """One option of a method: its name, its type and default in words (None: it must be given), and what it says."""

    name: str
    type: str
    default: str | None
    what: str


def described(cls: type[BaseModel]) -> list[OptionRow]:
    """The options of a method's class, in their order, those of its parents first.

    Examples
    --------
    >>> from cairn.training.schedules.linear import Linear
    >>> [row.name for row in described(Linear)][:1]
    ['start']
    """
    notes: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            notes |= _notes(each)
    rows = []
    for name, field in cls.model_fields.items():
        default = None if field.is_required() else _in_words(field.get_default(call_default_factory=True))
        rows.append(OptionRow(field.alias or name, _type_in_words(field.annotation), default, notes.get(name, "")))
    return rows


def _notes(cls: type[BaseModel]) -> dict[str, str]:
    """What stands below each option in the text of its class."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}  # a class that was made at a prompt has no text
    found = {}
    for above, note in itertools.pairwise(getattr(body, "body", [])):
        said = note.value.value if isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant) else None
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and isinstance(said, str):
            found[above.target.id] = " ".join(said.split())
    return found


def _type_in_words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_in_words(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_in_words, inner))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_in_words, inner))}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _in_words(value: Any) -> str:
    if isinstance(value, Options) and catalog.name_of(value) is not None:
        return str(method_options(value))
    return str(value) if isinstance(value, (str, Amount)) and str(value) else repr(value)
