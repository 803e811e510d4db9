"""Perceptrons that classify images: pixels through hidden layers with rectifiers to the logits of the classes. A small base for experiments."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from cairn.catalog import register
from cairn.fields.vision.families import ImageClassifier
from cairn.models.portrait import OWN_IMAGE_CLASSIFIER, Portrait

if TYPE_CHECKING:
    from torch import nn

    from cairn.fields.vision.perceptron import Perceptron


@register("architecture", "mlp")
class Mlp(ImageClassifier):
    """A perceptron over the pixels of an image; transformers knows no such family, so its checkpoints open here alone."""

    model_type: ClassVar[str] = "mlp"
    hf_class: ClassVar[str] = "MlpForImageClassification"
    portrait: ClassVar[Portrait] = OWN_IMAGE_CLASSIFIER

    hidden_sizes: list[int] = Field([256, 128], min_length=1)
    """Width of each hidden layer; the last one's values are the features that the classifier reads."""
    rectified: bool = False
    """Whether the classifier reads the last hidden layer through a rectifier, as every other layer reads the one before it."""

    initializer_gain: float = Field(2**0.5, gt=0)
    """Standard deviation with which a weight begins, times the root of the inputs of its layer: the root of 2 suits rectifiers, 0.58 is torch's own."""

    @property
    def widths(self) -> list[int]:
        """From the pixels to the classes."""
        return [self.num_channels * self.image_size**2, *self.hidden_sizes, len(self.id2label)]

    def parameter_count(self) -> int:
        return sum((wide + 1) * narrow for wide, narrow in pairwise(self.widths))

    def image_flops(self) -> int:
        return 2 * sum(wide * narrow for wide, narrow in pairwise(self.widths))

    def activation_bytes(self, images: int, precision: str) -> int:
        return images * (2 if precision == "bfloat16" else 4) * 2 * sum(self.widths)

    def to_hf(self) -> dict[str, Any]:
        values = {"architectures": [self.hf_class], "model_type": self.model_type, **self.model_dump(mode="json"), "dtype": "float32", "torch_dtype": "float32"}
        return dict(sorted(values.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family."""
        return cls.parse({key: value for key, value in config.items() if key in cls.model_fields}, f"config.json of a '{cls.model_type}' model")

    def meta_model(self) -> Perceptron:
        import torch

        from cairn.fields.vision.perceptron import Perceptron

        with torch.device("meta"):
            return Perceptron(self)

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Each matrix by what it reads: N(0, gain^2 / inputs); biases 0."""
        from cairn.models.decoder import initialize

        inputs = {name: parameter.shape[1] for name, parameter in model.named_parameters() if parameter.ndim == 2}
        initialize(model, seed, lambda name: self.initializer_gain / inputs[name] ** 0.5)
