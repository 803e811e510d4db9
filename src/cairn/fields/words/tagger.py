"""The network of the family `gru-tagger`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Sizes(Protocol):
    """What the network has to know of its family's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def id2label(self) -> dict[str, str]: ...


class GruTagger(nn.Module):
    """Sentences of words, each the numbers of its pieces (B, T, G) padded with 0, to the logits (B, T, K) of their tags.

    Neither direction reads beyond the end of a sentence, so that how far it is padded changes nothing.
    """

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.architecture = config
        self.embeddings = nn.EmbeddingBag(config.vocab_size, config.hidden_size, mode="mean", padding_idx=0)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, config.num_hidden_layers, bidirectional=True, batch_first=True)
        self.classifier = nn.Linear(2 * config.hidden_size, len(config.id2label))

    def blocks(self) -> list[nn.Module]:
        """The recurrent network: what sharding works on."""
        return [self.gru]

    def forward(self, pieces: Tensor, lengths: Tensor, asked: Tensor | None = None) -> Tensor:
        """The logits of all words, or (n, K) of the n words at which `asked` (B, T) is true."""
        sentences, longest, _ = pieces.shape
        words = self.embeddings(pieces.flatten(0, 1)).view(sentences, longest, -1)
        packed = pack_padded_sequence(words, lengths.to("cpu", torch.int64), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        found: Tensor = self.classifier(states if asked is None else states[asked])
        return found
