"""Whether checkpoints belong together, decided by what they mean: networks that compute alike, vocabularies that name the same tokens.

Bytes say nothing here. A config.json that another version of a program wrote, another dropout, another end of generation or a key of a
vendor's own changes nothing that a forward pass computes; a tokenizer.json may be written in several ways.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from cairn import catalog
from cairn.checkpoint.format import documents
from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import CairnError, DamagedError, MismatchError

_SILENT = re.compile(
    r"""_.*|architectures|auto_map|transformers_version|torch_dtype|dtype|use_cache|torchscript|task_specific_params|problem_type
    |.*dropout.*|.*_pdrop|.*drop_rate|layerdrop|.*initializer.*|init_std|init_method.*|pretraining_tp|gradient_checkpointing
    |(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos|suppress)_token_ids?|suppress_tokens|begin_suppress_tokens
    |output_attentions|output_hidden_states|return_dict|use_return_dict|chunk_size_feed_forward|id2label|label2id|finetuning_task
    |(max|min)_length|max_new_tokens|do_sample|early_stopping|num_beams.*|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty
    |no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|output_scores|return_dict_in_generate|diversity_penalty
    |remove_invalid_values|exponential_decay_length_penalty|tokenizer_class|prefix|name_or_path|pruned_heads|attn_implementation""",
    re.VERBOSE,
)
"""Keys of config.json that change nothing of what a model in evaluation mode computes: about training, about generating, about programs."""


def network(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the network, as the family's own class parses it; equal for networks that compute alike.

    Defaults are filled in, spellings of several versions become one, and what changes nothing is left out. Of a family that is not ours
    transformers' configuration class decides what it knows; where transformers is not installed, the keys are taken as they stand.
    """
    family = str(config.get("model_type"))
    said = {key: value for key, value in config.items() if not _SILENT.fullmatch(key)}
    parsed = _ours(family, said) if catalog.has("architecture", str(family)) else _theirs(family, said)
    return {"model_type": family, **{key: value for key, value in (parsed or said).items() if not _SILENT.fullmatch(key)}}


def _ours(family: str, said: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        architecture = catalog.get("architecture", family).implementation.from_hf(said)
    except CairnError:
        return None  # a variant that we do not build: its keys are compared as they stand
    values = architecture.model_dump(mode="json")
    for key, derived in (("num_key_value_heads", "key_value_heads"), ("head_dim", "head_size")):
        if key in values:
            values[key] = getattr(architecture, derived)
    if not values.get("rope_scaling", True):
        values.pop("max_position_embeddings", None)  # plain rotary positions have no end
    return values


def _theirs(family: str, said: Mapping[str, Any]) -> dict[str, Any] | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoConfig

    try:
        known = set(AutoConfig.for_model(family).to_dict())
        parsed = AutoConfig.for_model(family, **{key: value for key, value in said.items() if key != "model_type"}).to_dict()
    except Exception:  # whatever a library makes of a file that it does not understand: the keys are then compared as they stand
        return None
    return {key: value for key, value in parsed.items() if key in known}


def vocabulary(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a checkpoint's tokenizer.json says of tokens: `tokens` (id to token), `merges`, and the kind of model; None if there is none.

    Raises `DamagedError` for a file that is no tokenizer.
    """
    path, data = checkpoint.path / "tokenizer.json", checkpoint.read_file("tokenizer.json")
    if data is None:
        return None
    document = documents.as_object(documents.parse(data, path), path)
    try:
        model, added = document["model"], document.get("added_tokens") or []
        vocab = model["vocab"]
        tokens = {int(number): str(token) for token, number in vocab.items()} if isinstance(vocab, dict) else {i: str(row[0]) for i, row in enumerate(vocab)}
        tokens |= {int(token["id"]): str(token["content"]) for token in added}
        merges = [" ".join(pair) if isinstance(pair, list) else str(pair) for pair in model.get("merges") or []]
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise DamagedError(f"{path} is not a valid tokenizer.") from None
    return {"kind": str(model.get("type") or "BPE"), "tokens": tokens, "merges": merges}


def vocabulary_digest(checkpoint: Checkpoint) -> str | None:
    """Digest of the vocabulary and merges of a checkpoint; None if it carries no tokenizer.json."""
    found = vocabulary(checkpoint)
    if found is None:
        return None
    return blake3(json.dumps([found["kind"], sorted(found["tokens"].items()), found["merges"]]).encode()).hexdigest()


def refuse_strangers(first: Checkpoint, other: Checkpoint) -> None:
    """Raise `MismatchError` with the reason if two checkpoints are not of one network, with the same tensors and the same tokens."""
    pair, names, others = f"{first.path} and {other.path}", set(first.tensors), set(other.tensors)
    if first.config.get("model_type") != other.config.get("model_type"):
        raise MismatchError(f"{pair} are of different families: {first.config.get('model_type')} and {other.config.get('model_type')}.")
    missing = sorted(names ^ others)
    if missing:
        holder = first if missing[0] in names else other
        raise MismatchError(f"{pair} do not have the same tensors: only {holder.path} has '{missing[0]}'.")
    if (sizes := [checkpoint.config.get("vocab_size") for checkpoint in (first, other)])[0] != sizes[1] and first.tokenizer and other.tokenizer:
        raise MismatchError(f"{pair} have vocabularies of {sizes[0]} and {sizes[1]} tokens. {ADVICE}")
    for name, tensor in first.tensors.items():
        if tensor.shape != other.tensors[name].shape:
            raise MismatchError(f"{pair} have different shapes: '{name}' is {tensor.shape} in one and {other.tensors[name].shape} in the other.")
    if first.config != other.config and (differing := keys_that_differ(network(first.config), network(other.config))):
        key, (old, new) = next(iter(differing.items()))
        raise MismatchError(f"{pair} are configured differently: {key} is {old} in one and {new} in the other.")
    _refuse_other_tokens(pair, vocabulary(first), vocabulary(other))


def _refuse_other_tokens(pair: str, first: dict[str, Any] | None, other: dict[str, Any] | None) -> None:
    """Rows of embeddings must mean the same tokens; a row that one tokenizer leaves without a name contradicts nothing."""
    if first is None or other is None or first == other:
        return
    a, b = first["tokens"], other["tokens"]
    clash = next((number for number in sorted(set(a) & set(b)) if a[number] != b[number]), None)
    if clash is not None:
        said = f"id {clash} is {a[clash]!r} in one and {b[clash]!r} in the other"
    elif first["merges"] != other["merges"] or first["kind"] != other["kind"]:
        said = "they join characters by different rules"
    else:
        return
    raise MismatchError(f"{pair} have different tokenizers ({said}), so the rows of their embeddings do not mean the same tokens. {ADVICE}")


ADVICE = "`cairn tokenizer union` gives them one vocabulary, with which they can be merged."

GENERATION = ("eos_token_id", "bos_token_id", "pad_token_id")


def settings_of_the_first(parents: list[Checkpoint]) -> list[str]:
    """One line for each setting of generation, or carried file, in which the others differ from the first, whose are kept."""
    first, lines = parents[0], []
    for key in GENERATION:
        said = [_setting(parent, key) for parent in parents]
        if any(value != said[0] for value in said[1:]):
            other = next(value for value in said[1:] if value != said[0])
            lines.append(f"{key}: that of {first.path.name}, {said[0]} (another parent says {other})")
    settings = [{k: v for k, v in (parent.generation or {}).items() if k not in GENERATION and k != "transformers_version"} for parent in parents]
    if any(other != settings[0] for other in settings[1:]):
        lines.append(f"generation settings: those of {first.path.name}")
    templates = [_template(parent) for parent in parents]
    if any(other != templates[0] for other in templates[1:]):
        lines.append(f"chat template: {'that' if templates[0] else 'none, as'} of {first.path.name}")
    return lines


def _setting(checkpoint: Checkpoint, key: str) -> Any:
    """What a checkpoint says of generation: generation_config.json before config.json."""
    generation = checkpoint.generation or {}
    return generation[key] if key in generation else checkpoint.config.get(key)


def _template(checkpoint: Checkpoint) -> str | None:
    template = checkpoint.read_file("chat_template.jinja")
    if template is not None:
        return template.decode("utf-8", errors="replace").strip()
    found = (checkpoint.document("tokenizer_config.json") or {}).get("chat_template")
    return json.dumps(found) if isinstance(found, list) else found.strip() if isinstance(found, str) else None
