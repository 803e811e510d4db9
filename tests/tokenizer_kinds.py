"""Small tokenizers of the kinds that open checkpoints carry, with a vocabulary learned from a few lines: what tests of text need."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "First Citizen: before we proceed any further, hear me speak.",
    "The quick brown fox jumps over the lazy dog, and 2026 stones mark the way!",
    "naive cafe, straight on",
] * 8


@functools.cache
def metaspace() -> bytes:
    """Llama 2's kind: BPE on words with their space in front, byte fallback, `<s>` in front of a text and `</s>` as its end."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    document = json.loads(trained.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if not token["content"].startswith("<0x")]  # bytes are words of the vocabulary
    document["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(document))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return made.to_str(pretty=True).encode()


@functools.cache
def unigram() -> bytes:
    """T5's kind: a unigram model whose metaspace comes with its pre-tokenizer, and `</s>` behind a text."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return made.to_str(pretty=True).encode()


@functools.cache
def wordpiece() -> bytes:
    """BERT's kind: pieces with `##`, words parted by white space that is not kept."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False))
    return made.to_str(pretty=True).encode()


@functools.cache
def byte_level() -> bytes:
    """GPT-2's kind: BPE on bytes, nothing in front, one token that is no text and one, added later, that is."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(LINES, trainer)
    made.add_tokens([AddedToken("é!", normalized=False)])
    return made.to_str(pretty=True).encode()


CONFIGS = {
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "unigram": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "wordpiece": {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"},
    "byte_level": {"eos_token": "<|endoftext|>"},
}
MAKERS = {"metaspace": metaspace, "unigram": unigram, "wordpiece": wordpiece, "byte_level": byte_level}


def config(kind: str) -> dict[str, str]:
    """The tokenizer_config.json of a kind."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIGS[kind]}


def write(kind: str, folder: Path, **more: object) -> Path:
    """The two files of a kind in a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(MAKERS[kind]())
    (folder / "tokenizer_config.json").write_text(json.dumps(config(kind) | more))
    return folder
