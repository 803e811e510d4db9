"""A model with the weights of a checkpoint: config.json is held against the tensors before anything is built, no weight is drawn at random.

Families of ours are built by name through the catalog. Everything else is transformers' own, which gets to see a view of the
directory that holds config.json and the files of tensors and nothing else: no code, no adapter, no pickle.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn import catalog
from cairn.checkpoint.format.documents import as_json, target_of
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.place import is_store
from cairn.errors import CairnError, DamagedError, InputError, MismatchError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.checkpoint.format.folder import TensorFolder

_LAYERS = re.compile(r"(?!max_)(num_|n_)?(\w+_)?layers?")
"""Keys of config.json that count layers, each of which has at least one tensor. `max_window_layers` of Qwen2 is a bound, not a count."""
_SIZES = re.compile(
    r"(vocab|hidden|intermediate|ffn|embedding|moe_intermediate)_(size|dim)|d_(model|ff|kv|inner)|n_(embd|inner)|dim|head_dim|(num_|n_)\w*heads?|num_\w*experts"
)
"""Keys that are a size of some tensor, which therefore has at least so many items."""
_POSITIONS = re.compile(r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|seq_length")
_MOST_POSITIONS = 2**25
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation", "attn_implementation", "_experts_implementation")
"""Keys with which config.json asks for code that is not transformers' own: left out."""


def hold_against(config: Mapping[str, Any], tensors: Iterable[TensorSpec], path: Path) -> None:
    """Raise `MismatchError` for a config.json that describes a network which these tensors cannot be, by what it counts alone; builds nothing."""
    specs = list(tensors)
    items = 8 * sum(spec.nbytes for spec in specs)  # of a bit each: what is packed counts, too
    for key, value in _numbers(config):
        if _LAYERS.fullmatch(key) and value > len(specs):
            raise MismatchError(f"{path}: config.json says {key}={value}, and the files hold {len(specs)} tensors in all.")
        if _SIZES.fullmatch(key) and value > items:
            raise MismatchError(f"{path}: config.json says {key}={value}, and no tensor in the files is so large.")
        if _POSITIONS.fullmatch(key) and value > _MOST_POSITIONS:
            raise MismatchError(f"{path}: config.json says {key}={value}; more than {_MOST_POSITIONS} positions are not read.")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if type(value) is int:
            yield key, value
        elif isinstance(value, list):
            yield from ((key, item) for item in value if type(item) is int)
        elif isinstance(value, dict):
            yield from _numbers(value)


def ours(path: Path, config: Mapping[str, Any], tensors: TensorFolder, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    """The model of a family of ours. Raises `MismatchError` unless its parameters are exactly the tensors."""
    import torch

    hold_against(config, (tensor.spec for tensor in tensors.values()), path)
    try:
        architecture = catalog.get("architecture", str(config["model_type"])).implementation.from_hf(config)
    except InputError as error:
        raise MismatchError(f"{path}: {error}") from None
    model: nn.Module = architecture.meta_model()
    parameters = dict(model.named_parameters())
    refuse_misfit(path, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, {name: t.shape for name, t in tensors.items()})
    stored = next(iter(tensors.values())).dtype
    if not stored.is_floating_point:
        raise MismatchError(f"{path} holds weights as {str(stored).removeprefix('torch.')}, which this family does not compute with.")
    model = model.to(dtype or stored).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name].load())
    return model.eval()


def refuse_misfit(path: Path, wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `MismatchError` that names the first tensor which config.json asks for and the files lack, or the other way round, or of another shape."""
    missing, strange = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MismatchError(f"{path} lacks the tensor '{missing[0]}'{more}, which config.json asks for; a weight that is missing is never made up.")
    if strange:
        raise MismatchError(f"{path} holds the tensor '{strange[0][:80]}', for which config.json has no place.")
    for name, shape in wanted.items():
        if shape != held[name]:
            raise MismatchError(f"{path}: '{name}' is {held[name]}, config.json asks for {shape}.")


def refuse_untied(path: Path, tensors: TensorFolder, pair: tuple[str, str]) -> None:
    """Raise `MismatchError` where a stored head that config.json ties to the embedding is another matrix."""
    import torch

    head, embedding = (tensors[name] for name in pair)
    rows = range(0, embedding.shape[0], 1024)
    same = head.shape == embedding.shape and all(torch.equal(head[begin : begin + 1024], embedding[begin : begin + 1024]) for begin in rows)
    if not same:
        raise MismatchError(f"{path}: config.json ties '{pair[0]}' to '{pair[1]}', and the files hold two different ones; set tie_word_embeddings to false.")


def by_transformers(path: Path, config: Mapping[str, Any], tensors: TensorFolder, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    """The model of any other family, as transformers builds it. Raises `InputError` or `MismatchError` with what it says, in one sentence."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise InputError(f"{path} is of a family that cairn does not build itself; pip install 'cairn-lm[hf]' opens it with transformers.") from None
    if is_store(path):
        raise InputError(f"{path} is of a family that only transformers builds, which reads plain directories: cairn export {path} -o DIR.")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: config.json has no 'model_type', so its family is not known.")
    hold_against(config, (tensor.spec for tensor in tensors.values()), path)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory(prefix="cairn-view-") as folder:
            _make_view(Path(folder), path, config, tensors)
            _refuse_other_shapes(path, folder, tensors)
            model, report = _untyped(AutoModelForCausalLM).from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
            model = model.to(device)  # before the view goes: weights may still be mapped from it
    except CairnError:
        raise
    except Exception as error:  # whatever a strange config.json or a library that is not there makes of it
        raise InputError(f"{path} cannot be opened by transformers: {_first_sentence(error)}") from error
    finally:
        logging.set_verbosity(before)
    _refuse_made_up(path, report)
    found: nn.Module = model.eval()
    return found


def _refuse_other_shapes(path: Path, view: str, tensors: TensorFolder) -> None:
    """Raise `MismatchError` for a tensor of another shape than the network has that transformers would build, which has no memory yet."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.from_pretrained(view, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = _untyped(AutoModelForCausalLM).from_config(known, trust_remote_code=False)
    if getattr(known, "quantization_config", None):
        return  # what is packed has other shapes
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].shape != tuple(parameter.shape):
            raise MismatchError(f"{path}: '{name}' is {tensors[name].shape}, config.json asks for {tuple(parameter.shape)}.")


def _untyped(value: Any) -> Any:
    """What the library's annotations do not describe."""
    return value


def _make_view(folder: Path, path: Path, config: Mapping[str, Any], tensors: TensorFolder) -> None:
    """What transformers may see."""
    (folder / "config.json").write_bytes(as_json(without_code(config)))
    for layout in tensors.layouts:
        (folder / layout.filename).symlink_to(target_of(path / layout.filename).resolve())
    index = f"{tensors.stem}.safetensors.index.json"
    if len(tensors.layouts) > 1 or tensors.layouts[0].filename != f"{tensors.stem}.safetensors":
        where = {spec.name: layout.filename for layout in tensors.layouts for spec in layout.specs}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the keys that ask for code which is not transformers' own."""
    return {key: without_code(value) if isinstance(value, dict) else value for key, value in config.items() if key not in _CODE}


def _refuse_made_up(path: Path, report: Mapping[str, Any]) -> None:
    """Transformers draws at random what the files lack, and only warns of it."""
    missing = sorted(map(str, report.get("missing_keys") or ()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MismatchError(f"{path} lacks the tensor '{missing[0]}'{more}, which config.json asks for; a weight that is missing is never made up.")
    other = [item[0] if isinstance(item, (tuple, list)) else item for item in report.get("mismatched_keys") or ()]
    if other:
        raise MismatchError(f"{path}: '{other[0]}' is of another shape than config.json asks for.")
    if report.get("error_msgs"):
        raise DamagedError(f"{path} cannot be loaded: {_first_sentence(report['error_msgs'][0])}")


def _first_sentence(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"(?<=[a-z)'\"`])[.!] ", text, maxsplit=1)[0]
    return f"{sentence[:300].rstrip('.')}."
