"""What GPT-2 and GPT-NeoX have in common as plain values: closed forms, the way to config.json and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.errors import MismatchError
from cairn.models.config import LanguageModelConfig
from cairn.options import Count

if TYPE_CHECKING:
    from torch import nn


class GPTFamily(LanguageModelConfig):
    """A family that `cairn.models.gpt` computes. There is no dropout: that of a config.json is passed over."""

    neutral: ClassVar[Mapping[str, Any]] = {}
    """Keys of a config.json that are honoured only at these values."""

    vocab_size: Count = Field(50304, ge=1)
    initializer_range: float = Field(0.02, ge=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    @abstractmethod
    def inner_size(self) -> int:
        """Inner size of the MLP."""

    @property
    @abstractmethod
    def norm_eps(self) -> float:
        """What layer norms add to the variance."""

    @abstractmethod
    def network(self) -> Any:
        """The network, on the device of the surroundings."""

    @abstractmethod
    def spread(self, name: str) -> float:
        """Standard deviation of the weights of a matrix at the beginning."""

    @property
    def position_parameters(self) -> int:
        """Parameters of learned positions."""
        return 0

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        a: Any = self
        if a.hidden_size % a.num_attention_heads:
            raise ValueError(f"the width of {a.hidden_size} is not a multiple of the {a.num_attention_heads} heads.")
        return self

    @property
    def head_size(self) -> int:
        a: Any = self
        return int(a.hidden_size // a.num_attention_heads)

    @property
    def key_value_heads(self) -> int:
        a: Any = self
        return int(a.num_attention_heads)

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer: none."""
        a: Any = self
        return [None] * a.num_hidden_layers

    # -- closed forms -------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        a: Any = self
        width, inner = a.hidden_size, self.inner_size
        block = 4 * width * width + 4 * width * a.attention_bias + 2 * width * inner + inner + width + 4 * width
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return int(a.num_hidden_layers * block + embeddings + self.position_parameters + 2 * width)

    def matmul_flops(self, sequence_length: int, *, causal: bool = True) -> int:
        """Floating-point operations of all matrix products of one forward pass over one sequence, head included; as `Architecture.matmul_flops`."""
        a: Any = self
        width, length = a.hidden_size, sequence_length
        weights = a.num_hidden_layers * (4 * width * width + 2 * width * self.inner_size) + self.vocab_size * width
        pairs = length * (length + 1) // 2 if causal else length * length
        return int(2 * length * weights + a.num_hidden_layers * 4 * width * pairs)

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that generation keeps for `tokens` tokens."""
        a: Any = self
        return int(2 * a.num_hidden_layers * a.hidden_size * tokens * bytes_per_value)

    def training_memory(self, batch: int, sequence_length: int, *, precision: Literal["float32", "bfloat16"] = "bfloat16") -> dict[str, int]:
        """Estimated bytes on one device, by use, as `Architecture.training_memory`."""
        a: Any = self
        count, tokens, size = self.parameter_count(), batch * sequence_length, 2 if precision == "bfloat16" else 4
        block = 8 * a.hidden_size + size * (6 * a.hidden_size + 2 * self.inner_size)
        activations = int(tokens * (a.num_hidden_layers * block + 8 * a.hidden_size))
        return {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "activations": activations}

    # -- config.json --------------------------------------------------------------------------------------------

    def written(self) -> dict[str, Any]:
        """What config.json says of every family here."""
        named = {"architectures": [self.hf_class], "model_type": self.model_type, "use_cache": True, "dtype": "float32", "torch_dtype": "float32"}
        return {**self.model_dump(mode="json"), **named}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family. Raises `MismatchError` for what this decoder does not do."""
        config = {**cls.silent, **config}
        for key, neutral in {**cls.neutral, "quantization_config": None}.items():
            cls.refuse_unless(config.get(key, neutral), neutral, key)
        values = {key: value for key, value in config.items() if key in cls.model_fields and value is not None}
        return cls.parse(values | cls._also(config), f"config.json of a '{cls.model_type}' model")

    @classmethod
    def refuse_unless(cls, value: Any, neutral: Any, key: str) -> None:
        """Refuse a key of config.json that asks for what this decoder does not do."""
        if value not in (neutral, None):
            raise MismatchError(f"config.json: {key}={value!r} is not supported for '{cls.model_type}' (only {neutral!r}).")

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values that a family reads from its config.json in its own way."""
        return {}

    # -- the network --------------------------------------------------------------------------------------------

    def meta_model(self) -> Any:
        """The network on the meta device: shapes and names, no memory."""
        import torch

        with torch.device("meta"):
            return self.network()

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Draw the weights, wherever and in whatever parts they lie."""
        from cairn.models.decoder import initialize

        initialize(model, seed, self.spread)
