"""The tokenizer of a GGUF file as tokenizer.json and its companions, and the other way round.

A GGUF file holds a vocabulary and the NAME of a rule that splits text into words (`tokenizer.ggml.pre`). A name that is not known is
refused: a tokenizer that splits digits otherwise than in training gives other tokens, and nothing would say so.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cairn.checkpoint.foreign.gguf.file import GGUFFile
from cairn.checkpoint.format.documents import as_json
from cairn.errors import DamagedError, InputError, Notice, suggestion

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""
ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "<EOT>", "<|EOT|>", "<|return|>"})
"""Special tokens that end an answer in the models that have them, whichever of them the file names."""
SPACE = "▁"

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_AFTER = {**_BYTES, "use_regex": False}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


@dataclass(frozen=True)
class Rule:
    """How text becomes words, as the `tokenizers` library writes it."""

    splits: dict[str, Any]
    whole_words: bool = False
    """Whether a word that is in the vocabulary is taken whole, without merging."""
    begins: bool = False
    """Whether texts begin with the beginning token where the file does not say."""


_GPT2 = Rule(_BYTES)
_DIGITS = Rule(_sequence({"type": "Digits", "individual_digits": True}, _BYTES))
_THREE = _sequence(_split(_CONTRACTIONS + _WORDS % r"\p{N}{1,3}"), _AFTER)
_ONE = _sequence(_split(_CONTRACTIONS + _WORDS % r"\p{N}"), _AFTER)
_DEFAULT = _sequence(
    _split(r"[\p{P}\$\+<=>\^~\|]+"),
    _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
    _split(r"\p{N}+"),
    _split("[0-9][0-9][0-9]"),
    _AFTER,
)
_SUFFIX = _CONTRACTIONS + "?"

RULES: dict[str, Rule] = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "trillion", "phi-2", "roberta-bpe", "dbrx-gpt2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"), Rule(_THREE, whole_words=True, begins=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Rule(_THREE)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), Rule(_ONE)),
    "tekken": Rule(_sequence(_split(_CASED % ("", "", r"\p{N}")), _AFTER), whole_words=True, begins=True),
    "gpt-4o": Rule(_sequence(_split(_CASED % (_SUFFIX, _SUFFIX, r"\p{N}{1,3}")), _AFTER)),
    "default": Rule(_DEFAULT),
}
"""The rules by the names that GGUF files give them; where two names mean one rule, an export writes the first."""


def files_of(file: GGUFFile) -> tuple[dict[str, bytes], dict[str, Any]]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json by name, and what config.json says of tokens.

    Raises `CairnError` for a vocabulary that is damaged, of a kind or of a rule that is not known. A file without a vocabulary has none.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return {}, {}
    vocabulary = _Vocabulary(file)
    if kind == "gpt2":
        definition, begins = vocabulary.bytes_pairs()
    elif kind == "llama":
        definition, begins = vocabulary.sentence_pieces(), True
    else:
        raise InputError(f"{file.path} has a tokenizer of the kind '{kind[:40]}', which is not read; give the model's own files with --tokenizer.")
    begins = _flag(file, "tokenizer.ggml.add_bos_token", begins)
    tokens, ids = vocabulary.tokens, vocabulary.special_ids()
    definition["post_processor"] = _post(tokens, ids, begins, _flag(file, "tokenizer.ggml.add_eos_token", False), kind)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": tokens[number] for name, number in ids.items() if name in ("bos", "eos", "unk", "pad")}
    ends = vocabulary.ends(ids)
    named = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    files = {"tokenizer.json": as_json(definition, None), "tokenizer_config.json": as_json(config)}
    if named or ends:
        files["generation_config.json"] = as_json({**named, "eos_token_id": ends if len(ends) != 1 else ends[0]} if ends else named)
    if template := file.text("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files, named


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    value = file.metadata.get(key)
    return default if value is None else bool(value)


class _Vocabulary:
    """Tokens, their kinds and what holds them together."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.tokens: list[str] = self._list("tokenizer.ggml.tokens", str) or []
        if not self.tokens:
            raise DamagedError(f"{file.path} names a tokenizer and holds no tokens.")
        self.kinds: list[int] = self._list("tokenizer.ggml.token_type", int) or [NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise DamagedError(f"{file.path}: there are {len(self.tokens)} tokens and the kinds of {len(self.kinds)}.")
        self.tokens = _distinct(self.tokens)

    def _list(self, key: str, kind: type) -> list[Any] | None:
        value = self.file.metadata.get(key)
        if value is not None and (not isinstance(value, list) or not all(type(item) is kind for item in value)):
            raise DamagedError(f"{self.file.path}: the metadata '{key}' is no list of {kind.__name__}.")
        return value

    def special_ids(self) -> dict[str, int]:
        """The ids that the file names, by what they are for."""
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
        found = {}
        for name, there in names.items():
            number = self.file.number(f"tokenizer.ggml.{there}_token_id")
            if number is not None and number < 2**31 and not 0 <= number < len(self.tokens):
                raise DamagedError(f"{self.file.path}: the {there} token is {number}, and there are {len(self.tokens)} tokens.")
            if number is not None and 0 <= number < len(self.tokens):
                found[name] = int(number)
        return found

    def ends(self, ids: Mapping[str, int]) -> list[int]:
        """Every id that ends a text, the one that the file calls so first."""
        named = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
        special = [number for number, token in enumerate(self.tokens) if token in ENDS and self.kinds[number] in (CONTROL, USER_DEFINED)]
        return list(dict.fromkeys([*named, *special]))

    def bytes_pairs(self) -> tuple[dict[str, Any], bool]:
        """tokenizer.json of a BPE over bytes, and whether its texts begin with a token."""
        name = self.file.text("tokenizer.ggml.pre") or "default"
        rule = RULES.get(name)
        if rule is None:
            raise InputError(
                f"{self.file.path} splits text by the rule '{name[:40]}', which is not known here; give the model's own files with --tokenizer."
                f"{suggestion(name, RULES)}"
            )
        merges = [merge.split(" ") for merge in self._list("tokenizer.ggml.merges", str) or []]
        ids = {token: number for number, token in enumerate(self.tokens)}
        broken = next((pair for pair in merges if len(pair) != 2 or any(part not in ids for part in pair) or "".join(pair) not in ids), None)
        if broken is not None:
            raise DamagedError(f"{self.file.path}: the merge {' '.join(broken)[:40]!r} is of tokens that are not there.")
        model = {"type": "BPE", **_PLAIN_BPE, "ignore_merges": rule.whole_words, "vocab": ids, "merges": merges}
        decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        return _definition(model, self._added(), normalizer=None, splits=rule.splits, decoder=decoder), rule.begins

    def sentence_pieces(self) -> dict[str, Any]:
        """tokenizer.json of SentencePiece's BPE, whose merges are found again from the scores."""
        scores = self._list("tokenizer.ggml.scores", float)
        if scores is None or len(scores) != len(self.tokens):
            raise DamagedError(f"{self.file.path}: there are {len(self.tokens)} tokens and {len(scores or [])} scores.")
        unknown = self.special_ids().get("unk", next((number for number, kind in enumerate(self.kinds) if kind == UNKNOWN), 0))
        ids = {token: number for number, token in enumerate(self.tokens)}
        plain = {token: number for token, number in ids.items() if self.kinds[number] in (NORMAL, USER_DEFINED, UNUSED)}
        model = {"type": "BPE", **_PLAIN_BPE, "unk_token": self.tokens[unknown], "fuse_unk": True, "byte_fallback": BYTE in self.kinds}
        model |= {"vocab": ids, "merges": _merges(plain, scores)}
        front = _flag(self.file, "tokenizer.ggml.add_space_prefix", True)
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]} if front else replace
        decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
        decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if front else []
        return _definition(model, self._added(), normalizer=normalizer, splits=None, decoder={"type": "Sequence", "decoders": decoders})

    def _added(self) -> list[dict[str, Any]]:
        kept = (UNKNOWN, CONTROL, USER_DEFINED)
        rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": token, **rest, "special": self.kinds[number] != USER_DEFINED}
            for number, token in enumerate(self.tokens)
            if self.kinds[number] in kept and token
        ]


_PLAIN_BPE: dict[str, Any] = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")) | {
    "fuse_unk": False,
    "byte_fallback": False,
}


def _definition(model: dict[str, Any], added: list[dict[str, Any]], *, normalizer: Any, splits: Any, decoder: Any) -> dict[str, Any]:
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": splits}
    return {**head, "post_processor": None, "decoder": decoder, "model": model}


def _post(tokens: Sequence[str], ids: Mapping[str, int], begins: bool, ends: bool, kind: str) -> dict[str, Any] | None:
    """What stands around a text."""
    front = [ids["bos"]] if begins and "bos" in ids else []
    behind = [ids["eos"]] if ends and "eos" in ids else []
    if not front and not behind:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True} if kind == "gpt2" else None

    def around(letter: str, number: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": tokens[special], "type_id": number}} for special in front),
            {"Sequence": {"id": letter, "type_id": number}},
            *({"SpecialToken": {"id": tokens[special], "type_id": number}} for special in behind),
        ]

    special = {tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]} for number in (*front, *behind)}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": [*around("A", 0), *around("B", 1)], "special_tokens": special}


def _distinct(tokens: list[str]) -> list[str]:
    """Tokens without doubles: one that stands there twice keeps its place under a name of its own."""
    seen: set[str] = set()
    result = []
    for number, token in enumerate(tokens):
        result.append(token if token not in seen else f"[unused {number}] {token}")
        seen.add(result[-1])
    return result


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """The pairs that make up each piece, best score first; pairs of one piece in the order of their parts."""
    pairs: list[tuple[Any, ...]] = []
    for piece, number in ids.items():
        parts = [(ids[piece[:at]], ids[piece[at:]], piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in ids and piece[at:] in ids]
        pairs.extend((-scores[number], number, *part) for part in parts)
    pairs.sort(key=lambda pair: pair[:4])
    return [[left, right] for *_, left, right in pairs]


# -- the other direction -----------------------------------------------------------------------------------------------


def metadata_of(definition: bytes, config: Mapping[str, Any], ends: Iterable[int], template: str | None, rows: int, where: object) -> dict[str, Any]:
    """The metadata of a tokenizer.json, padded to the `rows` of the embedding. Raises `InputError` for a tokenizer that a GGUF file cannot say."""
    document = json.loads(definition)
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(f"{where}: a tokenizer of the kind {model.get('type')} cannot be written as GGUF here; BPE can.")
    added = {int(token["id"]): token for token in document.get("added_tokens") or []}
    ids: dict[int, str] = {int(number): token for token, number in model["vocab"].items()} | {number: token["content"] for number, token in added.items()}
    if ids and max(ids) >= rows:
        raise InputError(f"{where}: the tokenizer has the id {max(ids)}, and the embedding has {rows} rows.")
    tokens = [ids.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = [_kind(number, tokens[number], ids, added, model) for number in range(rows)]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges") or []]
    values: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if _has(document.get("decoder"), "ByteLevel"):
        values |= {"model": "gpt2", "pre": _named(document, model, where), "merges": merges}
    elif _has(document.get("decoder"), "Replace"):
        values |= {"model": "llama", "pre": "default", "scores": _scores(tokens, merges), "add_space_prefix": _has(document.get("normalizer"), "Prepend")}
    else:
        raise InputError(f"{where}: the tokenizer spells words neither in bytes nor as SentencePiece does, and a GGUF file knows no other way.")
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    numbers = {token: number for number, token in ids.items()}
    for name, key in named.items():
        token = config.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in numbers:
            values[f"{name}_token_id"] = numbers[token]
    others = [number for number in ends if number != values.get("eos_token_id")]
    if "eos_token_id" not in values and others:
        values["eos_token_id"] = others.pop(0)
    values |= {f"{name}_token_id": number for name, number in zip(("eot", "eom"), others, strict=False)}
    if unsaid := [tokens[number] for number in others[2:] if tokens[number] not in ENDS]:
        warnings.warn(f"{where}: a GGUF file names three ends of a text; '{unsaid[0]}' is none there.", Notice, stacklevel=2)
    values["add_bos_token"], values["add_eos_token"] = _around(document, "first"), _around(document, "last")
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return found | ({"tokenizer.chat_template": template} if template else {})


def _kind(number: int, token: str, ids: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]) -> int:
    if number not in ids:
        return UNUSED
    if token == model.get("unk_token") and model.get("byte_fallback"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    return BYTE if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _named(document: Mapping[str, Any], model: Mapping[str, Any], where: object) -> str:
    """The name of the rule by which a tokenizer splits text. Raises `InputError` where it has none."""
    if document.get("normalizer") and document["normalizer"].get("type") not in ("NFC",):
        raise InputError(f"{where}: the tokenizer changes text before it splits it ({document['normalizer'].get('type')}), which a GGUF file cannot say.")
    splits, whole = _plain(document.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    found = [name for name, rule in RULES.items() if _plain(rule.splits) == splits]
    if not found:
        raise InputError(f"{where}: the tokenizer splits text by a rule that has no name in GGUF files ({json.dumps(document.get('pre_tokenizer'))[:200]}).")
    return next((name for name in found if RULES[name].whole_words == whole), found[0])


def _plain(part: Any) -> Any:
    """A pre-tokenizer without what says nothing about the words."""
    if isinstance(part, Mapping):
        kept = {key: _plain(value) for key, value in part.items() if key not in ("trim_offsets", "invert")}
        inner = kept.get("pretokenizers")
        return inner[0] if isinstance(inner, list) and len(inner) == 1 else kept
    return [_plain(item) for item in part] if isinstance(part, list) else part


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """A score for each token from which `_merges` finds the order of the merges again."""
    best: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        best.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(best.get(token, 0)) for token in tokens]


def _has(part: Any, kind: str) -> bool:
    if isinstance(part, Mapping):
        return part.get("type") == kind or any(_has(value, kind) for value in part.values())
    return any(_has(item, kind) for item in part) if isinstance(part, list) else False


def _around(document: Mapping[str, Any], end: str) -> bool:
    """Whether a special token stands in front of a text or behind it."""
    parts = [document.get("post_processor") or {}]
    parts = list(itertools.chain.from_iterable(part.get("processors", [part]) for part in parts))
    single: list[Any] = next((part["single"] for part in parts if part.get("type") == "TemplateProcessing"), [])
    return bool(single) and "SpecialToken" in single[0 if end == "first" else -1]
