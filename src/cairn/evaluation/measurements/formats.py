"""The same questions under many equivalent prompt formats: an interval of scores instead of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation import grammar
from cairn.evaluation.answers import finite
from cairn.evaluation.audits.spread import SpreadResult, slot_effects, spread_of, thompson
from cairn.evaluation.grammar import MOST_OPTIONS, Enumeration, PromptFormat
from cairn.evaluation.items import ItemMeasurement, Seen, encoded_from, greedy_matches
from cairn.evaluation.measure import Score
from cairn.evaluation.scoring import log_likelihoods
from cairn.statistics import Z95, binomial_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.tokenizer import Tokenizer

Fields = list[tuple[str, str | Sequence[str]]]


@register(
    "measurement",
    "formats",
    paper=Paper("Quantifying Language Models' Sensitivity to Spurious Features in Prompt Design", "arXiv:2310.11324", card=43),
)
class Formats(ItemMeasurement):
    """Lowest and highest accuracy over prompt formats that mean the same, and the spread that noise alone would make."""

    formats: int = Field(64, ge=2)
    """Formats, drawn once by `seed`; the first is the default one."""
    default: dict[str, str] = {}
    """Parts of the default format: `separator`, `space`, `casing`; what is left out is ': ', a line break, 'as is'."""
    budget: int | None = Field(None, ge=1)
    """Outcomes to look at in a search for both ends; default: every format on every item, which the full table needs."""
    batch: int = Field(20, ge=1)
    """Items of one step of the search."""
    shots: int = Field(0, ge=0)
    """Items of the file, the first ones, that are shown solved in the same format and are not scored."""
    score: Literal["exact", "rank"] = "exact"
    """`exact`: greedy decoding writes the answer and its end; `rank`: the answer is the most probable of all answers of the file
    (of the item's own options, where it has some)."""
    instruction: str = ""
    end: str = "\n"
    """What must follow an exact answer."""
    descriptors: tuple[str, str, str] = ("Input", "Output", "Option")
    """What the fields are called."""
    input: str = "input"
    output: str = "output"
    """Key of the answer: a text, or the number of the right option."""
    options: str | None = None
    """Key of a list of options, which are then enumerated and answered by their label."""
    seed: int = 0

    def drawn(self) -> list[PromptFormat]:
        """The formats, the default one first."""
        first = PromptFormat(**self.default, enumeration=Enumeration() if self.options else None)  # type: ignore[arg-type]
        others = [each for each in grammar.sample(self.formats, self.seed, self.options is not None) if each != first]
        return [first, *others[: self.formats - 1]]

    def look(self, model: nn.Module, tokenizer: Tokenizer) -> Seen:
        """`outcomes` of every format on every item (None where the search did not look), `formats`, `found` by the search."""
        asker = _Asker(self, model, tokenizer)
        formats, items = self.drawn(), len(asker.asked)
        table = np.full((len(formats), items), np.nan)
        found: SpreadResult | None = None
        if self.budget is None:
            pairs = [(row, column) for row in range(len(formats)) for column in range(items)]
            table[:] = asker.outcomes([(formats[row], column) for row, column in pairs]).reshape(table.shape)
        else:
            found = self._search(asker, formats, table)
        outcomes = [[None if np.isnan(value) else int(value) for value in row] for row in table]
        return {"outcomes": outcomes, "formats": [each.slots() for each in formats], "found": found and vars(found)}

    def scores(self, seen: Seen) -> list[Score]:
        found = self.judge(seen)
        n = found["n"]
        named = {key: found[key] for key in ("default", "low", "high")}
        scores = [Score("formats", key, value, binomial_error(round(value * n), n), n) for key, value in named.items()]
        error = (found["excess"][1] - found["excess"][0]) / (2 * Z95)
        return [*scores, Score("formats", "spread", found["spread"], error, n, chance=found["null"])]

    def judge(self, seen: Seen) -> dict[str, Any]:
        """All figures: the default, the ends and their formats, the spread with its null, and, of a full table, the effect of each part."""
        table = np.array(seen["outcomes"], np.float64)
        full = table[~np.isnan(table).any(axis=1)]
        numbers = np.flatnonzero(~np.isnan(table).any(axis=1))
        spread = spread_of(full, self.seed)
        means = full.mean(axis=1)
        by_slot = slot_effects([_format(each) for each in seen["formats"]], means) if len(full) == len(table) else None
        return {
            "n": table.shape[1],
            "n_formats": len(table),
            "fully_scored": len(full),
            "calls": int((~np.isnan(table)).sum()),
            "default": float(table[0].mean()),
            **vars(spread),
            "low_format": seen["formats"][int(numbers[means.argmin()])],
            "high_format": seen["formats"][int(numbers[means.argmax()])],
            "scores": [float(value) for value in means],
            "by_slot": by_slot,
        }

    def _search(self, asker: _Asker, formats: list[PromptFormat], table: NDArray[np.float64]) -> SpreadResult:
        """Find the ends within the budget; the default and both ends are scored in full outside of it."""

        def pull(row: int, begin: int, end: int) -> NDArray[np.float64]:
            wanted = [column for column in range(begin, end) if np.isnan(table[row, column])]
            table[row, wanted] = asker.outcomes([(formats[row], column) for column in wanted])
            return table[row, begin:end]

        items = table.shape[1]
        default = float(pull(0, 0, items).mean())
        found = thompson(pull, len(formats), items, self.budget or 0, default=default, batch=self.batch, seed=self.seed)
        for end in (found.low, found.high):
            pull(end, 0, items)
        return found


class _Asker:
    """Asks one model: the prompt of an item in a format, and whether the answer comes out right."""

    def __init__(self, measurement: Formats, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.m, self.model, self.tokenizer = measurement, model, tokenizer
        keys = (measurement.input, measurement.output, *([measurement.options] if measurement.options else []))
        rows = measurement.rows(*keys)
        if len(rows) <= measurement.shots:
            raise InputError(f"{measurement.path} holds {len(rows)} items, {measurement.shots} of which are shown solved; none is left to score.")
        self.shown, self.asked = rows[: measurement.shots], rows[measurement.shots :]
        self.answers = sorted({str(row[measurement.output]) for row in rows}) if measurement.options is None else []
        if measurement.score == "rank" and measurement.options is None and len(self.answers) > 100:
            raise InputError(f"{measurement.path} has {len(self.answers)} different answers, too many to rank; use score=exact.")

    def outcomes(self, asked: list[tuple[PromptFormat, int]]) -> NDArray[np.float64]:
        """1 for each (format, item) that is answered right, else 0."""
        if not asked:
            return np.zeros(0)
        prompts = [(self._prompt(each, self.asked[item]), *self._labels(each, self.asked[item])) for each, item in asked]
        if self.m.score == "exact":
            sequences, starts = encoded_from(self.tokenizer, [(prompt, answer + self.m.end) for prompt, _, answer in prompts])
            matches = greedy_matches(self.model, sequences, starts)
            finite([math.nan if match is None else 0.0 for match in matches], "answers")
            return np.array(matches, np.float64)
        texts = [(prompt, label) for prompt, labels, _ in prompts for label in labels]
        sequences, starts = encoded_from(self.tokenizer, texts)
        scores = log_likelihoods(self.model, sequences, starts=starts)
        finite(scores.tolist(), "answers")
        parts = np.split(scores, np.cumsum([len(labels) for _, labels, _ in prompts])[:-1])
        return np.array([float(labels[int(part.argmax())] == answer) for part, (_, labels, answer) in zip(parts, prompts, strict=True)])

    def _prompt(self, each: PromptFormat, row: dict[str, Any]) -> str:
        solved = [each.written(self._fields(each, other, answered=True)) for other in self.shown]
        return "\n\n".join([*([self.m.instruction] if self.m.instruction else []), *solved, each.written(self._fields(each, row, answered=False))])

    def _fields(self, each: PromptFormat, row: dict[str, Any], *, answered: bool) -> Fields:
        given, answer, option = self.m.descriptors
        options: Fields = [(option, [str(text) for text in row[self.m.options]])] if self.m.options else []
        return [(given, str(row[self.m.input])), *options, (answer, self._labels(each, row)[1] if answered else "")]

    def _labels(self, each: PromptFormat, row: dict[str, Any]) -> tuple[list[str], str]:
        """All answers that can be given, and the right one: with options their labels in the format's own numbers."""
        if self.m.options is None:
            return self.answers, str(row[self.m.output])
        options, answer = row[self.m.options], row[self.m.output]
        if each.enumeration is None or not isinstance(options, list) or len(options) > MOST_OPTIONS:
            raise InputError(f"{self.m.path}: '{self.m.options}' must be a list of at most {MOST_OPTIONS} options.")
        if not isinstance(answer, int) or not 0 <= answer < len(options):
            raise InputError(f"{self.m.path}: '{self.m.output}' must be the number of the right option, from 0 to {len(options) - 1}.")
        labels = [each.enumeration.label(place) for place in range(len(options))]
        return labels, labels[answer]


def _format(slots: dict[str, str]) -> PromptFormat:
    inner = {key.removeprefix("enumeration."): value for key, value in slots.items() if key.startswith("enumeration.")}
    return PromptFormat(slots["separator"], slots["space"], slots["casing"], Enumeration(**inner) if inner else None)
