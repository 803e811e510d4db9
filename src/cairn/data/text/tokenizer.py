"""Tokenizers: text to ids and back, on the `tokenizers` library, saved so that transformers opens them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import ArrayLike, NDArray

from cairn.checkpoint.format import documents, kinds
from cairn.checkpoint.format.place import place
from cairn.errors import DamagedError, InputError, NotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 50 * 2**20
"""How much of the sources a BPE is trained on."""


class Tokenizer:
    """Text to ids and back. `digest` identifies it; `files()` is what a checkpoint carries."""

    def __init__(self, definition: bytes, config: Mapping[str, Any] | None = None, ends: Iterable[int] = (), *, where: str | Path = "tokenizer.json") -> None:
        """From the bytes of a tokenizer.json, the contents of a tokenizer_config.json, and further ids that end a text; `where` it lies is for errors.

        Truncation and padding are what one call of another program wanted; they are taken out of the definition.
        """
        self.definition, self._where = _without_calls(definition, where), where
        self.config = dict(config) if config is not None else {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
        self._ends = frozenset(ends)

    @functools.cached_property
    def backend(self) -> Backend:
        """The tokenizer of the `tokenizers` library."""
        from tokenizers import Tokenizer as Backend

        documents.as_object(documents.parse(self.definition, self._where), self._where)
        try:
            backend = Backend.from_buffer(self.definition)
        except BaseException as error:
            # The library panics where its own code did not expect what the file says; that is no Exception.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise DamagedError(f"{self._where} is not valid: {' '.join(str(error).split())[:200]}.") from None
            raise
        if not backend.get_vocab_size(with_added_tokens=True):
            raise DamagedError(f"{self._where} has no vocabulary.")
        backend.no_truncation()
        backend.no_padding()
        return backend

    @functools.cached_property
    def digest(self) -> str:
        """Identity of what it does to text: equal for definitions that mean the same, however they are written."""
        return blake3(json.dumps(_meaning(self.definition), sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The id that stands between documents, if the tokenizer has one."""
        return self.backend.token_to_id(self._token("eos_token") or END_OF_TEXT)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a text: the tokenizer's own, and those that config.json and generation_config.json beside it name."""
        return self._ends | ({self.eos_id} if self.eos_id is not None else set())

    @functools.cached_property
    def front(self) -> list[int]:
        """The ids that the tokenizer puts in front of every text that a model reads; many put none."""
        return self._around[0]

    @functools.cached_property
    def begin_id(self) -> int | None:
        """The id behind which a text is scored that has nothing else in front: that of the beginning, else of the end, as lm-evaluation-harness."""
        bos = self._token("bos_token")
        found = self.backend.token_to_id(bos) if bos else None
        return self.eos_id if found is None else found

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        inside = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        if not inside:  # a vocabulary without this letter: nothing is known to stand behind a text
            return encoding.ids, []
        return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that are no text, with their ids."""
        return {token.content: number for number, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def extended(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with special tokens added behind its ids, in this order; those that it has stay where they are."""
        missing = [token for token in dict.fromkeys(tokens) if self.backend.token_to_id(token) is None]
        if not missing:
            return self
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_buffer(self.definition)
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        return Tokenizer(backend.to_str().encode(), self.config, self._ends)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added in front or behind."""
        return self.backend.encode(_sound(text), add_special_tokens=False).ids

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a text with what the tokenizer puts in front and behind, as transformers encodes it."""
        return self.backend.encode(_sound(text), add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, on all cores."""
        try:
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # what the library says of text with half of a surrogate pair
            found = self.backend.encode_batch_fast(list(map(_sound, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue: with what the tokenizer puts in front, and never empty where it has an id to begin with."""
        ids = [*self.front, *self.encode(text)]
        return ids or ([self.begin_id] if self.begin_id is not None else [])

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids, special tokens left out unless asked for."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def continuation(self, before: Sequence[int], ids: Sequence[int], *, special: bool = False) -> str:
        """The text that `ids` add behind `before`: some tokenizers write a space in front of a word only where a text goes on."""
        seen = list(before[-TAIL:])
        known, whole = self.decode(seen, special=special), self.decode([*seen, *ids], special=special)
        return whole[len(known) :] if whole.startswith(known) else self.decode(ids, special=special)

    @functools.cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id adds behind other text, shape (vocab_size,); 0 for special tokens."""
        return self._bytes(behind=True)

    @functools.cached_property
    def first_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id adds where it begins a text: a space that some tokenizers put in front of the first word is none of the text's."""
        return self._bytes(behind=False)

    def bytes_of(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Bytes of text that each token but the first adds, for tokens (..., L + 1): shape (..., L). What follows a special token begins a text."""
        ids = np.asarray(tokens, np.int64)
        begins = np.zeros(self.vocab_size, bool)
        begins[[number for token, number in self.special_tokens.items() if token != self._unknown]] = True
        return np.where(begins[ids[..., :-1]], self.first_bytes[ids[..., 1:]], self.token_bytes[ids[..., 1:]])

    @functools.cached_property
    def _unknown(self) -> str | None:
        """The token that stands for what the vocabulary has no sign for: no text, and no end of any."""
        model = json.loads(self.definition)["model"]
        if model.get("unk_id") is not None:
            return self.backend.id_to_token(int(model["unk_id"]))
        return model.get("unk_token")

    def _bytes(self, *, behind: bool) -> NDArray[np.int64]:
        """Exact for what the vocabulary says: symbols of bytes are one byte each, all others are what the decoder writes for them."""
        decoders = set(_kinds(json.loads(self.definition).get("decoder")))
        added = {number: token for number, token in self.backend.get_added_tokens_decoder().items()}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        to_decode: list[int] = []
        for symbol, number in vocabulary.items():
            if number in added:
                counts[number] = 0 if added[number].special else len(symbol.encode())
            elif "ByteLevel" in decoders:
                counts[number] = len(symbol)
            elif "ByteFallback" in decoders and _BYTE.fullmatch(symbol):
                counts[number] = 1
            else:
                to_decode.append(number)
        if to_decode:
            counts[to_decode] = self._decoded_bytes(to_decode, behind, set(added))
        return counts

    def _decoded_bytes(self, numbers: list[int], behind: bool, added: set[int]) -> list[int]:
        """Bytes of each id as the decoder writes it, alone or behind a word."""
        words = self.decode_batch([[number] for number in numbers])
        front = next((number for number, word in zip(numbers, words, strict=True) if word.strip() and number not in added), None) if behind else None
        if front is None:
            return [len(word.encode()) for word in words]
        before = len(self.decode([front]).encode())
        return [len(word.encode()) - before for word in self.decode_batch([[front, number] for number in numbers])]

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of several sequences of ids, on all cores."""
        return self.backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        return {"tokenizer.json": self.definition, "tokenizer_config.json": documents.as_json(self.config)}

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
        beside = {name: _beside(file.with_name(name), kind) for name, kind in _BESIDE.items()}
        ends = [number for name in ("config.json", "generation_config.json") for number in kinds.ids((beside[name] or {}).get("eos_token_id"))]
        try:
            return cls(documents.read_bytes(file), beside["tokenizer_config.json"], ends, where=file)
        except FileNotFoundError:
            raise NotFoundError(f"There is no tokenizer at {path}: tokenizer.json is missing.") from None

    def _token(self, key: str) -> str | None:
        """A token that tokenizer_config.json names, as a string or as an object with its content."""
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        return token if isinstance(token, str) else None


TAIL = 64
"""Tokens before a continuation that decide how its text is written; one is enough for every decoder known, more for bytes of one sign."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _sound(text: str) -> str:
    """A text that can be written. Raises `InputError` for one with half of a surrogate pair, which is no sign of any text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The text holds half of a surrogate pair (sign {error.start + 1}, {text[error.start]!a}), which is no sign; repair it.") from None
    return text


def _without_calls(definition: bytes, where: object) -> bytes:
    """A tokenizer.json without truncation and padding; unchanged bytes where it has none."""
    if not re.search(rb'"(truncation|padding)"\s*:\s*\{', definition):
        return definition
    document = documents.as_object(documents.parse(definition, where), where)
    return json.dumps(document | {"truncation": None, "padding": None}, ensure_ascii=False, indent=2).encode()


def _meaning(definition: bytes) -> Any:
    """A tokenizer.json as plain values that are equal for equal tokenizers, whichever version wrote them."""
    try:
        document = documents.parse(definition, "tokenizer.json")
    except DamagedError:
        return definition.hex()
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return document
    model = {key: value for key, value in document["model"].items() if value not in (None, False, "")}
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {key: value for key, value in document.items() if key not in ("version", "truncation", "padding") and value is not None} | {"model": model}


def _kinds(part: Any) -> Iterator[str]:
    """The types that a part of a tokenizer.json is made of."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:
            yield from _kinds(value)


_BESIDE: dict[str, type[kinds.File]] = {"tokenizer_config.json": kinds.TokenizerConfig, "config.json": kinds.Config, "generation_config.json": kinds.Generation}
"""The files beside a tokenizer.json that say how it is used."""


def _beside(path: Path, kind: type[kinds.File]) -> dict[str, Any] | None:
    try:
        document = documents.read_object(path)
    except FileNotFoundError:
        return None
    documents.validated(kind, document, path)
    return document


def byte_level() -> Tokenizer:
    """One id per byte (256 of them) and one for the end of a text."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    _dress(backend)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return _begun(backend)


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
    backend.train_from_iterator((piece for text in texts for piece in _bounded(text)), trainer)
    return _begun(backend)


LONGEST_WORD = 1000
"""Characters of an unbroken stretch of text that a BPE is trained on as one word: learning merges takes time that grows with the square of a word."""

_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1}}}|\s{{{LONGEST_WORD + 1}}}")


def _bounded(text: str) -> Iterator[str]:
    """A text whole, or in pieces of which no word is longer than `LONGEST_WORD`."""
    begin = 0
    while (found := _LONG.search(text, begin)) is not None:
        yield text[begin : found.start() + LONGEST_WORD]
        begin = found.start() + LONGEST_WORD
    yield text[begin:]


def _dress(backend: Backend) -> None:
    """Words by GPT-2's rule (the pattern that other programs call "gpt-2"), spelled in bytes."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()


def _begun(backend: Backend) -> Tokenizer:
    """The tokenizer, which puts the end of a text in front of the next one, as documents stand in training."""
    from tokenizers import processors

    number = backend.token_to_id(END_OF_TEXT)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, number)]
    )
    return Tokenizer(backend.to_str().encode())


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
