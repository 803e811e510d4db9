"""The BERT family: an encoder that says masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.errors import MismatchError
from cairn.models.config import LanguageModelConfig
from cairn.options import Count

if TYPE_CHECKING:
    from torch import nn

    from cairn.models.encoder import MaskedLanguageModel


@register("architecture", "bert", paper=Paper("BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", "arXiv:1810.04805"))
class BertFamily(LanguageModelConfig):
    """BERT for masked language modelling: an encoder; a text is one segment. There is no dropout, no pooler and no head for pairs of sentences."""

    model_type: ClassVar[str] = "bert"
    hf_class: ClassVar[str] = "BertForMaskedLM"
    causal: ClassVar[bool] = False
    positions_skip_padding: ClassVar[bool] = False
    """Whether positions count tokens that are no padding, from behind the padding's id (RoBERTa)."""
    unused: ClassVar[tuple[str, ...]] = ("bert.pooler.dense", "cls.seq_relationship")
    """Matrices that files of the family may hold and a masked language model does not use."""
    silent: ClassVar[Mapping[str, Any]] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    tie_word_embeddings: ClassVar[bool] = True

    vocab_size: Count = Field(30522, ge=1)
    hidden_size: Count = Field(256, ge=1)
    num_hidden_layers: int = Field(6, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    intermediate_size: Count = Field(1024, ge=1)
    max_position_embeddings: Count = Field(512, ge=1)
    type_vocab_size: int = Field(2, ge=1)
    layer_norm_eps: float = Field(1e-12, gt=0)
    initializer_range: float = Field(0.02, ge=0)
    pad_token_id: int | None = Field(0, ge=0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({self.num_attention_heads}).")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id ({self.pad_token_id}) lies outside a vocabulary of {self.vocab_size}.")
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def restated(self) -> frozenset[str]:
        trunk, head = self._network().trunk, self._network().head
        unused = {f"{name}.{part}" for name in self.unused for part in ("weight", "bias")}
        return frozenset({f"{head}.weight", f"{head}.bias", f"{trunk}.embeddings.position_ids", *unused})

    # -- closed forms -------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        width, inner = self.hidden_size, self.intermediate_size
        block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * width + 2 * width
        return self.num_hidden_layers * block + embeddings + width * width + 3 * width + self.vocab_size

    def matmul_flops(self, sequence_length: int, *, causal: bool = True) -> int:
        """Of all pairs, `causal` or not: an encoder sees them. The head is counted at every position, though training asks for some."""
        width, length = self.hidden_size, sequence_length
        weights = self.num_hidden_layers * (4 * width * width + 2 * width * self.intermediate_size) + width * width + self.vocab_size * width
        return 2 * length * weights + self.num_hidden_layers * 4 * width * length * length

    def training_memory(self, batch: int, sequence_length: int, *, precision: Literal["float32", "bfloat16"] = "bfloat16") -> dict[str, int]:
        count, tokens, size = self.parameter_count(), batch * sequence_length, 2 if precision == "bfloat16" else 4
        block = 8 * self.hidden_size + size * (6 * self.hidden_size + 2 * self.intermediate_size)
        return {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "activations": tokens * self.num_hidden_layers * block}

    # -- config.json --------------------------------------------------------------------------------------------

    def to_hf(self) -> dict[str, Any]:
        named = {"architectures": [self.hf_class], "model_type": self.model_type, "hidden_act": "gelu", "is_decoder": False, "tie_word_embeddings": True}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dtype": "float32", "torch_dtype": "float32"}
        return dict(sorted({**self.model_dump(mode="json"), **named, **dropout}.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family. Raises `MismatchError` for what this encoder does not do."""
        config = {**cls.silent, **config}
        neutral = {"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True, "quantization_config": None}
        for key, value in {**neutral, "position_embedding_type": "absolute"}.items():
            if config.get(key) not in (value, None):
                raise MismatchError(f"config.json: {key}={config[key]!r} is not supported for '{cls.model_type}' (only {value!r}).")
        values = {key: value for key, value in config.items() if key in cls.model_fields and value is not None}
        return cls.parse(values, f"config.json of a '{cls.model_type}' model")

    # -- the network --------------------------------------------------------------------------------------------

    @classmethod
    def _network(cls) -> type[MaskedLanguageModel]:
        from cairn.models.encoder import Bert

        return Bert

    def meta_model(self) -> MaskedLanguageModel:
        import torch

        with torch.device("meta"):
            return self._network()(self)

    def initialize(self, model: nn.Module, seed: int) -> None:
        from cairn.models.decoder import initialize

        initialize(model, seed, self.initializer_range)
