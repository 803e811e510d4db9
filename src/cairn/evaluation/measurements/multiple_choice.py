"""Multiple choice by likelihood, as for HellaSwag: which continuation of a context does the model find most probable?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.choices import Choices, Item
from cairn.evaluation.rows import digest_of, filled, read_rows

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "multiple-choice", paper=Paper("HellaSwag: Can a Machine Really Finish Your Sentence?", "arXiv:1905.07830"))
class MultipleChoice(Choices):
    """Share of items of a file whose right continuation is the most probable, by its sum and by its sum per byte. Ties go to the first."""

    path: Path
    """JSON lines, one item each."""
    context: str = "ctx"
    """Key of the text before the continuation (the defaults are HellaSwag's), or a template such as `Question: {question}\nAnswer:`."""
    choices: str = "endings"
    """Key of the list of continuations; each follows the context after a space."""
    answer: str = "label"
    """Key of the number of the right one, from 0."""
    items: int | None = Field(None, ge=1)
    """How many, the first ones; default: all."""
    task: str | None = None
    """Name of the task in the table; default: `multiple-choice`."""

    def data_digest(self, feed: Feed | None = None) -> str:
        return digest_of(self.path)

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["path"]  # the digest of its contents says which items, wherever they lie
        return described

    def title(self) -> str:
        return self.task or super().title()

    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Item]:
        return [self._item(where, row) for where, row in read_rows(self.path, self.items)]

    def _item(self, where: str, row: dict[str, Any]) -> Item:
        context = filled(self.context, row, where)
        try:
            choices, answer = row[self.choices], int(row[self.answer])
        except KeyError as error:
            raise InputError(f"{where} has no key {error}; its keys are {', '.join(sorted(row))}. Set context, choices and answer.") from None
        except (ValueError, TypeError):
            raise InputError(f"{where} is not an item: a JSON object with a text, a list of texts and the number of the right one.") from None
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
            raise InputError(f"{where}: '{self.context}' must be a text and '{self.choices}' a list of texts, none of them empty.")
        if not 0 <= answer < len(choices):
            raise InputError(f"{where}: the answer is {answer} and there are {len(choices)} choices; they are counted from 0.")
        return Item(context, tuple(f" {choice}" for choice in choices), answer)
