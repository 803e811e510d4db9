"""What a model is, as plain values: sizes with Hugging Face names, closed forms, and the way to config.json and back.

Nothing here needs torch; `Network.build` loads it. How a family computes stands in `cairn.models.families`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from cairn import catalog
from cairn.checkpoint.format import documents, kinds
from cairn.errors import DamagedError, MismatchError, NotFoundError
from cairn.models.portrait import CAUSAL_LM, Portrait
from cairn.options import Count, Options

if TYPE_CHECKING:
    import torch
    from torch import nn

ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rope types and the keys that each cannot do without."""

_NEUTRAL = {"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "quantization_config": None}
"""Keys of a config.json that this decoder honours only at these values; any other value is refused, never ignored."""


class Network(Options, ABC):
    """What every family of models is: plain sizes that build, cost and describe a network."""

    catalog_kind: ClassVar[str] = "architecture"

    model_type: ClassVar[str]
    hf_class: ClassVar[str]
    reads: ClassVar[str]
    """What it is given, in the words in which a field says what its samples consist of: tokens, images."""
    measurement: ClassVar[str | None] = None
    """What it is measured by where nothing is named and its field's own measurement does not fit it."""
    encoder_decoder: ClassVar[bool] = False
    """Whether what is read and what is said pass different stacks."""
    cuts_by_tensor: ClassVar[bool] = False
    """Whether its matrices can be cut over processes (tensor parallelism)."""

    portrait: ClassVar[Portrait]
    """What a card says of every model of the family."""

    @property
    def restated(self) -> frozenset[str]:
        """Names of tensors that files of this family may hold and that say nothing new."""
        return frozenset()

    @abstractmethod
    def parameter_count(self) -> int:
        """Number of parameters; a tied embedding counts once."""

    @abstractmethod
    def meta_model(self) -> Any:
        """The network on the meta device: shapes and names, no memory."""

    @abstractmethod
    def initialize(self, model: nn.Module, seed: int) -> None:
        """Draw the weights of a network of this architecture, wherever and in whatever parts they lie."""

    def build(self, seed: int = 0, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
        """A fresh network: matrices from normal distributions of mean 0, biases 0, norms 1.

        Every weight is drawn on the CPU from its own stream of (seed, name): the same on every device, untouched by
        torch's global generator and by what else the model has.
        """
        model = self.meta_model().to_empty(device=device)
        self.initialize(model, seed)
        return model if dtype is None else model.to(dtype)

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The content of config.json."""

    def bounds(self) -> str:
        """The most that it reads at once, as half a sentence for a card."""
        return "nothing is known of the most that it reads at once"


class LanguageModelConfig(Network):
    """A family of models that read and write tokens."""

    reads: ClassVar[str] = "tokens"
    portrait: ClassVar[Portrait] = CAUSAL_LM

    silent: ClassVar[Mapping[str, Any]] = {}
    """What transformers takes where a config.json is silent, as far as it differs from the defaults of a new model here."""

    vocab_size: Count = Field(32000, ge=1)

    def bounds(self) -> str:
        longest = getattr(self, "max_position_embeddings", None)
        return f"it sees at most {longest or 'an unknown number of'} positions at once"

    @property
    def reads_both_ways(self) -> bool:
        """Whether what is given is read in both directions before anything is said: a prefix decoder or an encoder-decoder."""
        return self.encoder_decoder

    def special_ids(self, end: int | None) -> dict[str, int | None]:
        """Keys of config.json that name the tokenizer's end-of-text id."""
        return {"eos_token_id": end, "bos_token_id": end}

    @abstractmethod
    def matmul_flops(self, sequence_length: int, *, causal: bool = True) -> int:
        """Floating-point operations of all matrix products of one forward pass over one sequence, head included."""

    def pair_flops(self, inputs: int, targets: int, *, causal: bool = True) -> int:
        """Those of an encoder-decoder that reads `inputs` tokens and says `targets`."""
        raise NotImplementedError(f"'{self.model_type}' is no encoder-decoder")

    def flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        """Operations to train on one token: forward once, backward twice the forward (see `matmul_flops`)."""
        return 3 * self.matmul_flops(sequence_length, causal=causal) / sequence_length

    @abstractmethod
    def training_memory(self, batch: int, sequence_length: int, *, precision: Literal["float32", "bfloat16"] = "bfloat16") -> dict[str, int]:
        """Estimated bytes on one device, by use, for micro-batches of `batch` sequences."""


class ExpertSizes(NamedTuple):
    """The experts of a layer: how many there are, how many of them are chosen for a token, and the inner size of each."""

    total: int
    chosen: int
    size: int
    normed: bool
    """Whether the weights of those that are chosen add up to 1."""
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What an expert calls its matrices."""
    wide: bool = False
    """Whether weights stay in float32 where the model is kept in a lower precision."""


class Architecture(LanguageModelConfig):
    """Sizes of a decoder-only transformer; field names are Hugging Face's. A family fixes the class variables."""

    norms: ClassVar[Literal["pre", "post", "both"]]
    """Whether a block normalises the input of attention and MLP ("pre"), their output ("post"), or both."""
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "none"
    """Whether queries and keys are normalised: not, over all their heads together, or each head by itself."""
    unit_norms: ClassVar[bool] = False
    """Whether a norm multiplies by 1 + weight, all in float32, instead of by its weight (Gemma, which also rounds its factor on embeddings)."""
    gelu: ClassVar[bool] = False
    """Whether the MLP is gated by GELU (its tanh form) instead of by SiLU."""
    attention_cap: ClassVar[float | None] = None
    """Bound c of attention scores s, which become c * tanh(s / c)."""
    logit_cap: ClassVar[float | None] = None
    """The same for logits."""
    fused: ClassVar[bool] = False
    """Whether one matrix makes queries, keys and values, and one the gate and what it gates."""
    mlp_name: ClassVar[str] = "mlp"
    """What a block calls what it has behind its attention."""
    neutral: ClassVar[Mapping[str, Any]] = {}
    """Keys of a config.json, besides those that hold for all families, that are honoured only at these values."""
    unwritten: ClassVar[frozenset[str]] = frozenset()
    """Fields that config.json of this family does not have."""
    rounds_early: ClassVar[bool] = True
    """Where a model that is kept in a lower precision rounds, as its family does in transformers: before the weight of a norm and with angles of
    rope that are rounded themselves, or only behind both."""

    hidden_size: Count = Field(256, ge=1)
    intermediate_size: Count = Field(688, ge=1)
    num_hidden_layers: int = Field(8, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    """Heads of keys and values (grouped-query attention); None: as many as query heads."""
    head_dim: int | None = Field(None, ge=1)
    """Size of one head; None: hidden_size / num_attention_heads."""
    max_position_embeddings: Count = Field(2048, ge=1)
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: dict[str, Any] | None = None
    """Rope variant, as Hugging Face writes it: `{rope_type: llama3, factor: 8, ...}`; None is plain rope."""
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, ge=0)
    initializer_cutoff: float | None = Field(None, gt=0)
    """Multiple of initializer_range beyond which no weight is drawn (a truncated normal distribution); None: no bound. It says
    how training begins, nothing about the network, and stays out of config.json."""
    attention_bias: bool = False
    mlp_bias: bool = False
    attention: Literal["causal", "prefix"] = "causal"
    """`prefix`: what is given is read in both directions (a non-causal decoder). The weights are the same; transformers knows no such
    decoder and reads the checkpoint as a causal one."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @field_validator("rope_scaling")
    @classmethod
    def _known_rope(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if not value:
            return None
        kind = value.get("rope_type", value.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_NEEDS:
            raise ValueError(f"rope_scaling: rope_type '{kind}' is not known; there is {', '.join(ROPE_NEEDS)}.")
        missing = [key for key in ROPE_NEEDS[kind] if value.get(key) is None]
        if missing:
            raise ValueError(f"rope_scaling: rope_type '{kind}' needs {' and '.join(missing)}.")
        settings = {k: v for k, v in value.items() if k not in ("type", "rope_type", "rope_theta") and v is not None}
        for key, setting in settings.items():
            numbers = setting if isinstance(setting, list) else [setting]
            if not all(isinstance(number, (int, float)) and math.isfinite(number) and abs(number) < 2**53 for number in numbers):
                raise ValueError(f"rope_scaling: {str(key)[:40]} is a number or a list of numbers.")
        return None if kind == "default" else {"rope_type": kind, **settings}

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({self.num_attention_heads}); change one of them or give head_dim."
            )
        if self.rotary_size % 2 or not self.rotary_size:
            part = f"a head of {self.head_size}" if self.rotary_size == self.head_size else f"{self.rotary_size} of the {self.head_size} numbers of a head"
            raise ValueError(f"{part} cannot be rotated by rope, which needs an even size.")
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads ({self.key_value_heads}).")
        return self

    @property
    def reads_both_ways(self) -> bool:
        return self.attention == "prefix"

    @property
    def cuts_by_tensor(self) -> bool:  # type: ignore[override]
        # A norm that all heads share would need its gradient summed over the processes; a fused matrix would be cut across its parts.
        return self.qk_norm != "head" and not self.fused

    # -- what a family may do otherwise; the decoder asks for it ------------------------------------------------

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        """Whether queries, keys and values have biases, and whether the output of attention has one."""
        return self.attention_bias, self.attention_bias

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return 1 / math.sqrt(self.head_size)

    @property
    def embedding_scale(self) -> float:
        """Factor on what the embedding gives."""
        return 1.0

    @property
    def residual_scale(self) -> float:
        """Factor on what attention and MLP add."""
        return 1.0

    @property
    def logit_scale(self) -> float:
        """Factor on logits."""
        return 1.0

    def experts_of(self, layer: int) -> ExpertSizes | None:
        """The experts of a layer; None: it has one MLP."""
        return None

    @property
    def router_aux_loss(self) -> float | None:
        """Coefficient of the loss that spreads tokens evenly over experts, as config.json has it; None: there are no experts."""
        return None

    @property
    def rotary_size(self) -> int:
        """How many numbers of a head, the first ones, are rotated by positions."""
        return self.head_size

    def window_of(self, layer: int) -> int | None:
        """How many positions a layer looks back at, its own included; None: all."""
        return None

    def rotary_of(self, layer: int) -> Literal["global", "local", "none"]:
        """Which rotation of positions a layer uses."""
        return "global"

    def local_rotary(self) -> Architecture:
        """What the rotation of "local" layers follows: the same sizes with their own `rope_theta` and `rope_scaling`."""
        return self

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer."""
        return [self.window_of(layer) for layer in range(self.num_hidden_layers)]

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    # -- closed forms -------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        width, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_size, self.key_value_heads * self.head_size
        attention = 2 * width * queries + 2 * width * keys + self.attention_biases[0] * (queries + 2 * keys) + self.attention_biases[1] * width
        one = 3 * width * inner + self.mlp_bias * (2 * inner + width)
        mlps = sum(one if each is None else each.total * (3 * each.size + 1) * width for each in map(self.experts_of, range(self.num_hidden_layers)))
        norms = (4 if self.norms == "both" else 2) * width + {"none": 0, "all": queries + keys, "head": 2 * self.head_size}[self.qk_norm]
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + norms) + mlps + embeddings + width

    def matmul_flops(self, sequence_length: int, *, causal: bool = True) -> int:
        """Floating-point operations of all matrix products of one forward pass over one sequence, head included.

        A multiply-add is two operations. Attention counts the pairs that a causal mask leaves, T(T+1)/2 or
        fewer in a window; with `causal=False` all T^2, as "PaLM" (appendix B) does. Element-wise work and recomputation never count.
        """
        width, length = self.hidden_size, sequence_length
        queries, keys = self.num_attention_heads * self.head_size, self.key_value_heads * self.head_size
        weights = self.num_hidden_layers * (2 * width * queries + 2 * width * keys) + width * (3 * self.inner_numbers + self.routed) + self.vocab_size * width
        pairs = sum(_pairs(length, window) for window in self.windows) if causal else self.num_hidden_layers * length * length
        return 2 * length * weights + 4 * queries * pairs

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that generation keeps for `tokens` tokens."""
        return 2 * self.num_hidden_layers * self.key_value_heads * self.head_size * tokens * bytes_per_value

    def training_memory(self, batch: int, sequence_length: int, *, precision: Literal["float32", "bfloat16"] = "bfloat16") -> dict[str, int]:
        """Estimated bytes on one device, by use: `weights`, `gradients` and `optimizer` (two float32 moments) are exact;
        `activations` counts the inputs that the backward pass keeps for `batch` sequences, without recomputation."""
        count, tokens, size = self.parameter_count(), batch * sequence_length, 2 if precision == "bfloat16" else 4
        queries, keys = self.num_attention_heads * self.head_size, self.key_value_heads * self.head_size
        # Kept per block and token: two float32 residuals, two normed inputs, q k v and the attention output, three MLP inners.
        block = 8 * self.hidden_size + size * (2 * self.hidden_size + 2 * queries + 2 * keys)
        activations = tokens * (self.num_hidden_layers * block + 3 * size * self.inner_numbers + 8 * self.hidden_size)
        # An expert is given copies of its tokens, and what each says of a token is kept until it is weighed.
        activations += tokens * 2 * size * self.hidden_size * sum(each.chosen for each in map(self.experts_of, range(self.num_hidden_layers)) if each)
        return {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "activations": activations}

    def uncut_parameters(self) -> int:
        """Parameters that tensor parallelism leaves whole: embedding, head and the norms of the residual stream."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.hidden_size * (2 * self.num_hidden_layers + 1 + self.routed)

    def inner_activations(self, tokens: int, bytes_per_value: int) -> int:
        """The part of the activations that lies inside attention and MLP, which tensor parallelism cuts."""
        queries, keys = self.num_attention_heads * self.head_size, self.key_value_heads * self.head_size
        return tokens * bytes_per_value * (self.num_hidden_layers * (2 * queries + 2 * keys) + 3 * self.inner_numbers)

    @property
    def inner_numbers(self) -> int:
        """Inner sizes of what a token passes behind attention, over all layers: of MLPs, or of the experts that are chosen for it."""
        return sum(self.intermediate_size if each is None else each.chosen * each.size for each in map(self.experts_of, range(self.num_hidden_layers)))

    @property
    def routed(self) -> int:
        """Experts of all layers: so many outputs routers have."""
        return sum(each.total for each in map(self.experts_of, range(self.num_hidden_layers)) if each is not None)

    # -- config.json --------------------------------------------------------------------------------------------

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json: what transformers 5 writes, and the keys by which older versions read the same model."""
        rope = self.rope_scaling or {"rope_type": "default"}
        values: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            **self.model_dump(mode="json", exclude={"initializer_cutoff", *self.unwritten}),
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        if self.attention == "causal":
            del values["attention"]  # a key of ours, for what transformers does not know
        return dict(sorted(values.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family, of any transformers version.

        Keys that say nothing about the network are passed over; a key that asks for what this decoder does not do
        raises `MismatchError`.
        """
        documents.validated(kinds.Config, dict(config), f"config.json of a '{cls.model_type}' model")
        config = {**cls.silent, **config}
        for key, neutral in {**{k: v for k, v in _NEUTRAL.items() if k not in cls.model_fields}, **cls.neutral}.items():
            if config.get(key) not in (neutral, None):
                raise MismatchError(f"config.json: {key}={config[key]!r} is not supported for '{cls.model_type}' (only {neutral!r}).")
        values = {k: v for k, v in config.items() if k in cls.model_fields and (v is not None or k in _NULLABLE)}
        values["rope_theta"], values["rope_scaling"] = cls._rope(config, config.get("rope_parameters") or config.get("rope_scaling") or {})
        return cls.parse(values | cls._also(config), f"config.json of a '{cls.model_type}' model")

    @classmethod
    def _rope(cls, config: Mapping[str, Any], written: Mapping[str, Any], theta: float | None = None) -> tuple[float, dict[str, Any] | None]:
        """The base of the rotation and its variant, as `written` in a config.json; `theta` where neither says a base."""
        if not isinstance(written, Mapping):
            raise DamagedError(f"config.json of a '{cls.model_type}' model says how positions turn by {written!r}, which is no table of keys.")
        rope = dict(written)
        if rope.pop("partial_rotary_factor", None) not in (None, 1.0) and "partial_rotary_factor" not in cls.model_fields:
            raise MismatchError(f"config.json: partial_rotary_factor={written['partial_rotary_factor']!r} is not supported for '{cls.model_type}'.")
        base = rope.pop("rope_theta", None) or config.get("rope_theta") or theta or cls.model_fields["rope_theta"].default
        return base, rope or None

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values that a family reads from its config.json in its own way."""
        return {}


def _pairs(length: int, window: int | None) -> int:
    """Pairs of query and key in a causal window over `length` positions."""
    near = min(length, window or length)
    return near * (near + 1) // 2 + (length - near) * near


_NULLABLE = {name for name, field in Architecture.model_fields.items() if type(None) in getattr(field.annotation, "__args__", ())}


def architecture(config: Mapping[str, Any]) -> Network:
    """The architecture that a config.json describes. Raises `NotFoundError` for a family that is not ours."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise NotFoundError("config.json has no 'model_type', so its family is not known.")
    return catalog.get("architecture", name).implementation.from_hf(config)
