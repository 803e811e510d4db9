"""What people take away from a checkpoint besides its weights: tokenizer, chat template, special tokens, generation settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cairn.errors import DamagedError

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint

TOKENIZER = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
    }
)
"""Files of tokenizers, by the names that Hugging Face libraries give them."""

_OTHERS = re.compile(r"chat_template\.(jinja|json)|generation_config\.json|[a-z_]*processor_config\.json|[\w.-]+\.tiktoken")


def is_carried(name: str) -> bool:
    """Whether a file goes with the weights wherever they go.

    Examples
    --------
    >>> [is_carried(name) for name in ("chat_template.jinja", "tokenizer.model", "trainer.json", "config.json")]
    [True, True, False, False]
    """
    return name in TOKENIZER or _OTHERS.fullmatch(name) is not None


def carried(checkpoint: Checkpoint) -> list[str]:
    """The names of the files of a checkpoint that an operation hands on unchanged, sorted."""
    return carried_among(checkpoint.manifest.files if checkpoint.is_ours else (path.name for path in checkpoint.files()))


def luggage(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The contents of what is carried, by file name. An adapter carries what its base does, and its own files before those."""
    below = luggage(checkpoint.base) if checkpoint.is_adapter else {}
    return below | own_luggage(checkpoint)


def own_luggage(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The contents of what is carried by the files of this checkpoint alone."""
    return {name: data for name in carried(checkpoint) if (data := checkpoint.read_file(name)) is not None}


def carried_among(names: Iterable[str]) -> list[str]:
    """Those of some names that are carried, sorted."""
    return sorted(filter(is_carried, names))


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The text of a checkpoint's chat template, wherever it keeps it; of several the one called default. None where it has none.

    Raises `DamagedError` for a template that is not text.
    """
    data = checkpoint.read_file("chat_template.jinja")
    if data is not None:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise DamagedError(f"{checkpoint.path / 'chat_template.jinja'} is not UTF-8.") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = (checkpoint.document(name) or {}).get("chat_template")
        if isinstance(found, list):
            found = next((item.get("template") for item in found if isinstance(item, dict) and item.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None
