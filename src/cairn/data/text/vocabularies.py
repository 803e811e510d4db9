"""Surgery on vocabularies: tokenizers made of other tokenizers, and which tokens of one make up a token of another.

Nothing here knows of weights. A token is compared by the bytes of text that it stands for, however its tokenizer spells them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cairn.data.text.tokenizer import Tokenizer
from cairn.errors import InputError, MismatchError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROLES = ("eos_token", "bos_token", "pad_token", "unk_token")


# -- tokenizers of tokenizers ------------------------------------------------------------------------------------------


def extended(tokenizer: Tokenizer, tokens: Sequence[str], *, special: bool = False) -> Tokenizer:
    """The tokenizer with tokens added behind its ids, in this order; text that holds one of them is split there. Those that it has stay.

    Raises `InputError` for a token without text.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    if not tokens or not all(token.strip() for token in tokens):
        raise InputError("Name at least one token to add; a token has at least one sign that is no space.")
    backend = Backend.from_buffer(tokenizer.definition)
    new = [token for token in dict.fromkeys(tokens) if tokenizer.backend.token_to_id(token) is None]
    added = [AddedToken(token, special=special, normalized=False) for token in new]
    (backend.add_special_tokens if special else backend.add_tokens)(added)
    return Tokenizer(backend.to_str().encode(), without_ids(tokenizer.config), tokenizer.end_ids)


def trimmed(tokenizer: Tokenizer, kept: Iterable[int]) -> tuple[Tokenizer, list[int]]:
    """A BPE tokenizer with these tokens, its special tokens, its bytes, and whatever is joined on the way to them; and the old id of each new one.

    Text that was made of kept tokens is made of the same tokens: every merge that can have led to one of them stays, in its order.
    Raises `InputError` for a tokenizer that is no BPE.
    """
    document = bpe_of(tokenizer)
    model = document["model"]
    ids: dict[str, int] = {str(token): int(number) for token, number in model["vocab"].items()}
    tokens = {number: token for token, number in ids.items()}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    parts: dict[str, list[str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, []).extend((left, right))
    added = {int(token["id"]) for token in document.get("added_tokens") or []}
    atoms = [token for token in ids if len(token) == 1 or _BYTE.fullmatch(token) or token == model.get("unk_token")]
    found: set[str] = set()
    waiting = [tokens[number] for number in kept if number in tokens] + atoms
    while waiting:
        token = waiting.pop()
        if token not in found:
            found.add(token)
            waiting.extend(parts.get(token, ()))
    old = sorted({ids[token] for token in found} | added)
    number_of = {number: place for place, number in enumerate(old)}
    model["vocab"] = {token: number_of[number] for token, number in sorted(ids.items(), key=lambda item: item[1]) if number in number_of}
    model["merges"] = [[left, right] for left, right in merges if {left, right, left + right} <= set(model["vocab"])]
    for token in document.get("added_tokens") or []:
        token["id"] = number_of[int(token["id"])]
    _renumber(document.get("post_processor"), number_of)
    ends = [number_of[number] for number in tokenizer.end_ids if number in number_of]
    return Tokenizer(json.dumps(document, ensure_ascii=False).encode(), without_ids(tokenizer.config), ends), old


def united(first: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """The first tokenizer with the tokens and merges of the others behind its own; its ids stay, and its rule of splitting text.

    Raises `MismatchError` for tokenizers that spell tokens in different ways, `InputError` for one that is no BPE.
    """
    document = bpe_of(first)
    model, added = document["model"], document.setdefault("added_tokens", [])
    vocabulary: dict[str, int] = {str(token): int(number) for token, number in model["vocab"].items()}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    known, joined = set(vocabulary) | {token["content"] for token in added}, set(merges)
    following = max([*vocabulary.values(), *(int(token["id"]) for token in added)]) + 1
    for other in others:
        if spelling(other) != spelling(first):
            raise MismatchError(
                f"One tokenizer spells tokens in {spelling(first)} and another in {spelling(other)}, so their merges cannot be joined; "
                "give one model the vocabulary of the other: cairn tokenizer transplant."
            )
        theirs = bpe_of(other)
        specials = {token["content"]: token for token in theirs.get("added_tokens") or []}
        ids = {int(number): str(token) for token, number in theirs["model"]["vocab"].items()} | {int(t["id"]): str(t["content"]) for t in specials.values()}
        for _, token in sorted(ids.items()):
            if token in known:
                continue
            known.add(token)
            if token in specials:
                added.append({**specials[token], "id": following})
            else:
                vocabulary[token] = following
            following += 1
        for merge in theirs["model"]["merges"]:
            pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            if pair not in joined and {*pair, "".join(pair)} <= vocabulary.keys():
                joined.add(pair)
                merges.append(pair)
    model["vocab"], model["merges"] = vocabulary, [list(merge) for merge in merges]
    return Tokenizer(json.dumps(document, ensure_ascii=False).encode(), without_ids(first.config), first.end_ids)


def without_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json without what it says of ids, which tokenizer.json says already."""
    return {key: value for key, value in config.items() if key != "added_tokens_decoder"}


def spelling(tokenizer: Tokenizer) -> str:
    """How a tokenizer spells the text of its tokens."""
    text = json.dumps(json.loads(tokenizer.definition).get("decoder"))
    return "bytes" if '"ByteLevel"' in text else "pieces with ▁ for a space" if "▁" in text or '"Metaspace"' in text else "pieces of its own"


def bpe_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of a BPE. Raises `InputError` for any other kind."""
    document: dict[str, Any] = json.loads(tokenizer.definition)
    if document["model"].get("type", "BPE") != "BPE" or "merges" not in document["model"]:
        raise InputError(f"A tokenizer of the kind {document['model'].get('type')} cannot be cut or joined; BPE can.")
    return document


def _renumber(part: Any, number_of: Mapping[int, int]) -> None:
    """Put new ids into what stands around texts."""
    if isinstance(part, dict):
        if "ids" in part and "tokens" in part:
            part["ids"] = [number_of[number] for number in part["ids"]]
        for key in ("sep", "cls"):
            if isinstance(part.get(key), list) and len(part[key]) == 2:
                part[key][1] = number_of[part[key][1]]
        for value in part.values():
            _renumber(value, number_of)
    elif isinstance(part, list):
        for value in part:
            _renumber(value, number_of)


# -- tokens of one in tokens of another --------------------------------------------------------------------------------


def made_of(new: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """For every id of `new` the ids of `old` that it is made of: one that stands for the same text, else those that `old` splits its text into.

    A special token is that of the same name, or of the same part (end, beginning, padding, unknown); without any it is made of nothing.
    """
    theirs = _surfaces(old)
    same: dict[bytes, int] = {}
    for number, text in theirs.items():
        same.setdefault(text, number)
    specials, roles = old.special_tokens, _roles(new, old)
    named = {number: token for token, number in new.special_tokens.items()}
    texts, found = _surfaces(new), []
    for number in range(new.vocab_size):
        if number in named:
            token = named[number]
            found.append([specials[token]] if token in specials else [roles[number]] if number in roles else [])
        elif number in texts:
            text = texts[number]
            found.append([same[text]] if text in same else _pieces(text, old, same))
        else:
            found.append([])
    return found


def _pieces(text: bytes, old: Tokenizer, same: Mapping[bytes, int]) -> list[int]:
    """The ids of a text that is no token; of bytes that are no text the ids of each byte."""
    try:
        return old.encode(text.decode())
    except UnicodeDecodeError:
        return [same[bytes([byte])] for byte in text if bytes([byte]) in same]


def _roles(new: Tokenizer, old: Tokenizer) -> dict[int, int]:
    """Ids of special tokens that play the same part in both, whatever they are called."""
    found: dict[int, int] = {}
    for role in _ROLES:
        pair = [tokenizer.backend.token_to_id(token) if (token := tokenizer._token(role)) else None for tokenizer in (new, old)]
        if pair[0] is not None and pair[1] is not None:
            found.setdefault(pair[0], pair[1])
    if new.eos_id is not None and old.eos_id is not None:
        found.setdefault(new.eos_id, old.eos_id)
    return found


def _surfaces(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of text that each id stands for, special tokens left out."""
    in_bytes, added = spelling(tokenizer) == "bytes", tokenizer.backend.get_added_tokens_decoder()
    found = {}
    for symbol, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if number in added:
            if not added[number].special:
                found[number] = symbol.encode()
        elif in_bytes:
            found[number] = bytes(_bytes_of_signs()[sign] for sign in symbol) if set(symbol) <= _bytes_of_signs().keys() else symbol.encode()
        elif match := _BYTE.fullmatch(symbol):
            found[number] = bytes([int(match[1], 16)])
        else:
            found[number] = symbol.replace("▁", " ").encode()
    return found


@functools.cache
def _bytes_of_signs() -> dict[str, int]:
    """The byte behind each sign of byte-level tokenizers: printable ones are themselves, the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
