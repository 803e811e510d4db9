"""The T5 family: encoder and decoder, unscaled attention with biases by distance shared by all layers of a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.models.config import LanguageModelConfig
from cairn.models.portrait import ENCODER_DECODER, Portrait
from cairn.options import Count

if TYPE_CHECKING:
    from torch import nn

    from cairn.models.encoder_decoder import EncoderDecoder


@register(
    "architecture",
    "t5",
    paper=(
        Paper("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", "arXiv:1910.10683"),
        Paper("What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization?", "arXiv:2204.05832", 14),
    ),
)
class T5(LanguageModelConfig):
    """T5 and T5 1.1: an encoder-decoder with biases by distance; no dropout."""

    model_type: ClassVar[str] = "t5"
    hf_class: ClassVar[str] = "T5ForConditionalGeneration"
    portrait: ClassVar[Portrait] = ENCODER_DECODER
    encoder_decoder: ClassVar[bool] = True
    per_layer_bias: ClassVar[bool] = False
    """Whether every layer has biases of its own (UMT5); else all of a stack use those of the first."""
    max_position_embeddings: ClassVar[None] = None
    rope_scaling: ClassVar[None] = None

    vocab_size: Count = Field(32128, ge=1)
    d_model: Count = Field(512, ge=1)
    d_kv: int = Field(64, ge=1)
    """Size of one head; the heads together may be wider or narrower than the model."""
    d_ff: Count = Field(2048, ge=1)
    num_layers: int = Field(6, ge=1)
    num_decoder_layers: int | None = Field(None, ge=1)
    """None: as many as `num_layers`."""
    num_heads: int = Field(8, ge=1)
    relative_attention_num_buckets: int = Field(32, ge=4)
    relative_attention_max_distance: int = Field(128, ge=4)
    layer_norm_epsilon: float = Field(1e-6, gt=0)
    initializer_factor: float = Field(1.0, ge=0)
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] = "relu"
    """`relu`: T5; `gated-gelu`: T5 1.1."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding (T5) or a matrix of its own (T5 1.1)."""
    scale_decoder_outputs: bool | None = None
    """Whether the head reads hidden states divided by sqrt(d_model); None: where it is tied."""
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        return self.feed_forward_proj.removeprefix("gated-")

    @property
    def scaled(self) -> bool:
        return self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs

    # By the names that decoders have for the same.

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def head_size(self) -> int:
        return self.d_kv

    @property
    def key_value_heads(self) -> int:
        return self.num_heads

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the decoder."""
        return self.num_decoder_layers or self.num_layers

    @property
    def restated(self) -> frozenset[str]:
        """The embedding under its other names, and a table of biases that no version uses: the first checkpoints have them."""
        names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
        return frozenset(names | ({"lm_head.weight"} if self.tie_word_embeddings else set()))

    @property
    def end_id(self) -> int:
        """The id that ends what is read and what is said. Raises `InputError` where config.json names none."""
        end = self.eos_token_id[0] if isinstance(self.eos_token_id, list) else self.eos_token_id
        if end is None:
            raise InputError("config.json names no eos_token_id, with which what an encoder reads ends.")
        return end

    @property
    def start_id(self) -> int:
        """The id behind which the decoder begins."""
        given = (self.decoder_start_token_id, self.pad_token_id, self.end_id)
        return next(number for number in given if number is not None)

    def source(self, prompt: Sequence[int]) -> list[int]:
        """What the encoder reads of a prompt: without an end in front, where a decoder's prompt has one, and with an end behind."""
        begins = len(prompt) > 0 and prompt[0] == self.end_id
        return [*prompt[begins:], self.end_id]

    def special_ids(self, end: int | None) -> dict[str, int | None]:
        """The end-of-text id also begins what the decoder says, and fills up."""
        return {"eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end}

    # -- closed forms -------------------------------------------------------------------------------------------

    @property
    def _attention(self) -> int:
        return 4 * self.d_model * self.num_heads * self.d_kv

    @property
    def _mlp(self) -> int:
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    def parameter_count(self) -> int:
        encoder, decoder = self.num_layers, self.num_hidden_layers
        biases = self.relative_attention_num_buckets * self.num_heads * (encoder + decoder if self.per_layer_bias else 2)
        norms = (2 * encoder + 3 * decoder + 2) * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_word_embeddings else 2)
        return encoder * (self._attention + self._mlp) + decoder * (2 * self._attention + self._mlp) + biases + norms + embeddings

    def pair_flops(self, inputs: int, targets: int, *, causal: bool = True) -> int:
        """Operations of all matrix products of one forward pass that reads `inputs` tokens and says `targets`, head included.

        Cross-attention makes queries and outputs of the targets, keys and values of the inputs. `causal` as in `LanguageModelConfig.matmul_flops`.
        """
        encoder, decoder, inner = self.num_layers, self.num_hidden_layers, self.num_heads * self.d_kv
        weights = encoder * inputs * (self._attention + self._mlp) + decoder * targets * (self._attention + self._mlp)
        weights += decoder * self._attention // 2 * (inputs + targets) + targets * self.vocab_size * self.d_model
        within = targets * (targets + 1) // 2 if causal else targets * targets
        return 2 * weights + 4 * inner * (encoder * inputs * inputs + decoder * (within + inputs * targets))

    def matmul_flops(self, sequence_length: int, *, causal: bool = True) -> int:
        """As `pair_flops`, half of the tokens read and half said."""
        return self.pair_flops(sequence_length - sequence_length // 2, sequence_length // 2, causal=causal)

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that generation keeps for `tokens` tokens said; what was read takes as many again."""
        return 2 * self.num_hidden_layers * self.num_heads * self.d_kv * tokens * bytes_per_value

    def training_memory(self, batch: int, sequence_length: int, *, precision: Literal["float32", "bfloat16"] = "bfloat16") -> dict[str, int]:
        """Estimated bytes on one device, by use, as `Architecture.training_memory`: a token passes one of the stacks."""
        count, tokens, size = self.parameter_count(), batch * sequence_length, 2 if precision == "bfloat16" else 4
        block = 12 * self.d_model + size * (3 * self.d_model + 6 * self.num_heads * self.d_kv + (3 if self.gated else 2) * self.d_ff)
        activations = tokens * (max(self.num_layers, self.num_hidden_layers) * block + 8 * self.d_model)
        return {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "activations": activations}

    # -- config.json --------------------------------------------------------------------------------------------

    def to_hf(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            **self.model_dump(mode="json"),
            "num_decoder_layers": self.num_hidden_layers,
            "scale_decoder_outputs": self.scaled,
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            "use_cache": True,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        return dict(sorted(values.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family. Dropout, which a model in use does not have, is passed over."""
        values = {key: value for key, value in config.items() if key in cls.model_fields and value is not None}
        return cls.parse(values, f"config.json of a '{cls.model_type}' model")

    # -- the network --------------------------------------------------------------------------------------------

    def meta_model(self) -> EncoderDecoder:
        import torch

        from cairn.models.encoder_decoder import EncoderDecoder

        with torch.device("meta"):
            return EncoderDecoder(self)

    def initialize(self, model: nn.Module, seed: int) -> None:
        """As T5: each matrix by what it reads, queries also by the size of a head, embedding and head of spread 1; all times `initializer_factor`."""
        from cairn.models.decoder import initialize

        inner = self.num_heads * self.d_kv
        spreads = {"q": (self.d_model * self.d_kv) ** -0.5, "o": inner**-0.5, "wo": self.d_ff**-0.5, "shared": 1.0, "lm_head": 1.0}
        initialize(model, seed, lambda name: self.initializer_factor * spreads.get(name.split(".")[-2], self.d_model**-0.5))
