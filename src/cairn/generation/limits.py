"""What a model bears and where its texts end: its vocabulary, its positions, its end tokens, and whether it is causal at all.

Asked before anything is computed, of our models and of any of transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cairn import catalog
from cairn import device as devices
from cairn.errors import InputError

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint

PROBE = (1, 2, 3, 4, 1, 2)
"""A text of the smallest ids, on which a family is tried."""


def model_of(checkpoint: Checkpoint, device: Any = None, dtype: str | None = None) -> nn.Module:
    """The model of a checkpoint on the device that is asked for, or on the accelerator; dtype: `float32`, `bfloat16`, None as it is stored.

    Raises `InputError` for a device that is not there and for another dtype.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype is '{dtype}'; a model computes in float32 or bfloat16, or as it is stored where nothing is said.")
    return checkpoint.model(dtype=getattr(torch, dtype) if dtype is not None else None, device=devices.choose(device))


def tokenizer_of(opened: Checkpoint) -> Any:
    """The tokenizer of a checkpoint. Raises `InputError` where there is none, with what the checkpoint reads instead."""
    if opened.tokenizer is None:
        family = str(opened.config.get("model_type"))
        if catalog.has("architecture", family) and (reads := catalog.get("architecture", family).implementation.reads) != "tokens":
            raise InputError(f"{opened.path} is a '{family}', which reads {reads} and writes no text; `cairn explain {opened.path}` shows what it says.")
        raise InputError(f"{opened.path} has no tokenizer.json, so text cannot become tokens; copy its tokenizer files there.")
    return opened.tokenizer


def config_of(model: Any) -> Any:
    """Sizes of a model, ours or transformers'."""
    return model.architecture if hasattr(model, "architecture") else model.config.get_text_config()


def vocabulary(model: Any) -> int:
    """How many ids the model's embedding has."""
    ask = None if hasattr(model, "architecture") else getattr(model, "get_input_embeddings", None)
    return int((ask is not None and getattr(ask(), "num_embeddings", None)) or config_of(model).vocab_size)


def positions(model: Any) -> int | None:
    """How many positions the model has; None where it does not say, or bears more than it says."""
    config = config_of(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return None if "dynamic" in str(rope) else getattr(config, "max_position_embeddings", None)


def check_ids(model: Any, sequences: Iterable[Sequence[int]]) -> None:
    """Raises `InputError` for an id that the model's embedding does not have."""
    size = vocabulary(model)
    for sequence in sequences:
        if not len(sequence):
            continue
        ids = np.asarray(sequence, np.int64)
        for wrong in (int(ids.max()), int(ids.min())):
            if not 0 <= wrong < size:
                raise InputError(f"The text has token {wrong} and the model's vocabulary ends at {size - 1}; is the tokenizer another model's?")


def end_ids(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """Every id that ends a text: those of the tokenizer, of config.json and of generation_config.json."""
    named = [getattr(config_of(model), "eos_token_id", None), getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
    found = {number for value in named for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)}
    return frozenset(found) | (tokenizer.end_ids if tokenizer is not None else frozenset())


def stops_of(tokenizer: Any, stop: Iterable[str]) -> tuple[frozenset[int], list[str]]:
    """Stop strings as ids, for those that are tokens which are no text, and the others as they are."""
    special, texts = tokenizer.special_tokens, [text for text in stop if text]
    return frozenset(special[text] for text in texts if text in special), [text for text in texts if text not in special]


def require_causal(model: Any) -> None:
    """Raises `InputError` for a model that sees what comes after: its numbers for the next token mean nothing.

    The model is asked once, on a short text: what it says of a beginning must not depend on what follows. Ours say themselves how they
    read and are read so.
    """
    kind = type(model).__name__
    if not getattr(getattr(model, "architecture", None), "causal", True):
        raise InputError(f"{kind} reads a text in both directions (it is no causal language model), so it gives no probability of a next token.")
    if hasattr(model, "architecture") or model in _causal:
        return
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder-decoder, whose texts cairn cannot score or continue; families of its own (t5, umt5) it can.")
    trained = next(iter(getattr(model.config, "architectures", None) or ()), "")
    if any(task in trained for task in ("Classification", "QuestionAnswering", "MultipleChoice")):
        raise InputError(f"config.json says {trained}: the model was trained to judge texts, not to continue them, so it gives no probability of a next token.")
    if not _is_causal(model):
        raise InputError(f"{kind} reads a text in both directions (it is no causal language model), so it gives no probability of a next token.")
    _causal.add(model)


def _is_causal(model: nn.Module) -> bool:
    first = next(model.parameters())
    ids = torch.tensor([[number % vocabulary(model) for number in PROBE]], device=first.device)
    with torch.inference_mode():
        whole, part = (model(input_ids=each, use_cache=False).logits[0, :3].float() for each in (ids, ids[:, :3]))
    slack = 1e-4 if first.dtype in (torch.float32, torch.float64) else 3e-2
    return not bool((whole - part).abs().max() > slack * part.abs().max().clamp(min=1))  # what is not finite says nothing of this


_causal: weakref.WeakSet[Any] = weakref.WeakSet()
