"""Suites of checks: what they are made of, and how one is found by the kind of a method.

Each kind has one suite, in a module of its own that is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cairn import catalog
from cairn.errors import InputError, NotFoundError
from cairn.options import configure, method_options


@dataclass(frozen=True)
class Check:
    """One promise of one method: call it with an empty folder. `str` of it names it."""

    method: str
    promise: str
    run: Callable[[Path], None]

    def __call__(self, folder: str | Path) -> None:
        """Raise `AssertionError` if the promise is broken."""
        self.run(Path(folder))

    def __str__(self) -> str:
        return f"{self.method}: {self.promise}"


Suite = Callable[[str, str, Mapping[str, Any]], Iterator[Check]]
"""From kind, name and options to the checks of a method."""

_suites: dict[str, Suite] = {}
_HOMES = {
    **dict.fromkeys(("operation", "growth", "compression", "adaptation"), "cairn.testing.operations"),
    **dict.fromkeys(("field", "adapter", "objective", "optimizer", "schedule", "reweighting", "filter", "callback"), "cairn.testing.ingredients"),
    "measurement": "cairn.testing.measurements",
    "study": "cairn.testing.studies",
}
"""The module that holds the suite of each kind."""


def suite(*kinds: str) -> Callable[[Suite], Suite]:
    """Decorator: this function gives the checks of the methods of these kinds."""

    def enter(function: Suite) -> Suite:
        _suites.update(dict.fromkeys(kinds, function))
        return function

    return enter


def kinds() -> list[str]:
    """The kinds that have a suite here."""
    return sorted({*_suites, *_HOMES})


def checks(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[Check]:
    """The conformance checks of a registered method.

    Parameters
    ----------
    kind
        A kind of the catalog, such as `operation`.
    name
        The name under which the method is registered.
    options
        Options without which the method cannot be tried; by default those that its class states as `sample_options`.

    Raises
    ------
    NotFoundError
        For a kind without a suite, or a name that is not registered.
    """
    if kind not in _suites and kind in _HOMES:
        importlib.import_module(_HOMES[kind])
    if kind not in _suites:
        raise NotFoundError(f"There is no conformance suite for the kind '{kind}'; there is one for {', '.join(kinds())}.")
    implementation = catalog.get(kind, name).implementation
    given = getattr(implementation, "sample_options", {}) if options is None else options
    return list(_suites[kind](kind, name, given))


def check_method(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Run the conformance suite of a kind on one registered method.

    Parameters
    ----------
    kind, name, options
        As in `checks`.

    Returns
    -------
    The promises that were checked.

    Raises
    ------
    AssertionError
        With a sentence that names the promise that is broken and how.

    Examples
    --------
    >>> check_method("operation", "linear")[0]
    'options come back from plain values, and a typo is an error that names the nearest'
    """
    found = []
    for check in checks(kind, name, options):
        with tempfile.TemporaryDirectory(prefix="cairn-check-") as folder:
            check(folder)
        found.append(check.promise)
    return found


def choices(implementation: Any) -> Iterator[dict[str, Any]]:
    """Every choice of every option that has choices, one at a time: literals, switches, and lists of literals of one item each."""
    for key, field in implementation.model_fields.items():
        for value in _values(field.annotation):
            yield {key: value}


def _values(annotation: Any) -> list[Any]:
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is list:
        return [[value] for inner in get_args(annotation) for value in _values(inner)]
    return [value for inner in get_args(annotation) for value in _values(inner)]


def demand(condition: object, sentence: str) -> None:
    """Raise `AssertionError` with a sentence unless a condition holds; unlike `assert` it is never compiled away."""
    if not condition:
        raise AssertionError(sentence)


def options_round_trip(kind: str, name: str, options: Mapping[str, Any]) -> None:
    """The promise that options come back from plain values, and that a typo is an error that names the nearest."""
    method = configure(kind, {"name": name, **options})
    demand(configure(kind, method_options(method)) == method, f"{name}: its options do not come back from what method_options says of them.")
    known = max(type(method).model_fields, key=len, default=None)
    if known is None:
        return
    typo = f"{known[:-1]}x" if len(known) > 2 else f"{known}_"
    try:
        configure(kind, {"name": name, **options, typo: 1})
    except InputError as error:
        demand(f"'{known}'" in str(error), f"{name}: the error for '{typo}' does not name '{known}'.")
    else:
        raise AssertionError(f"{name} takes an option '{typo}' that it does not have.")
