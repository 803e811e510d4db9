"""The RoBERTa family: BERT trained longer, without segments, whose positions begin behind the padding's id."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.families.bert import BertFamily
from cairn.options import Count

if TYPE_CHECKING:
    from cairn.models.encoder import MaskedLanguageModel


@register("architecture", "roberta", paper=Paper("RoBERTa: A Robustly Optimized BERT Pretraining Approach", "arXiv:1907.11692"))
class RobertaFamily(BertFamily):
    """RoBERTa for masked language modelling: BERT with positions of its own and a plainer head (section 3)."""

    model_type: ClassVar[str] = "roberta"
    hf_class: ClassVar[str] = "RobertaForMaskedLM"
    positions_skip_padding: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ("roberta.pooler.dense",)

    vocab_size: Count = Field(50265, ge=1)
    max_position_embeddings: Count = Field(514, ge=3)
    type_vocab_size: int = Field(1, ge=1)
    layer_norm_eps: float = Field(1e-5, gt=0)
    pad_token_id: int | None = Field(1, ge=0)

    @property
    def positions_before(self) -> int:
        """Positions that no token of a text has: padding's, and those before it."""
        return 0 if self.pad_token_id is None else self.pad_token_id + 1

    @classmethod
    def _network(cls) -> type[MaskedLanguageModel]:
        from cairn.models.encoder import Roberta

        return Roberta
