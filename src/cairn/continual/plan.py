"""How a budget of tokens is spent on a new domain: a subset for several epochs, chosen by quality, mixed with what the model knows.

    n = T share / L sequences are drawn from a source of share `share` in T tokens of sequences of L;
    a plan of E epochs reads m = ceil(n / E) different ones, each n / m times: exactly E where E divides n.

Strategies 1 to 3 of "Efficient Continual Pre-training by Mitigating the Stability Gap".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from cairn.errors import InputError
from cairn.options import Options


class TokenBudget(Options):
    """How the new data are spent. One epoch and no quality is one pass in random order: the baseline, bit for bit."""

    epochs: int = Field(1, ge=1)
    """Passes over the subset of each new source; the paper takes 4 to 5."""
    quality: Any = None
    """A corpus of good text: the documents of each new source that an n-gram model of it finds likeliest are read, and no others."""
    keep: float = Field(0.25, gt=0, le=1)
    """With `quality`: share of a source's text that is kept, best first."""
    clip: float = Field(0.02, ge=0, lt=1)
    """With `quality`: share of the text that is left out for being too likely (tables, licenses, repetitions)."""

    def applied(self, sources: Mapping[str, Mapping[str, Any]], tokens: int, length: int) -> dict[str, dict[str, Any]]:
        """The sources with the plan's corpora and subsets, for `tokens` tokens in sequences of `length`. Raises `InputError` if a subset is empty."""
        return {name: self._one(name, dict(source), tokens, length) for name, source in sources.items()}

    def _one(self, name: str, source: dict[str, Any], tokens: int, length: int) -> dict[str, Any]:
        if self.quality is not None:
            from cairn.selection.quality import best_documents

            source["corpus"] = str(best_documents(source["corpus"], self.quality, keep=self.keep, clip=self.clip))
        if self.epochs > 1:
            source["subset"] = unique(tokens, source["weight"], self.epochs, length)
        return source


def unique(tokens: int, share: float, epochs: int, length: int) -> int:
    """Tokens of the subset that is read `epochs` times in `tokens` tokens of which the source has `share`, in sequences of `length`."""
    sequences = round(tokens * share / length)
    if sequences < epochs:
        raise InputError(f"{tokens} tokens with a share of {share:.4g} are {sequences} sequences of {length}, too few for {epochs} epochs.")
    return -(-sequences // epochs) * length


def substituted(rates: Mapping[str, float], replaced: str, domain: str) -> dict[str, float]:
    """Strategy 3: the rates of pretraining with one source (the web) replaced by the new domain. Raises `InputError` if it is not there."""
    if replaced not in rates or domain in rates:
        raise InputError(f"The mixture has {', '.join(rates)}; it must have '{replaced}' to be replaced and no '{domain}' yet.")
    total = sum(rates.values())
    return {domain if name == replaced else name: rate / total for name, rate in rates.items()}


def read_so_far(recipe: Mapping[str, Any], feed: Mapping[str, Any], epoch_tokens: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Tokens in all, different tokens and passes of each source: recipe and feed state as a checkpoint keeps them, tokens of one pass by source.

    Repeated tokens are not new ones: "unique" never exceeds one pass.
    """
    length = recipe["data"]["sequence_length"]
    found = {}
    for name, sequences in feed["cursor"].items():
        total = sequences * length
        found[name] = {"tokens": total, "unique": min(total, epoch_tokens[name]), "passes": total / epoch_tokens[name]}
    return found
