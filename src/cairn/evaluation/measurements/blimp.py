"""BLiMP: does the model prefer the grammatical sentence of a minimal pair?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.data.corpora import digest_of
from cairn.evaluation.answers import greater, proportion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.measure import Measurement, Score

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "blimp", paper=Paper("BLiMP: The Benchmark of Linguistic Minimal Pairs for English", "arXiv:1912.00582"))
class Blimp(Measurement):
    """Share of minimal pairs whose grammatical sentence has the higher probability as a whole, after the end-of-text id."""

    paradigms: list[str] | None = None
    """Paradigms to score, e.g. `[passive_1]`; default: all 67."""
    pairs: int = Field(1000, ge=1, le=1000)
    """Pairs of each paradigm, the first ones."""
    details: bool = False
    """Also one score per paradigm."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens of one forward pass; changes nothing but speed."""

    def data_digest(self, feed: Feed | None = None) -> str:
        return digest_of({name: file["blake3"] for name, file in datasets.get("blimp").files.items()})

    def protocol(self, feed: Feed | None = None) -> dict[str, object]:
        described = super().protocol(feed)
        del described["batch_tokens"]
        return described

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        names = self.paradigms or sorted(name.removesuffix(".jsonl") for name in datasets.get("blimp").files)
        pairs = [(name, row) for name in names for row in list(datasets.rows("blimp", f"{name}.jsonl"))[: self.pairs]]
        texts = [text for _, row in pairs for text in (row["sentence_good"], row["sentence_bad"])]
        engine = engine_of(model, tokenizer, budget_tokens=self.batch_tokens)
        scores = [scored.logprob for scored in engine.loglikelihood([("", text) for text in texts])]
        right = [greater(good, bad) for good, bad in zip(scores[0::2], scores[1::2], strict=True)]
        found = [proportion("blimp", "accuracy", right, chance=0.5)]
        if self.details:
            for name in names:
                mine = [r for (paradigm, _), r in zip(pairs, right, strict=True) if paradigm == name]
                found.append(proportion(f"blimp/{name}", "accuracy", mine, chance=0.5))
        return found
