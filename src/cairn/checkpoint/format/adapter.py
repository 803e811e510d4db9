"""Adapter checkpoints on disk: `adapter_model.safetensors` and `adapter_config.json`, as PEFT names them, instead of a model's weights.

`adapter_base.json` holds the model digest of the base, so that an adapter is never put on another model unnoticed. Where the base lies is
a hint in the lineage, not part of what the adapter is; it is found there, or beside the adapter, or is named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.checkpoint.format.place import follow, is_store, place, way
from cairn.errors import CairnError, DamagedError, InputError, MismatchError, NotFoundError

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG, STEM, BASE = "adapter_config.json", "adapter_model", "adapter_base.json"
_TOLD = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "d_model", "num_layers", "n_embd", "n_layer")
"""Keys of config.json by which a directory is passed over before anything of it is digested."""


Checkpoint = Any
"""A `cairn.checkpoint.format.read.Checkpoint`, whose module imports this one."""


def base_document(base: Checkpoint) -> dict[str, str]:
    """The content of `adapter_base.json`."""
    return {"model_digest": base.model_digest}


def base_hint(base: Checkpoint, directory: Path | None) -> dict[str, Any]:
    """What the lineage of an adapter says of its base: digests, and the way there from the directory that holds the adapter."""
    path = way(base.path, directory) if directory is not None else str(base.path.resolve())
    return {"digest": base.digest, "model_digest": base.model_digest, "path": path, "step": base.step}


def base_digest(checkpoint: Checkpoint) -> str | None:
    """The model digest of the base of an adapter; None where it does not say (an adapter that another program wrote)."""
    document = checkpoint.document(BASE)
    if document is None:
        return None
    digest = document.get("model_digest")
    if not isinstance(digest, str):
        raise DamagedError(f"{checkpoint.path / BASE} does not hold the digest of a base.")
    return digest


def adapter_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """adapter_config.json. Raises `DamagedError` where there is none."""
    config = checkpoint.document(CONFIG)
    if config is None:
        raise DamagedError(f"{checkpoint.path} has no {CONFIG}, so what its {STEM}.safetensors adds to a model is not known.")
    return config


def find_base(checkpoint: Checkpoint, named: Any, opened: Callable[[str | Path], Any]) -> Any:
    """The base of an adapter: `named` (a path or a checkpoint), else where its lineage says, else a neighbour; the digest decides.

    Raises `MismatchError` if `named` is another model, `NotFoundError` if the base is not found, `InputError` if the adapter does not say
    which base it belongs to and none is named.
    """
    wanted = base_digest(checkpoint)
    if named is not None:
        base = opened(named) if isinstance(named, (str, Path)) else named
        if base.is_adapter:
            raise InputError(f"{base.path} is itself an adapter; fold it first (cairn adapt fold {base.path} -o OUT) and name the result.")
        if wanted is not None and base.model_digest != wanted:
            raise MismatchError(f"{checkpoint.path} was trained on the model {wanted[:12]}, and {base.path} is the model {base.model_digest[:12]}.")
        return base
    if wanted is None:
        raise InputError(f"{checkpoint.path} does not say on which model it was trained; name that model with --base DIR (base=).")
    hint = (checkpoint.lineage.options.get("base") or {}).get("path") if checkpoint.lineage is not None else None
    for path in _places(checkpoint.path, hint):
        try:
            candidate = opened(path)
            if candidate.is_adapter or any(candidate.config.get(key) != checkpoint.config.get(key) for key in _TOLD):
                continue
            if candidate.model_digest == wanted:
                return candidate
        except (CairnError, OSError):
            continue  # not a checkpoint, or not readable: not the base that we look for
    where = f" ({hint})" if hint else ""
    raise NotFoundError(
        f"The base of {checkpoint.path}, the model {wanted[:12]}, is not where it was{where} and not beside it; name it with --base DIR (base=)."
    )


def _places(path: Path, hint: str | None) -> Iterator[Path]:
    """Where a base may lie: where the lineage says, beside the adapter, beside its run."""
    home = path if is_store(path) else path.resolve()
    if hint:
        found = follow(home.parent, hint)
        yield found if is_store(found) else found.resolve()
    for folder in (home.parent, home.parent.parent.parent):
        if not is_store(folder) and folder.is_dir():
            yield from (place(entry) for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".") and entry != home)


def adapted_model(checkpoint: Checkpoint, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    """The base with the adapter on it, in evaluation mode."""
    config, tensors = adapter_config(checkpoint), checkpoint.folder(STEM).load()
    model: nn.Module = checkpoint.base.model(dtype, device)
    # By name: the room of models stands a floor above this one.
    importlib.import_module("cairn.models.adapters.container").attach_stored(model, config, tensors)
    return model.eval()
