"""Tokenizers: text to ids and back, on the `tokenizers` library, saved so that transformers opens them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn.checkpoint.format.place import place
from cairn.errors import DamagedError, InputError, NotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 50 * 2**20
"""How much of the sources a BPE is trained on."""


class Tokenizer:
    """Text to ids and back. `digest` identifies it; `files()` is what a checkpoint carries."""

    def __init__(self, definition: bytes, config: Mapping[str, Any] | None = None) -> None:
        """From the bytes of a tokenizer.json and the contents of a tokenizer_config.json."""
        self.definition = definition
        self.config = dict(config) if config is not None else {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}

    @functools.cached_property
    def backend(self) -> Backend:
        """The tokenizer of the `tokenizers` library."""
        from tokenizers import Tokenizer as Backend

        try:
            return Backend.from_buffer(self.definition)
        except ValueError as error:
            raise DamagedError(f"tokenizer.json is not valid: {error}") from None

    @property
    def digest(self) -> str:
        """Identity of what it does to text."""
        return blake3(self.definition).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The id that stands between documents, if the tokenizer has one."""
        token = self.config.get("eos_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        return self.backend.token_to_id(token or END_OF_TEXT)

    def extended(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with special tokens added behind its ids, in this order; those that it has stay where they are."""
        missing = [token for token in dict.fromkeys(tokens) if self.backend.token_to_id(token) is None]
        if not missing:
            return self
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_buffer(self.definition)
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        return Tokenizer(backend.to_str().encode(), self.config)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added in front or behind."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text behind each id, shape (vocab_size,); 0 for special tokens. Exact for byte-level tokenizers, whose
        symbols stand for one byte each; for others the length of the id decoded alone."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        exact = b'"ByteLevel"' in self.definition
        for symbol, number in self.backend.get_vocab(with_added_tokens=True).items():
            if symbol not in special:
                counts[number] = len(symbol) if exact else len(self.backend.decode([number]).encode())
        return counts

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        return {"tokenizer.json": self.definition, "tokenizer_config.json": (json.dumps(self.config, indent=2) + "\n").encode()}

    def save(self, directory: str | Path) -> None:
        """Write the files into a directory, which is made if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (Path(directory) / name).write_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, or a directory (a checkpoint, a run's checkpoint, a transformers directory) that holds one."""
        path = place(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise NotFoundError(f"There is no tokenizer at {path}: tokenizer.json is missing.")
        beside = file.with_name("tokenizer_config.json")
        try:
            config = json.loads(beside.read_bytes()) if beside.is_file() else None
        except ValueError:
            raise DamagedError(f"{beside} is not valid JSON.") from None
        return cls(file.read_bytes(), config)


def byte_level() -> Tokenizer:
    """One id per byte (256 of them) and one for the end of a text."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    _dress(backend)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend.to_str().encode())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids, the end of a text among them, trained on `texts`; deterministic."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise InputError(f"A byte-level BPE needs a vocabulary of at least 257 ids, not {vocab_size}.")
    backend = Backend(models.BPE())
    _dress(backend)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str().encode())


def _dress(backend: Backend) -> None:
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def resolve_tokenizer(spec: Any, corpora: Sequence[Any] = ()) -> Tokenizer:
    """The tokenizer that a recipe names: `byte`, `{bpe: 4096}` trained on `corpora` (and cached), or a path."""
    if spec == "byte":
        return byte_level()
    if isinstance(spec, Mapping):
        if set(spec) != {"bpe"} or not isinstance(spec["bpe"], int):
            raise InputError(f"A tokenizer is written as 'byte', as 'bpe: 4096' or as a path, not as {dict(spec)}.")
        return _trained_bpe(spec["bpe"], corpora)
    if not isinstance(spec, (str, Path)):
        raise InputError(f"A tokenizer is written as 'byte', as 'bpe: 4096' or as a path, not as {spec!r}.")
    return Tokenizer.load(spec)


def _trained_bpe(vocab_size: int, specs: Sequence[Any]) -> Tokenizer:
    from cairn import cache
    from cairn.data import corpora

    sources = [corpora.resolve(spec) for spec in specs]
    if not sources:
        raise InputError("A BPE tokenizer is trained on the sources; name at least one.")
    key = blake3(json.dumps([vocab_size, TRAINING_BYTES, *(source.fingerprint() for source in sources)]).encode()).hexdigest()[:24]
    kept = cache.directory() / "tokenizers" / f"bpe-{vocab_size}-{key}"
    if not (kept / "tokenizer.json").is_file():
        tokenizer = train_bpe((text for source in sources for text in _beginning(source, TRAINING_BYTES // len(sources))), vocab_size)
        cache.publish(kept, tokenizer.save)
    return Tokenizer.load(kept)


def _beginning(corpus: Any, limit: int) -> Iterable[str]:
    seen = 0
    for document in corpus.documents():
        yield document.text
        seen += len(document.text)
        if seen >= limit:
            return
