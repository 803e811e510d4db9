"""Tensors that files hold and that say nothing: a head that the model ties to its embedding, tables that are computed.

Whether a head is tied is what config.json says, not what the file holds: a model that ties them reads the embedding alone. An operation
that saw both would count the head twice, and what it made of the two would be two different tensors.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, Protocol

from cairn import catalog
from cairn.errors import CairnError


class Opened(Protocol):
    """What must be known of a checkpoint: its tensors by name, and config.json."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    @property
    def config(self) -> dict[str, Any]: ...


HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
"""Last parts of the names of heads and of embeddings, in transformers' families and in Meta's."""

_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_pos_emb\.inv_freq)")
_NORMAL_BIAS = re.compile(r"(.*\.)?(attn|attention)\.bias")


def redundant(checkpoint: Opened) -> dict[str, str | None]:
    """The names of a checkpoint's redundant tensors, each with the tensor that it repeats; None where it is computed from config.json."""
    found: dict[str, str | None] = {name: None for name, tensor in checkpoint.tensors.items() if is_computed(name, tensor.shape)}
    found |= tied(checkpoint)
    family = str(checkpoint.config.get("model_type"))
    if catalog.has("architecture", str(family)):
        found |= {name: None for name in _restated(family, checkpoint.config) if name in checkpoint.tensors and name not in found}
    return found


def tied(checkpoint: Opened) -> dict[str, str | None]:
    """A stored head that config.json ties, and the embedding that it repeats."""
    names = head_and_embedding(checkpoint)
    if names is None or names[0] not in checkpoint.tensors or not is_tied(checkpoint.config):
        return {}
    head, embedding = names
    return {head: embedding} if checkpoint.tensors[head].shape == checkpoint.tensors[embedding].shape else {}


def head_and_embedding(checkpoint: Opened) -> tuple[str, str] | None:
    """The names of a model's head and of its embedding; the head need not be stored. None where they are not understood."""
    embedding = next((name for ending in EMBEDDINGS for name in checkpoint.tensors if name.endswith(ending)), None)
    heads = [name for name in checkpoint.tensors if name in HEADS or ".".join(name.split(".")[-2:]) in HEADS[:2]]
    if embedding is None or len(heads) > 1:
        return None
    return heads[0] if heads else HEADS[0], embedding


def aliases(checkpoint: Opened) -> dict[str, str]:
    """Further names that a model's state dictionary has for its embedding, and the stored name: a tied head, a second stack's embedding."""
    names = head_and_embedding(checkpoint)
    if names is None:
        return {}
    head, embedding = names
    found = {head: embedding} if is_tied(checkpoint.config) and head not in checkpoint.tensors else {}
    family = str(checkpoint.config.get("model_type"))
    if catalog.has("architecture", str(family)):
        others = (name for name in _restated(family, checkpoint.config) if name.endswith("embed_tokens.weight") and name not in checkpoint.tensors)
        found |= {name: embedding for name in sorted(others)}
    return found


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a model's head is its embedding: what config.json says, else what its family does."""
    said = config.get("tie_word_embeddings")
    if said is not None:
        return bool(said)
    family = str(config.get("model_type"))
    if catalog.has("architecture", str(family)):
        return bool(catalog.get("architecture", family).implementation.model_fields["tie_word_embeddings"].default)
    if importlib.util.find_spec("transformers") is None:
        return False
    from transformers import AutoConfig

    try:
        return bool(getattr(AutoConfig.for_model(family), "tie_word_embeddings", False))
    except (KeyError, ValueError):
        return False  # a family that transformers does not know


def _restated(family: str, config: dict[str, Any]) -> frozenset[str]:
    try:
        names: frozenset[str] = catalog.get("architecture", family).implementation.from_hf(config).restated
    except CairnError:
        return frozenset()  # a variant that we do not build
    return names


def is_computed(name: str, shape: tuple[int, ...]) -> bool:
    """Rotary frequencies, and causal masks, which unlike biases have more than one dimension or none."""
    if not _COMPUTED.fullmatch(name):
        return False
    return len(shape) != 1 if _NORMAL_BIAS.fullmatch(name) else True
