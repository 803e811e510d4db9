"""Give a model another vocabulary: what `cairn tokenizer` calls.

The row of a token that was there before stays as it is, bit for bit. The row of a new token is the mean of the rows of the old tokens
into which its text was split; of one that is made of nothing, the mean of all rows. A head that is tied stays tied.

"WECHSEL" (arXiv:2112.06598) and "Fast Vocabulary Transfer" (arXiv:2402.09977, section 3) begin in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr

from cairn.checkpoint.format import documents, kinds, read
from cairn.checkpoint.format.carried import TOKENIZER
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.data.text import vocabularies
from cairn.data.text.tokenizer import Tokenizer
from cairn.device import computes
from cairn.errors import InputError, MismatchError
from cairn.models.anatomy import anatomy_of_config

BLOCK = 4096
"""Rows that are made at once."""
SEQUENCES, LENGTH = 64, 128
"""Windows of the text on which a model is measured before and after, and their length in tokens."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Surgery:
    """What became of a model: the new checkpoint, tokens before and after, rows that were kept and made, and bits per byte of a held-out text."""

    checkpoint: Checkpoint
    tokens: tuple[int, int]
    kept: int
    made: int
    bits_per_byte: tuple[float, float] | None = None

    def plain(self) -> dict[str, Any]:
        """For a report."""
        named = {"path": str(self.checkpoint.path), "digest": self.checkpoint.digest, "tokens": list(self.tokens), "kept": self.kept, "made": self.made}
        return {**named, "bits_per_byte": list(self.bits_per_byte) if self.bits_per_byte else None}


class Vocabulary(stream.Operation):
    """The same model with another vocabulary: each new row is an old one, or the mean of several."""

    method: str
    """extend, trim, transplant or union."""
    multiple: int = 1
    """The embedding gets a multiple of so many rows."""

    _tokenizer: Tokenizer = PrivateAttr()
    _sources: list[list[int]] = PrivateAttr(default_factory=list)
    _said: dict[str, Any] = PrivateAttr(default_factory=dict)
    _named: tuple[str, list[str]] = PrivateAttr(default=("", []))

    def check(self, parents: Sequence[Checkpoint]) -> None:
        parent = parents[0]
        parts = anatomy_of_config(parent.config)
        biases = [f"{parts.head.removesuffix('.weight')}.bias"]
        names = [name for name in dict.fromkeys((parts.embedding, parts.head, *biases)) if name in parent.tensors]
        if parts.embedding not in names:
            raise MismatchError(f"{parent.path} holds no '{parts.embedding}', so its embedding is not known.")
        rows = parent.tensors[parts.embedding].shape[0]
        odd = next((name for name in names if parent.tensors[name].shape[0] != rows), None)
        if odd is not None:
            raise MismatchError(f"{parent.path}: '{odd}' has {parent.tensors[odd].shape[0]} rows and the embedding {rows}.")
        if (highest := max((number for row in self._sources for number in row), default=0)) >= rows:
            raise MismatchError(f"{parent.path}: its tokenizer has the id {highest}, and the embedding has {rows} rows.")
        self._named = (parts.embedding, names)

    def rows(self, parent: Checkpoint) -> int:
        """Rows of the new embedding: those of all tokens; an embedding that is longer already keeps its length where ids stay."""
        there = parent.tensors[self._named[0]].shape[0]
        wanted = max(len(self._sources), there) if self.method in ("extend", "union") else len(self._sources)
        return -(-wanted // self.multiple) * self.multiple

    def outputs(self, parents: Sequence[Checkpoint]) -> list[TensorSpec]:
        rows = self.rows(parents[0])
        return [TensorSpec(s.name, s.dtype, (rows, *s.shape[1:])) if s.name in self._named[1] else s for s in super().outputs(parents)]

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        parent = parents[0]
        changed = self._with_ids(parent.config, parent) | {"vocab_size": self.rows(parent)}
        if isinstance(changed.get("text_config"), dict):
            changed["text_config"] = self._with_ids(changed["text_config"], parent) | {"vocab_size": self.rows(parent)}
        return changed

    def luggage(self, parents: Sequence[Checkpoint]) -> dict[str, bytes]:
        parent = parents[0]
        files = {name: data for name, data in super().luggage(parents).items() if name not in TOKENIZER}
        if parent.generation is not None:
            files["generation_config.json"] = documents.as_json(self._with_ids(parent.generation, parent))
        return files | self._tokenizer.files()

    def _with_ids(self, values: Mapping[str, Any], parent: Checkpoint) -> dict[str, Any]:
        """Settings with the new ids of the tokens that they name; a token that is gone is named no more."""
        place: dict[int, int] = {}
        for number, row in enumerate(self._sources):
            if len(row) == 1:
                place.setdefault(row[0], number)
        changed = dict(values)
        for key in _IDS:
            if isinstance(old := values.get(key), int | list) and not isinstance(old, bool):
                new = [place[number] for number in kinds.ids(old) if number in place]
                changed[key] = new if isinstance(old, list) and new else new[0] if new else None
        return changed

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        old = parents[0].tensors[self._named[0]].shape[0]
        return [f"vocab_size: {old} -> {self.rows(parents[0])}", f"tokens: {self.kept} kept, {len(self._sources) - self.kept} made of others"]

    def facts(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        return {**self._said, "tokenizer": self._tokenizer.digest}

    @property
    def kept(self) -> int:
        """How many tokens have an old row."""
        return sum(len(row) == 1 for row in self._sources)

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        tensor = parents[0].tensors[spec.name]
        if spec.name not in self._named[1]:
            yield from stream.copied(tensor)
            return
        old = tensor.load()
        named = sorted({number for row in self._sources for number in row}) or list(range(len(old)))
        nothing = old[named].double().mean(0)
        for begin in range(0, spec.shape[0], BLOCK):
            rows = range(begin, min(begin + BLOCK, spec.shape[0]))
            yield torch.stack([self._row(number, old, nothing) for number in rows]).reshape(-1)

    def _row(self, number: int, old: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
        sources = self._sources[number] if number < len(self._sources) else [number] if number < len(old) and self.method in ("extend", "union") else []
        if len(sources) == 1:
            return old[sources[0]]
        return (old[sources].double().mean(0) if sources else nothing).to(old.dtype)


def _operated(
    method: str,
    checkpoint: Checkpoint,
    out: str | Path,
    tokenizer: Tokenizer,
    sources: list[list[int]],
    *,
    said: Mapping[str, Any],
    multiple: int,
    text: Any,
    device: Any,
    progress: Callable[[int, int], object] | None,
) -> Surgery:
    operation = Vocabulary(method=method, multiple=multiple)
    operation._tokenizer, operation._sources, operation._said = tokenizer, sources, dict(said)
    before = _bits(checkpoint, text, device)
    made = stream.apply(operation, [checkpoint], out, name=f"tokenizer {method}", progress=progress)
    after = _bits(made, text, device)
    old = _tokenizer_of(checkpoint).vocab_size
    figures = (before, after) if before is not None and after is not None else None
    return Surgery(made, (old, tokenizer.vocab_size), operation.kept, len(sources) - operation.kept, figures)


def _bits(checkpoint: Checkpoint, text: Any, device: Any) -> float | None:
    """Bits per byte of the beginning of a text, which can be compared over vocabularies; None where no text is named."""
    if text is None:
        return None
    from cairn.evaluation.measure import evaluate

    task = {"name": "held-out", "corpus": text, "sequences": SEQUENCES, "sequence_length": LENGTH}
    rows = evaluate([checkpoint], [task], store=False, device=device)
    return next(row.value for row in rows if row.metric == "bits_per_byte")


def _tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.tokenizer is None:
        raise InputError(f"{checkpoint.path} has no tokenizer.json, so it is not known which token each row of its embedding stands for.")
    found: Tokenizer = checkpoint.tokenizer
    return found


@computes
def extend(
    checkpoint: str | Path | Checkpoint,
    tokens: Sequence[str],
    out: str | Path,
    *,
    special: bool = False,
    multiple: int = 1,
    text: Any = None,
    device: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Surgery:
    """Add tokens behind those of a model. Old ids and rows stay.

    Parameters
    ----------
    checkpoint
        A checkpoint or a run of any causal language model.
    tokens
        The texts of the new tokens; those that it has already are passed over.
    out
        Where the new checkpoint goes; nothing may be there.
    special
        The tokens are no text: they stand for themselves and are left out of what is written.
    multiple
        The embedding gets a multiple of so many rows.
    text
        A corpus (a name, a path) on whose beginning bits per byte are measured before and after.
    device, progress
        As everywhere.

    Raises
    ------
    InputError, MismatchError
        Before anything is written.

    Examples
    --------
    >>> cairn.tokenizer.extend("smollm", ["<think>", "</think>"], "thinker", special=True)  # doctest: +SKIP
    """
    opened = read.opened(checkpoint)
    old = _tokenizer_of(opened)
    new = vocabularies.extended(old, tokens, special=special)
    if new.vocab_size == old.vocab_size:
        raise InputError(f"{opened.path} has all of these tokens already.")
    sources = [[number] for number in range(old.vocab_size)]
    names = {number: token for token, number in new.backend.get_vocab(with_added_tokens=True).items()}
    sources += [[] if special else old.encode(names[number]) for number in range(old.vocab_size, new.vocab_size)]
    said = {"tokens": list(tokens), "special": special}
    return _operated("extend", opened, out, new, sources, said=said, multiple=multiple, text=text, device=device, progress=progress)


@computes
def trim(
    checkpoint: str | Path | Checkpoint,
    corpus: Any,
    out: str | Path,
    *,
    documents: int = 10_000,
    multiple: int = 1,
    text: Any = None,
    device: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Surgery:
    """Leave out the tokens that a corpus does not need. That corpus is made of the same tokens as before, under new ids.

    Special tokens and single bytes stay, and whatever is joined on the way to a token that stays. Of BPE tokenizers alone.

    Parameters
    ----------
    checkpoint
        A checkpoint or a run of any causal language model.
    corpus
        The texts whose tokens stay: a name, a path, or a mapping as in a recipe.
    out
        Where the new checkpoint goes; nothing may be there.
    documents
        How many documents of the corpus are read at most.
    multiple, text, device, progress
        As in `extend`.

    Raises
    ------
    InputError, MismatchError
        Before anything is written.

    Examples
    --------
    >>> cairn.tokenizer.trim("smollm", "my.txt", "small", text="held_out.txt")  # doctest: +SKIP
    """
    from itertools import islice

    from cairn.data import corpora

    opened = read.opened(checkpoint)
    old = _tokenizer_of(opened)
    vocabularies.bpe_of(old)  # before a long read
    seen: set[int] = set()
    source = corpora.resolve(corpus)
    for document in islice(source.documents(), documents):
        seen.update(old.encode(document.text))
    if not seen:
        raise InputError("The corpus has no text, so no token would stay.")
    new, kept = vocabularies.trimmed(old, seen)
    said = {"corpus": source.fingerprint(), "documents": documents}
    return _operated("trim", opened, out, new, [[number] for number in kept], said=said, multiple=multiple, text=text, device=device, progress=progress)


@computes
def transplant(
    checkpoint: str | Path | Checkpoint,
    donor: str | Path | Checkpoint,
    out: str | Path,
    *,
    multiple: int = 1,
    text: Any = None,
    device: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Surgery:
    """Give a model the tokenizer of another one. A token that stands for the same text keeps its row, however it is spelled.

    The chat template stays the model's own.

    Parameters
    ----------
    checkpoint
        A checkpoint or a run of any causal language model.
    donor
        The checkpoint (or a folder with a tokenizer) whose tokenizer it gets.
    out
        Where the new checkpoint goes; nothing may be there.
    multiple, text, device, progress
        As in `extend`.

    Raises
    ------
    InputError, MismatchError
        Before anything is written.

    Examples
    --------
    >>> cairn.tokenizer.transplant("smollm", "qwen", "smollm-qwen", text="held_out.txt")  # doctest: +SKIP
    """
    opened = read.opened(checkpoint)
    theirs = donor if isinstance(donor, Checkpoint) else None
    given = _tokenizer_of(theirs) if theirs is not None else Tokenizer.load(read.open(donor).path if read.is_run(Path(donor)) else donor)  # type: ignore[arg-type]
    new = Tokenizer(given.definition, vocabularies.without_ids(given.config), given.end_ids)
    sources = vocabularies.made_of(new, _tokenizer_of(opened))
    said = {"donor": given.digest}
    return _operated("transplant", opened, out, new, sources, said=said, multiple=multiple, text=text, device=device, progress=progress)


@computes
def union(
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    multiple: int = 1,
    text: Any = None,
    device: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Surgery]:
    """Give several models one vocabulary, that of the first with the tokens of the others behind it, so that they can be merged.

    Parameters
    ----------
    checkpoints
        Two or more checkpoints of causal language models with BPE tokenizers that are spelled alike.
    out
        A new folder; the models lie in it as `1-NAME`, `2-NAME` ... in their order.
    multiple, text, device, progress
        As in `extend`.

    Raises
    ------
    InputError, MismatchError
        Before anything is written.

    Examples
    --------
    >>> cairn.tokenizer.union(["smollm", "other"], "alike")  # doctest: +SKIP
    >>> cairn.merge("slerp", ["alike/1-smollm", "alike/2-other"], "merged")  # doctest: +SKIP
    """
    opened = [read.opened(item) for item in checkpoints]
    if len(opened) < 2:
        raise InputError("A union is of two checkpoints or more.")
    if Path(out).exists():
        raise InputError(f"{out} exists; name a new folder.")
    tokenizers = [_tokenizer_of(checkpoint) for checkpoint in opened]
    new = vocabularies.united(tokenizers[0], tokenizers[1:])
    plans = [vocabularies.made_of(new, old) for old in tokenizers]
    plans[0] = [[number] for number in range(tokenizers[0].vocab_size)] + plans[0][tokenizers[0].vocab_size :]
    said = {"of": [tokenizer.digest for tokenizer in tokenizers]}
    rows = max(new.vocab_size, *(checkpoint.tensors[anatomy_of_config(checkpoint.config).embedding].shape[0] for checkpoint in opened[:1]))
    found = []
    for number, (checkpoint, sources) in enumerate(zip(opened, plans, strict=True), 1):
        place = Path(out) / f"{number}-{checkpoint.path.name}"
        whole = sources + [[] for _ in range(rows - len(sources))]
        if number == 1:
            whole = sources + [[row] for row in range(len(sources), rows)]
        surgery = _operated(
            "union" if number == 1 else "transplant", checkpoint, place, new, whole, said=said, multiple=multiple, text=text, device=device, progress=progress
        )
        found.append(surgery)
    return found
