"""Recipes to start from: what a checkpoint that has none goes on with, and a file with comments to edit.

A checkpoint says its network, its tokenizer, its end tokens and its dtype; the text says how much there is to learn from. The rest are
defaults that suit most: they stand here, once, for `cairn continue` without a recipe and for `cairn init`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError, NotFoundError
from cairn.training.forking import stored_dtype
from cairn.training.recipe import Recipe

LENGTH, SEQUENCES, AT_ONCE, UPDATES = 512, 16, 2048, 20
"""Longest sequence; sequences of an update; tokens of one forward pass; fewest updates in one pass over the text."""
RATE = 1e-5
"""Learning rate where none is named: low enough not to harm a finished model."""
SMALLEST = 64
"""Tokens below which a text is nothing to train on."""


def to_continue(source: Checkpoint, sources: Mapping[str, Any], *, rate: float | None = None) -> dict[str, Any]:
    """The recipe with which a checkpoint that has none goes on, as plain values; what it leaves out the checkpoint decides.

    Parameters
    ----------
    source
        A checkpoint of a causal language model with a tokenizer.
    sources
        Corpora by name.
    rate
        Highest learning rate; default: 1e-5.

    Returns
    -------
    Values of a `Recipe` without its model: sequences of 512 tokens (fewer for a model or a text that has no room for them), updates of 16
    of them (fewer, so that one pass over the text makes 20), one pass.

    Raises
    ------
    InputError
        For a checkpoint without a tokenizer, and a text of fewer than 64 tokens.
    """
    if source.is_adapter:
        raise InputError(f"{source.path} is an adapter; fold it first (cairn adapt fold {source.path} -o OUT), or name a recipe with its adapter: cairn fork.")
    if source.tokenizer is None:
        raise InputError(f"{source.path} has no tokenizer.json, so text cannot become its tokens; put the tokenizer of the model beside its weights.")
    tokens = _tokens(sources, source.tokenizer)
    if tokens < SMALLEST:
        raise InputError(f"{', '.join(sources)}: {tokens} tokens in all are too few to train on; at least {SMALLEST} are needed.")
    length = _power(min(LENGTH, _positions(source.config) or LENGTH, tokens // 4))
    batch = length * _power(max(1, min(SEQUENCES, tokens // (length * UPDATES))))
    at_once = max(length, AT_ONCE)
    return {
        "data": {"sources": {name: {"corpus": corpus} for name, corpus in sources.items()}, "sequence_length": length},
        "optimizer": {"name": "adamw", "lr": RATE if rate is None else rate},
        "training": {"tokens": max(1, tokens // batch) * batch, "batch": batch, **({"micro_batch": at_once} if at_once < batch else {})},
    }


def one_pass(recipe: Recipe, sources: Mapping[str, Any], preprocessor: Any) -> int:
    """Units of one pass over corpora in equal shares, as a recipe would read them, in whole updates."""
    values = recipe.asked()["data"] | {"sources": {name: {recipe.data.source_key: each} for name, each in sources.items()}, "mixture": []}
    data = recipe.changed({"data": values}).data
    _, feed = data.open(recipe.seed, preprocessor, objective=recipe.objective)
    samples = sum(feed.epoch_samples.values()) * data.sample_units
    return max(1, samples // recipe.training.batch) * recipe.training.batch


def init(source: str | Path, out: str | Path = "recipe.yaml", data: Mapping[str, Any] | None = None) -> Path:
    """Write a starting recipe with comments: for a checkpoint one that goes on with it, for a text one that trains a small model on it.

    Parameters
    ----------
    source
        A checkpoint (or run, or directory of transformers), or a text: a file or a pattern of files.
    out
        The file to write, which must not exist.
    data
        Of a checkpoint, the corpora to go on with, by name.

    Returns
    -------
    The file. `cairn train FILE --run DIR` trains it, of a checkpoint `cairn fork CKPT FILE --run DIR --fresh optimizer`.

    Raises
    ------
    InputError
        Where `out` exists, or `source` is neither a checkpoint nor a text. Nothing is written then.

    Examples
    --------
    >>> cairn.init("my.txt", "small.yaml")                               # doctest: +SKIP
    PosixPath('small.yaml')
    """
    path = Path(out)
    if path.exists():
        raise InputError(f"{path} exists and is not overwritten; choose another name with --out.")
    if not path.parent.is_dir():
        raise NotFoundError(f"There is no directory {path.parent} to write {path.name} into.")
    given = Path(source)
    text = _for_checkpoint(read.open(source), data) if given.is_dir() or "://" in str(source) else _for_text(str(source), data)
    documents.keep(path, text)
    return path


def _for_checkpoint(source: Checkpoint, data: Mapping[str, Any] | None) -> str:
    values = to_continue(source, data) if data else None
    training = values["training"] if values else {"tokens": "1M", "batch": LENGTH * SEQUENCES, "micro_batch": AT_ONCE}
    length = values["data"]["sequence_length"] if values else _power(min(LENGTH, _positions(source.config) or LENGTH))
    if not values:
        training |= {"batch": length * SEQUENCES, "micro_batch": min(length * SEQUENCES, max(length, AT_ONCE))}
    named = {name: str(corpus) for name, corpus in (data or {"mine": "my.txt"}).items()}
    sources = "\n".join(f"    {name}: {{corpus: {_quoted(corpus)}}}" for name, corpus in named.items())
    dtype = stored_dtype(source) or "float32"
    return f"""\
# Goes on from a checkpoint:  cairn fork {source.path} THIS_FILE --run runs/mine --fresh optimizer
# What it would cost:         the same with --dry-run
# Network, vocabulary, end tokens and tokenizer are the checkpoint's own and need no naming here: a '{source.config.get("model_type")}'.
data:
  sources:                          # text files, JSONL, Parquet, Hugging Face datasets; weights are shares (docs/howto/own-text.md)
{sources}
  sequence_length: {length}
  held_out: 0.01                    # share of the documents that is never trained on
objective: causal-lm                # cairn catalog objective
optimizer:
  name: adamw
  lr: {RATE:g}                         # highest rate; 1e-5 hardly forgets, 1e-4 learns faster
schedule: {{name: cosine, warmup: 1%, final: 0.1}}
training:
  tokens: {training["tokens"]}
  batch: {training["batch"]}                       # tokens of one update
  micro_batch: {training.get("micro_batch", training["batch"])}                 # tokens of one pass: less memory, the same result
  precision: float32                # bfloat16 computes in it, over float32 weights
checkpoint:
  every: 10%
  dtype: {dtype}                   # as the weights came; the optimizer's state keeps float32 ones
# callbacks: [{{name: evaluate, every: 10%}}]
# adapter: {{name: lora, rank: 8}}    # trains beside frozen weights instead
"""


def _for_text(source: str, data: Mapping[str, Any] | None) -> str:
    if data:
        raise InputError("--data belongs to a checkpoint; the text that a new model learns from is the first argument.")
    size = sum(os.path.getsize(path) for path in _files(source))
    # Four bytes a token or so; a vocabulary that each entry of is seen often.
    vocabulary = next(v for v in (512, 1024, 2048, 4096, 8192, 16384) if v == 16384 or size < v * 2000)
    width, layers = (128, 4) if size < 2_000_000 else (256, 6) if size < 50_000_000 else (512, 8)
    return f"""\
# Trains a small model from scratch:  cairn train THIS_FILE --run runs/mine
# What it would cost:                 the same with --dry-run
model:
  name: llama                       # cairn catalog architecture
  hidden_size: {width}
  intermediate_size: {width * 8 // 3 // 32 * 32}
  num_hidden_layers: {layers}
  num_attention_heads: {width // 32}
  tie_word_embeddings: true
data:
  tokenizer: {{bpe: {vocabulary}}}             # trained on the text; or the path of a tokenizer or a checkpoint
  sources:
    {name_of(source)}: {{corpus: {_quoted(source)}}}
  sequence_length: 128
  held_out: 0.01                    # share of the documents that is never trained on
objective: causal-lm                # cairn catalog objective
optimizer: {{name: adamw, lr: 2e-3}}
schedule: {{name: cosine, warmup: 5%, final: 0.1}}
training:
  tokens: {max(65536, 4 * (size // 4) // 4096 * 4096)}                     # about four passes
  batch: 4096                       # tokens of one update
checkpoint: {{every: 10%}}
# callbacks: [{{name: evaluate, every: 10%}}, {{name: sample, every: 10%}}]
"""


def name_of(corpus: str) -> str:
    """A name for the source that a corpus becomes, from that of its file."""
    name = Path(corpus).name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name.removesuffix(Path(name).suffix)).strip("-") or "text"


def called(checkpoint: Path) -> str:
    """What a checkpoint is called: its directory, of a step of a run the run's, of a snapshot in a hub's cache the model's."""
    path = Path(os.path.abspath(checkpoint))
    if path.parent.name in (read.CHECKPOINTS, "snapshots"):
        path = path.parent.parent
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name.rpartition("--")[2]).strip("-") or "model"


def _files(source: str) -> list[Path]:
    import glob

    found = [Path(path) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)]
    if not found:
        raise NotFoundError(f"{source} is neither a checkpoint nor a text: there is no such directory, file or pattern of files.")
    return found


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_./-]+", text) else "'" + text.replace("'", "''") + "'"


def _positions(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    return next((text[key] for key in ("max_position_embeddings", "n_positions") if text and isinstance(text.get(key), int)), None)


def _power(number: int) -> int:
    """The largest power of two that is no larger."""
    return 1 << (max(1, number).bit_length() - 1)


def _tokens(sources: Mapping[str, Any], tokenizer: Any) -> int:
    from cairn.data.text.tokens import prepare_cached
    from cairn.training.fields.text import Text

    held = Text.model_fields["held_out"].default
    return sum(len(prepare_cached(corpus, tokenizer, held_out=held).train.tokens) for corpus in sources.values())
