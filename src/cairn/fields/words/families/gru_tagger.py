"""Taggers: the mean of a word's pieces, a bidirectional GRU over the sentence, a classifier of each word.

e_t = mean over the pieces of word t of their vectors        h_t = [GRU forward; GRU backward](e_1 ... e_T)_t        logits_t = W h_t + b
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import MismatchError
from cairn.fields.words.families import WordNetwork
from cairn.models.portrait import TAGGER, Portrait
from cairn.options import Count
from cairn.training.fields.labels import Labelled, class_logits

if TYPE_CHECKING:
    from torch import nn

    from cairn.fields.words.tagger import GruTagger

PAPERS = (
    Paper("Enriching Word Vectors with Subword Information", "arXiv:1607.04606"),
    Paper("Bidirectional LSTM-CRF Models for Sequence Tagging", "arXiv:1508.01991"),
)


@register("architecture", "gru-tagger", paper=PAPERS)
class GruTaggerConfig(WordNetwork, Labelled):
    """A tagger over hashed pieces of words (3.2 of the first paper) and a bidirectional recurrent network; transformers knows no such family."""

    model_type: ClassVar[str] = "gru-tagger"
    hf_class: ClassVar[str] = "GruTaggerForTokenClassification"
    portrait: ClassVar[Portrait] = TAGGER

    vocab_size: Count = Field(2**14 + 2, ge=1)
    """Numbers of pieces; left open, the data's."""
    hidden_size: Count = Field(64, ge=1)
    """Width of the vectors of pieces and of the network in each direction."""
    num_hidden_layers: int = Field(1, ge=1)

    def _recurrent(self) -> list[int]:
        """What each layer of the recurrent network reads."""
        return [self.hidden_size, *([2 * self.hidden_size] * (self.num_hidden_layers - 1))]

    def parameter_count(self) -> int:
        width = self.hidden_size
        recurrent = sum(2 * 3 * width * (inputs + width + 2) for inputs in self._recurrent())
        return self.vocab_size * width + recurrent + (2 * width + 1) * len(self.id2label)

    def outputs(self) -> list[dict[str, Any]]:
        return [class_logits(self.classes, ["batch", "word", "tag"], ["one sentence of the batch", "word"])]

    def sentence_flops(self, words: int) -> int:
        width = self.hidden_size
        return 2 * words * (sum(2 * 3 * width * (inputs + width) for inputs in self._recurrent()) + 2 * width * len(self.id2label))

    def activation_bytes(self, sentences: int, words: int, precision: str) -> int:
        return sentences * words * (2 if precision == "bfloat16" else 4) * (self.hidden_size * (1 + 12 * self.num_hidden_layers) + len(self.id2label))

    def to_hf(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            **self.model_dump(mode="json"),
            "label2id": {name: int(number) for number, name in self.id2label.items()},
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        return dict(sorted(values.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family. Raises `MismatchError` for a head that is no tagger."""
        found = config.get("architectures") or [cls.hf_class]
        if found != [cls.hf_class]:
            raise MismatchError(f"config.json: {found[0]} is no tagger; this family builds {cls.hf_class}.")
        return cls.parse({key: value for key, value in config.items() if key in cls.model_fields}, f"config.json of a '{cls.model_type}' model")

    def meta_model(self) -> GruTagger:
        import torch

        from cairn.fields.words.tagger import GruTagger

        with torch.device("meta"):
            return GruTagger(self)

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Vectors of pieces from N(0, 1); other matrices with the variance 1 / (3 width) of the usual uniform distribution; biases 0."""
        from cairn.models.decoder import initialize

        named = dict(model.named_parameters())

        def spread(name: str) -> float:
            if name.startswith("embeddings."):
                return 1.0
            return float((3 * (self.hidden_size if name.startswith("gru.") else named[name].shape[1])) ** -0.5)

        initialize(model, seed, spread)
        for name, parameter in named.items():
            if "bias" in name:
                parameter.data.zero_()
