"""Vision transformers that classify images: patches as tokens, a class token whose last state the classifier reads.

    x_0 = [class; E patch_1; ...; E patch_N] + positions        x' = x + attention(norm(x))        x'' = x' + MLP(norm(x'))
    logits = W norm(x_L)[class] + b

Parameter names and config.json are those of transformers' `ViTForImageClassification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.errors import MismatchError
from cairn.fields.vision.families import ImageClassifier
from cairn.models.portrait import IMAGE_CLASSIFIER, Portrait
from cairn.options import Count

if TYPE_CHECKING:
    from torch import nn

    from cairn.fields.vision.transformer import VisionTransformer

_NEUTRAL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Keys of config.json that say how transformers trains; a model in use is the same whatever they are."""


@register("architecture", "vit", paper=Paper("An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", "arXiv:2010.11929"))
class Vit(ImageClassifier):
    """ViT: a transformer over patches of an image, with a classifier on its class token (section 3.1)."""

    model_type: ClassVar[str] = "vit"
    hf_class: ClassVar[str] = "ViTForImageClassification"
    portrait: ClassVar[Portrait] = IMAGE_CLASSIFIER

    hidden_size: Count = Field(192, ge=1)
    intermediate_size: Count = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(3, ge=1)
    patch_size: int = Field(16, ge=1)
    hidden_act: Literal["gelu", "relu", "silu"] = "gelu"
    layer_norm_eps: float = Field(1e-12, gt=0)
    qkv_bias: bool = True
    initializer_range: float = Field(0.02, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({self.num_attention_heads}); change one of them.")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size ({self.patch_size}) is larger than the images (image_size {self.image_size}).")
        return self

    @property
    def patches(self) -> int:
        """Patches of one image; what is left over at the right and at the bottom is not read."""
        return (self.image_size // self.patch_size) ** 2

    # -- closed forms -------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        width, inner = self.hidden_size, self.intermediate_size
        embeddings = width * (1 + self.patches + 1) + width * (self.num_channels * self.patch_size**2 + 1)
        block = 4 * width * width + (3 * self.qkv_bias + 1) * width + 2 * width * inner + inner + width + 4 * width
        return embeddings + self.num_hidden_layers * block + 2 * width + (width + 1) * len(self.id2label)

    def image_flops(self) -> int:
        width, length = self.hidden_size, self.patches + 1
        block = length * (4 * width * width + 2 * width * self.intermediate_size) + 2 * length * length * width
        return 2 * (self.patches * width * self.num_channels * self.patch_size**2 + self.num_hidden_layers * block + width * len(self.id2label))

    def activation_bytes(self, images: int, precision: str) -> int:
        size, width = 2 if precision == "bfloat16" else 4, self.hidden_size
        block = 8 * width + size * (2 * width + 4 * width + 2 * self.intermediate_size)
        return images * (self.patches + 1) * (self.num_hidden_layers * block + 8 * width)

    # -- config.json --------------------------------------------------------------------------------------------

    def to_hf(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            **self.model_dump(mode="json"),
            "label2id": {name: int(number) for number, name in self.id2label.items()},
            **_NEUTRAL,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        return dict(sorted(values.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family, of any transformers version. Dropout, which a model in use does not have, is
        passed over. Raises `MismatchError` for an image that is not square and for a head that is no classifier."""
        found = config.get("architectures") or [cls.hf_class]
        if found != [cls.hf_class]:
            raise MismatchError(f"config.json: {found[0]} is not an image classifier; this family builds {cls.hf_class}.")
        values = {key: value for key, value in config.items() if key in cls.model_fields and value is not None}
        for key in ("image_size", "patch_size"):
            if isinstance(values.get(key), (list, tuple)):
                if len(set(values[key])) != 1:
                    raise MismatchError(f"config.json: {key}={values[key]} is not square, which this family does not build.")
                values[key] = values[key][0]
        if "id2label" not in values and isinstance(config.get("num_labels"), int):
            values["id2label"] = {str(number): f"LABEL_{number}" for number in range(config["num_labels"])}
        full = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}  # what transformers takes where a file is silent
        return cls.parse(full | values, f"config.json of a '{cls.model_type}' model")

    # -- the network --------------------------------------------------------------------------------------------

    def meta_model(self) -> VisionTransformer:
        import torch

        from cairn.fields.vision.transformer import VisionTransformer

        with torch.device("meta"):
            return VisionTransformer(self)

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Normal distributions of `initializer_range` for matrices, the class token and positions; biases 0, norms 1."""
        from cairn.models.decoder import initialize

        initialize(model, seed, self.initializer_range)
