"""A tagger that learns in one language and works in others: hashed character n-grams, a bidirectional GRU, a head (card 9).

Pretrained on raw text of all languages by guessing masked words, fine-tuned on the parts of speech of one of them.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn import randomness
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving import write
from cairn.data import datasets
from cairn.evaluation.answers import right_share

TAGS = ["ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"]
BUCKETS, WIDTH, BATCH = 2**14, 64, 32
IGNORED = -100


@dataclass(frozen=True)
class Sentence:
    """Words and the numbers of their tags."""

    words: list[str]
    tags: list[int]


def sentences(dataset: str, file: str, most: int | None = None) -> list[Sentence]:
    """The sentences of a treebank file, the first `most`."""
    rows = [row["words"] for row in datasets.rows(dataset, file)][:most]
    return [Sentence([word[1] for word in row], [TAGS.index(word[3]) if word[3] in TAGS else IGNORED for word in row]) for row in rows]


class Tagger(nn.Module):
    """Words as means of hashed n-grams, a bidirectional GRU, a head over `outputs` classes."""

    def __init__(self, outputs: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.grams = nn.EmbeddingBag(BUCKETS + 1, WIDTH, mode="mean")
        self.gru = nn.GRU(WIDTH, WIDTH, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, outputs)

    def forward(self, words: Sequence[Sequence[str | None]]) -> Tensor:
        """States (B, T, 2 * WIDTH) of sentences padded to the longest; None is a masked word."""
        longest = max(map(len, words))
        grams = [_grams(sentence[place]) if place < len(sentence) else [BUCKETS] for sentence in words for place in range(longest)]
        starts = np.cumsum([0, *map(len, grams)])[:-1]
        flat = torch.from_numpy(np.fromiter((gram for word in grams for gram in word), np.int64))
        embedded = self.grams(flat, torch.from_numpy(starts)).view(len(words), longest, WIDTH)
        return self.gru(embedded)[0]


def pretrain(texts: Sequence[Sentence], seed: int, epochs: int = 4, lr: float = 3e-3) -> dict[str, Tensor]:
    """The body's weights after guessing 15 % masked words among the 4,000 most common."""
    common = {word: number for number, (word, _) in enumerate(Counter(w for s in texts for w in s.words).most_common(4000))}
    model = Tagger(len(common), randomness.seed_for(seed, "tagger"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step, batch in enumerate(_batches(texts, seed, epochs)):
        masked, targets = [], []
        for number, sentence in enumerate(batch):
            hide = randomness.uniform(randomness.seed_for(seed, "mask", step, number), np.arange(len(sentence.words))) < 0.15
            masked.append([None if hidden else word for word, hidden in zip(sentence.words, hide, strict=True)])
            targets.append([common.get(word, IGNORED) if hidden else IGNORED for word, hidden in zip(sentence.words, hide, strict=True)])
        _step(model, optimizer, masked, targets)
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("head")}


def fine_tune(
    start: dict[str, Tensor], texts: Sequence[Sentence], folder: Path, *, lr: float, head: int, order: int, epochs: int = 6, snapshots: int = 10
) -> list[Checkpoint]:
    """Snapshots of one fine-tuning run, oldest first: linear decay, the head initialized by the seed `head` where `start` has none, the
    order by `order`."""
    model = Tagger(len(TAGS), head)
    model.load_state_dict(start, strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    batches = list(_batches(texts, order, epochs))
    at = {round(len(batches) * (i + 1) / snapshots) for i in range(snapshots)}
    saved = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        _step(model, optimizer, [s.words for s in batch], [s.tags for s in batch])
        if step + 1 in at:
            saved.append(save(model.state_dict(), folder / f"step-{step + 1:05d}"))
    return saved


def save(weights: dict[str, Tensor], path: Path) -> Checkpoint:
    """A tagger as a checkpoint."""
    lineage = Lineage.record("run", "train", directory=path.parent)
    return write.save(path, model={name: tensor.clone() for name, tensor in weights.items()}, config={"model_type": "tagger"}, lineage=lineage)


def accuracy(checkpoint: Checkpoint, texts: Sequence[Sentence]) -> float:
    """Share of words whose tag is right."""
    scores, targets = _answers(checkpoint.tensors.load(), texts)
    return right_share(scores, targets)


def loss(weights: dict[str, Tensor], texts: Sequence[Sentence]) -> float:
    """Cross-entropy of the tags, nats per word."""
    return float(F.cross_entropy(*_answers(weights, texts)))


@torch.no_grad()
def _answers(weights: dict[str, Tensor], texts: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """Scores (words, tags) and right tags (words) of all words that have one."""
    model = Tagger(len(TAGS), 0)
    model.load_state_dict(weights)
    scores, targets = [], []
    ordered = sorted(texts, key=lambda sentence: len(sentence.words))
    for begin in range(0, len(ordered), 64):
        batch = ordered[begin : begin + 64]
        found = model.head(model([s.words for s in batch]))
        wanted = _padded([s.tags for s in batch], found.shape[1])
        scores.append(found[wanted != IGNORED])
        targets.append(wanted[wanted != IGNORED])
    return torch.cat(scores), torch.cat(targets)


_hashed: dict[str | None, list[int]] = {None: [BUCKETS]}


def _grams(word: str | None) -> list[int]:
    """Buckets of the character 3- to 5-grams of a word; a masked word has one of its own."""
    if word not in _hashed:
        text = f"<{word}>"
        grams = [text[i : i + n] for n in (3, 4, 5) for i in range(max(1, len(text) - n + 1))]
        _hashed[word] = sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams})
    return _hashed[word]


def _batches(texts: Sequence[Sentence], seed: int, epochs: int) -> Iterator[list[Sentence]]:
    size = min(BATCH, len(texts))
    for epoch in range(epochs):
        order = randomness.permutation(randomness.seed_for(seed, "order", epoch), len(texts), np.arange(len(texts)))
        for begin in range(0, len(texts) - size + 1, size):
            yield [texts[i] for i in order[begin : begin + size]]


def _step(model: Tagger, optimizer: Any, words: Sequence[Sequence[str | None]], targets: Sequence[Sequence[int]]) -> None:
    states = model(words)
    wanted = _padded(targets, states.shape[1])
    asked = wanted != IGNORED
    loss = F.cross_entropy(model.head(states[asked]), wanted[asked])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*row, *[IGNORED] * (length - len(row))] for row in rows])
