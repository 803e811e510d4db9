"""Any causal language model that transformers builds, trained through its own module: state-dict names and config.json stay its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cairn.catalog import register
from cairn.errors import InputError, MismatchError
from cairn.models.config import LanguageModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@register("architecture", "transformers")
class Transformers(LanguageModelConfig):
    """A causal language model of a family that only transformers builds: `cairn fork DIR RECIPE` with `model: transformers`."""

    model_type: ClassVar[str] = "transformers"
    hf_class: ClassVar[str] = "AutoModelForCausalLM"

    config: dict[str, Any] = {}
    """Its config.json, taken from the checkpoint that a fork begins from."""

    @property
    def max_position_embeddings(self) -> int | None:
        """Positions that it has been made for, if it says so."""
        found = next((self.config[key] for key in ("max_position_embeddings", "n_positions") if isinstance(self.config.get(key), int)), None)
        return found

    @property
    def restated(self) -> frozenset[str]:
        return frozenset({"lm_head.weight"} if self.config.get("tie_word_embeddings", False) else set())

    def special_ids(self, end: int | None) -> dict[str, int | None]:
        return {}

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.meta_model().parameters())

    def matmul_flops(self, sequence_length: int, *, causal: bool = True) -> int:
        """Those of the weights of all matrices but the input embedding; what attention computes between positions is not counted."""
        model = self.meta_model()
        weights = sum(p.numel() for p in model.parameters() if p.ndim > 1) - model.get_input_embeddings().weight.numel()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return 2 * sequence_length * (weights + (model.get_input_embeddings().weight.numel() if tied else 0))

    def training_memory(self, batch: int, sequence_length: int, *, precision: Any = "bfloat16") -> dict[str, int]:
        """Bytes of weights, gradients and optimizer; activations of a family that is not known are not estimated."""
        count = self.parameter_count()
        return {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "activations": 0}

    def meta_model(self) -> Any:
        import torch

        with torch.device("meta"):
            return self._built()

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Make the buffers that no file holds (tables of rope, say). Weights come from the checkpoint that the run begins from."""
        with _undrawn():
            fresh = self._built()
        known = dict(fresh.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(known[name])

    def to_hf(self) -> dict[str, Any]:
        return dict(self.config)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        trained = next((str(name) for name in config.get("architectures") or () if "MaskedLM" in str(name)), None)
        if trained is not None:
            raise MismatchError(f"config.json says {trained}, which reads a text in both directions: it is no causal language model and is not trained as one.")
        text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
        size = (text or {}).get("vocab_size")
        return cls.parse({"config": dict(config), **({"vocab_size": size} if size is not None else {})}, "config.json")

    def _built(self) -> Any:
        from cairn.models.foreign import trainable

        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError:
            raise InputError("model=transformers needs transformers: pip install 'cairn-lm[hf]'.") from None
        values = {key: value for key, value in self.config.items() if key != "auto_map"}
        if not isinstance(values.get("model_type"), str):
            raise InputError("model=transformers goes on from a checkpoint, whose config.json says what it is: cairn fork DIR RECIPE --run DIR.")
        try:
            described = AutoConfig.for_model(values.pop("model_type"), **values)
            return trainable(AutoModelForCausalLM.from_config(described, trust_remote_code=False))
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise InputError(f"transformers cannot build the model of config.json: {' '.join(str(error).split())[:200]}.") from None


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """Models are built without drawing weights, so that memory for them is never touched."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import no_init_weights  # type: ignore[no-redef, attr-defined]
    with no_init_weights():
        yield
