"""A tagger that learns in one language and works in others: hashed character n-grams, a bidirectional GRU, a head (card 9).

Pretrained on raw text of all languages by guessing masked words, fine-tuned on the parts of speech of one of them: runs on the field `words`
with the objective `token-classification`. Pretraining tags the 4,000 most common words with themselves and hides 15 % of all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cairn.checkpoint.format import read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving import write
from cairn.data import datasets
from cairn.evaluation.measure import evaluate
from cairn.evaluation.results import Score
from cairn.fields.words.families.gru_tagger import GruTaggerConfig
from cairn.fields.words.measurements.tag_accuracy import TagAccuracy
from cairn.fields.words.processor import WordProcessor
from cairn.randomness import seed_for
from cairn.training.run import fork, train

TAGS = ["ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"]
BUCKETS, WIDTH, BATCH = 2**14, 64, 32
COMMON, HIDDEN = 4000, 0.15


@dataclass(frozen=True)
class Sentence:
    """Words and their tags; None where a word has none."""

    words: list[str]
    tags: list[str | None]


def sentences(dataset: str, file: str, most: int | None = None) -> list[Sentence]:
    """The sentences of a treebank file, the first `most`."""
    rows = [row["words"] for row in datasets.rows(dataset, file)][:most]
    return [Sentence([word[1] for word in row], [word[3] if word[3] in TAGS else None for word in row]) for row in rows]


def stored(path: Path, texts: Sequence[Sentence]) -> Path:
    """Sentences as a source of the field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"words": text.words, "tags": text.tags}) + "\n" for text in texts), encoding="utf-8")
    return path


def pretrain(texts: Sequence[Sentence], folder: Path, seed: int, epochs: int = 4, lr: float = 3e-3) -> Checkpoint:
    """A model that has guessed 15 % masked words among the 4,000 most common."""
    common = {word for word, _ in Counter(word for text in texts for word in text.words).most_common(COMMON)}
    guessed = [Sentence(text.words, [word if word in common else None for word in text.words]) for text in texts]
    objective = {"name": "token-classification", "hidden": HIDDEN}
    made = _recipe(stored(folder / "texts.jsonl", guessed), seed_for(seed, "tagger"), epochs * (len(texts) // BATCH), lr, BATCH, 1)
    return train(made | {"objective": objective, "schedule": "constant"}, folder / "run").newest()


def headed(body: Checkpoint, path: Path, head: int) -> Checkpoint:
    """A pretrained model under a new head for parts of speech, initialized by the seed `head`."""
    config = GruTaggerConfig(vocab_size=BUCKETS + 2, hidden_size=WIDTH, id2label={str(number): tag for number, tag in enumerate(TAGS)})
    fresh = {name: tensor for name, tensor in config.build(head).state_dict().items() if name.startswith("classifier.")}
    weights = {name: tensor for name, tensor in body.tensors.load().items() if not name.startswith("classifier.")} | fresh
    lineage = Lineage.record("operation", "head", parents=[body], directory=path.parent)
    return write.save(path, model=weights, config=config.to_hf(), lineage=lineage, tokenizer=WordProcessor.load(body.path))


def fine_tune(start: Checkpoint, texts: Sequence[Sentence], folder: Path, *, lr: float, order: int, epochs: int = 6, snapshots: int = 10) -> list[Checkpoint]:
    """Snapshots of one fine-tuning run, oldest first: linear decay, the order by the seed `order`."""
    batch = min(BATCH, len(texts))
    steps = epochs * (len(texts) // batch)
    made = _recipe(stored(folder / "texts.jsonl", texts), order % 2**31, steps, lr, batch, snapshots)
    run = fork(start, folder / "run", recipe=made | {"schedule": {"name": "linear", "final": 0.0}}, fresh=["optimizer"])
    return [read.open(path) for path in run.checkpoints()]


def _recipe(source: Path, seed: int, steps: int, lr: float, batch: int, snapshots: int) -> dict[str, Any]:
    return {
        "seed": seed % 2**31,
        "model": {"name": "gru-tagger", "hidden_size": WIDTH},
        "data": {"name": "words", "sources": {"sentences": {"sentences": str(source)}}, "held_out": 0, "buckets": BUCKETS},
        "objective": "token-classification",
        "optimizer": {"name": "adamw", "lr": lr, "betas": [0.9, 0.999], "weight_decay": 0.01, "decay": "all"},
        "training": {"samples": f"{steps} steps", "batch": batch, "clip": 1.0, "compile": False, "log_every": steps},
        "checkpoint": {"every": f"{steps // snapshots} steps", "capture": "off"},
    }


def restarted(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """A snapshot as the start of a run of its own, at step 0."""
    lineage = Lineage.record("operation", "start", parents=[checkpoint], directory=path.parent)
    return write.save(path, model=checkpoint.tensors.load(), config=checkpoint.config, lineage=lineage, tokenizer=WordProcessor.load(checkpoint.path))


def accuracy(checkpoint: Checkpoint, source: Path) -> float:
    """Share of words whose tag is right."""
    return evaluate(checkpoint, [_task(source)], store=False, device="cpu")[0].value


@torch.no_grad()
def loss(checkpoint: Checkpoint, weights: Mapping[str, Tensor], source: Path) -> float:
    """Cross-entropy of the tags with these weights in the place of a checkpoint's own, nats per word."""
    model = checkpoint.model()
    model.load_state_dict(dict(weights))
    found: list[Score] = TagAccuracy.parse({key: value for key, value in _task(source).items() if key != "name"}).of(model, WordProcessor.load(checkpoint.path))
    return next(score.value for score in found if score.metric == "loss")


def _task(source: Path) -> dict[str, Any]:
    data = {"name": "words", "sources": {"sentences": {"sentences": str(source)}}, "held_out": 0}
    return {"name": "tag-accuracy", "data": data, "split": "train"}
