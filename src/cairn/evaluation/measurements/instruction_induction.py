"""Small text-to-text tasks shown by examples: does the model find the right output more probable than those of other inputs?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.data.corpora import digest_of
from cairn.errors import NotFoundError, suggestion
from cairn.evaluation.choices import Choices, Item
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register(
    "measurement", "instruction-induction", paper=Paper("Instruction Induction: From Few Examples to Natural Language Task Descriptions", "arXiv:2205.10782")
)
class InstructionInduction(Choices):
    """Share of inputs whose output is more probable than the outputs of other inputs, after some examples of the task."""

    tasks: list[str] | None = None
    """Tasks, e.g. `[antonyms, sum]`; default: the 22 whose examples have one input and one output."""
    examples: int = Field(5, ge=0)
    """Solved examples in front of each input."""
    inputs: int = Field(20, ge=1)
    """Inputs of each task."""
    choices: int = Field(4, ge=2)
    """Outputs to choose among; fewer where a task has fewer different ones."""
    seed: int = 0
    """Decides examples, inputs and outputs."""

    def data_digest(self, feed: Feed | None = None) -> str:
        return digest_of({name: file["blake3"] for name, file in datasets.get("instruction-induction").files.items()})

    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Item]:
        folder = datasets.find("instruction-induction") / "execute"
        known = sorted(path.stem for path in folder.glob("*.json"))
        for task in self.tasks or ():
            if task not in known:
                raise NotFoundError(f"instruction-induction has no task '{task}'.{suggestion(task, known)}")
        return [item for task in self.tasks or known for item in self._of_task(task, json.loads((folder / f"{task}.json").read_text(encoding="utf-8")))]

    def _of_task(self, task: str, document: dict[str, Any]) -> list[Item]:
        rows = [pair for pair in map(_pair, document["examples"].values()) if pair is not None]
        order = np.argsort(uniform(seed_for(self.seed, task), np.arange(len(rows))), kind="stable")
        rows = [rows[i] for i in order]
        shown = "".join(f"Input: {given}\nOutput: {output}\n\n" for given, output in rows[: self.examples])
        outputs = list(dict.fromkeys(output for _, output in rows))
        found = []
        for number, (given, output) in enumerate(rows[self.examples : self.examples + self.inputs]):
            draws = uniform(seed_for(self.seed, task, number), np.arange(len(outputs) + 1))
            others = [outputs[i] for i in np.argsort(draws[1:], kind="stable") if outputs[i] != output][: self.choices - 1]
            right = int(draws[0] * (len(others) + 1))
            chosen = [*others[:right], output, *others[right:]]
            if others:
                found.append(Item(f"{shown}Input: {given}\nOutput:", tuple(f" {choice}" for choice in chosen), right))
        return found


def _pair(example: dict[str, Any]) -> tuple[str, str] | None:
    """Input and output as texts; None where an example is made otherwise (`cause_and_effect`, `common_concept`)."""
    output = example.get("output")
    if isinstance(output, list) and output:
        output = output[0]
    return (example["input"], output) if isinstance(example.get("input"), str) and isinstance(output, str) and output else None
