"""A grammar of prompt formats that mean the same: separators, spaces, casing and enumeration, with rules for what is plausible.

A prompt is a list of fields joined by a SPACE; a field is its descriptor in some CASING, a SEPARATOR and its text. Options are
enumerated as descriptor, TEXT-OPTION-SEPARATOR, wrapped NUMBER, SEPARATOR and text, joined by a SPACE of their own
("Quantifying Language Models' Sensitivity to Spurious Features in Prompt Design", section 3 and appendix A).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cairn.errors import InputError
from cairn.randomness import seed_for, uniform

SEPARATORS = tuple("|:::_|::_|:_|_\n\t|\n____|_:_|_-_|_|\n_|\n\t|:|::|-_|\t".replace("_", " ").split("|"))
SPACES = tuple("^_^\n^_\n^_--_^__^;_\n^_||_^_<sep>_^,_^_\n_^_,_^\n_^._^_,__".replace("_", " ").split("^"))
"""Here and above a blank is written `_` where it would not be seen; published with one value twice, kept once."""
OPTION_SEPARATORS = ("", " ", "  ", "\t")
CASINGS: dict[str, Callable[[str], str]] = {"as is": str, "title": str.title, "upper": str.upper, "lower": str.lower}
WRAPS = ("({})", "{}.", "{})", "{} )", "[{}]", "<{}>")
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii")
NUMBERS: dict[str, Callable[[int], str]] = {
    "1": lambda i: str(i + 1),
    "A": lambda i: chr(ord("A") + i),
    "a": lambda i: chr(ord("a") + i),
    "Ⅰ": lambda i: chr(0x2160 + i),
    "i": lambda i: _ROMAN[i],
    "I": lambda i: _ROMAN[i].upper(),
}
MOST_OPTIONS = 12
"""Unicode has Roman numerals up to twelve."""


@dataclass(frozen=True)
class Enumeration:
    """How options are listed."""

    space: str = "\n"
    option_separator: str = ""
    wrap: str = "{}."
    number: str = "A"
    separator: str = " "

    def label(self, place: int) -> str:
        """What stands for an option in an answer."""
        return NUMBERS[self.number](place)

    def written(self, descriptor: str, options: Sequence[str]) -> str:
        items = (f"{descriptor}{self.option_separator}{self.wrap.format(self.label(i))}{self.separator}{text}" for i, text in enumerate(options))
        return self.space.join(items)


@dataclass(frozen=True)
class PromptFormat:
    """One way to write the fields of a prompt. Separator and casing are shared by all of them."""

    separator: str = ": "
    space: str = "\n"
    casing: str = "as is"
    enumeration: Enumeration | None = None

    def written(self, fields: Sequence[tuple[str, str | Sequence[str]]]) -> str:
        """The prompt of (descriptor, text) pairs; a list of texts is enumerated."""
        return self.space.join(self._field(descriptor, text) for descriptor, text in fields)

    def parsed(self, prompt: str, descriptors: Sequence[str]) -> list[str]:
        """The texts of plain fields, back from the prompt. Raises `InputError` where it has another format."""
        texts, rest = [], prompt
        for number, descriptor in enumerate(descriptors):
            head = (self.space if number else "") + CASINGS[self.casing](descriptor) + self.separator
            before, found, rest = rest.partition(head)
            if not found or (not number and before):
                raise InputError(f"The prompt has no field '{descriptor}' in this format.")
            if number:
                texts.append(before)
        return [*texts, rest]

    def breach(self) -> str | None:
        """The first rule that the format breaks, in words; None for a valid one."""
        inner = self.enumeration
        broken = [
            (self.separator == "", "a field needs a separator"),
            (self.space == "", "fields with text need a space between them"),
            ("\n" in self.separator and "\n" not in self.space, "a line break inside a field needs one between fields"),
        ]
        if inner is not None:
            broken += [
                (inner.space == "", "options need a space between them"),
                ("\n" in inner.separator and "\n" not in inner.space, "a line break inside an option needs one between options"),
                ("\n" in inner.space and "\n" not in self.space, "a line break between options needs one between fields"),
            ]
        return next((rule for breaks, rule in broken if breaks), None)

    def slots(self) -> dict[str, str]:
        """The value of each part, by name."""
        values: dict[str, Any] = asdict(self)
        inner = values.pop("enumeration")
        return values | ({f"enumeration.{key}": value for key, value in inner.items()} if inner else {})

    def _field(self, descriptor: str, text: str | Sequence[str]) -> str:
        named = CASINGS[self.casing](descriptor)
        if isinstance(text, str):
            return f"{named}{self.separator}{text}"
        if self.enumeration is None:
            raise InputError("These items have options to enumerate, and the format does not say how.")
        return self.enumeration.written(named, text)


def every(enumerated: bool = False) -> Iterator[PromptFormat]:
    """All valid formats, in a fixed order."""
    for values in itertools.product(*_choices(enumerated)):
        made = _made(values)
        if made.breach() is None:
            yield made


def sample(count: int, seed: int = 0, enumerated: bool = False) -> list[PromptFormat]:
    """Distinct valid formats: each part drawn uniformly and independently, invalid ones drawn again; all of them where there are no more."""
    if not enumerated and count >= len(plain := list(every())):
        return plain
    choices = _choices(enumerated)
    drawn: dict[PromptFormat, None] = {}
    draw = 0
    while len(drawn) < count:
        picks = uniform(seed_for(seed, "format"), draw * len(choices) + np.arange(len(choices)))
        made = _made([choice[int(pick * len(choice))] for choice, pick in zip(choices, picks, strict=True)])
        if made.breach() is None:
            drawn[made] = None
        draw += 1
    return list(drawn)


def _choices(enumerated: bool) -> list[Sequence[str]]:
    plain: list[Sequence[str]] = [SEPARATORS, SPACES, list(CASINGS)]
    return [*plain, SPACES, OPTION_SEPARATORS, WRAPS, list(NUMBERS), SEPARATORS] if enumerated else plain


def _made(values: Sequence[str]) -> PromptFormat:
    separator, space, casing, *inner = values
    return PromptFormat(separator, space, casing, Enumeration(*inner) if inner else None)
