"""The encoder behind BERT and RoBERTa: norms behind attention and MLP, learned positions, a head that says masked tokens; names are Hugging Face's.

Every position sees every other one, unless a mask says otherwise. Only positions with a weight pass the head in training: those that are asked for.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cairn.models import masks
from cairn.models.decoder import ROWS, Cache, LanguageModel, Output
from cairn.models.kernels.linear import Linear


class EncoderSizes(Protocol):
    """What this encoder asks of a family."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def positions_skip_padding(self) -> bool: ...


class Projection(nn.Module):
    """dense, then norm(x + residual)."""

    def __init__(self, inputs: int, a: EncoderSizes) -> None:
        super().__init__()
        self.dense = Linear(inputs, a.hidden_size, bias=True)
        self.LayerNorm = nn.LayerNorm(a.hidden_size, eps=a.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class SelfAttention(nn.Module):
    """What each head says, before it is projected."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.head_size, self.scale = a.hidden_size // a.num_attention_heads, 1 / math.sqrt(a.hidden_size // a.num_attention_heads)
        self.query, self.key, self.value = (Linear(a.hidden_size, a.hidden_size, bias=True) for _ in range(3))

    def forward(self, x: Tensor, plan: masks.MaskPlan) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return masks.attend(q, k, v, plan, self.scale).transpose(1, 2).flatten(2)


class EncoderAttention(nn.Module):
    """Attention of all positions to all, with its residual and norm."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.add_module("self", SelfAttention(a))
        self.output = Projection(a.hidden_size, a)

    def forward(self, x: Tensor, plan: masks.MaskPlan) -> Tensor:
        return self.output(self.get_submodule("self")(x, plan), x)


class Intermediate(nn.Module):
    """gelu(up(x))."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.dense = Linear(a.hidden_size, a.intermediate_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class EncoderBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)) ("BERT", 1810.04805, section 3)."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.attention = EncoderAttention(a)
        self.intermediate = Intermediate(a)
        self.output = Projection(a.intermediate_size, a)

    def forward(self, x: Tensor, plan: masks.MaskPlan) -> Tensor:
        x = self.attention(x, plan)
        return self.output(self.intermediate(x), x)


class EncoderEmbeddings(nn.Module):
    """Tokens, positions and the one segment that a text alone has, added and normalised."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.padding = a.pad_token_id if a.positions_skip_padding else None
        self.word_embeddings = nn.Embedding(a.vocab_size, a.hidden_size, padding_idx=a.pad_token_id)
        self.position_embeddings = nn.Embedding(a.max_position_embeddings, a.hidden_size, padding_idx=self.padding)
        self.token_type_embeddings = nn.Embedding(a.type_vocab_size, a.hidden_size)
        self.LayerNorm = nn.LayerNorm(a.hidden_size, eps=a.layer_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            if self.padding is not None:  # they are counted from behind the padding's own, and padding has none
                real = input_ids != self.padding
                positions = real.cumsum(1) * real + self.padding
        segment = self.token_type_embeddings.weight[0]
        return self.LayerNorm(self.word_embeddings(input_ids) + segment + self.position_embeddings(positions))


class Stack(nn.Module):
    """The blocks, as the published files name them."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderBlock(a) for _ in range(a.num_hidden_layers))


class EncoderTrunk(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__()
        self.embeddings = EncoderEmbeddings(a)
        self.encoder = Stack(a)

    def forward(self, input_ids: Tensor, mask: masks.Mask | None, positions: Tensor | None) -> Tensor:
        batch, length = input_ids.shape
        plan = masks.prepare(masks.full() if mask is None else mask, batch, length, length, input_ids.device)
        x = self.embeddings(input_ids, positions)
        for layer in self.encoder.layer:
            x = layer(x, plan)
        return x


class MaskedHead(nn.Module):
    """dense, gelu, norm, and the matrix to the vocabulary with a bias of its own; `norm_name` is what files call the norm."""

    def __init__(self, a: EncoderSizes, norm_name: str, transform: str | None) -> None:
        super().__init__()
        inside = self if transform is None else nn.Module()
        inside.add_module("dense", Linear(a.hidden_size, a.hidden_size, bias=True))
        inside.add_module(norm_name, nn.LayerNorm(a.hidden_size, eps=a.layer_norm_eps))
        if transform is not None:
            self.add_module(transform, inside)
        self.decoder = Linear(a.hidden_size, a.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(a.vocab_size))
        self.dense_name, self.norm_name = ("dense", norm_name) if transform is None else (f"{transform}.dense", f"{transform}.{norm_name}")

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, z_loss: float = 0.0, each: bool = False) -> Any:
        """As `cairn.models.decoder.Head.forward`; positions of weight 0 are not computed, and their token loss is 0."""
        if targets is None:
            return self._logits(hidden)
        rows, wanted = hidden.flatten(0, 1), targets.flatten()
        kept = weights.flatten().nonzero()[:, 0] if weights is not None and not each else None
        if kept is not None:
            rows, wanted = rows[kept], wanted[kept]
        parts = [
            checkpoint(self._losses, block, asked, use_reentrant=False, preserve_rng_state=False)
            for block, asked in zip(rows.split(ROWS), wanted.split(ROWS), strict=True)
        ]
        losses, lse = (torch.cat(column) for column in zip(*parts, strict=True)) if parts else (rows.sum(-1), rows.sum(-1))
        if each:
            return None, losses.view(targets.shape)
        counted = losses + z_loss * lse.square() if z_loss else losses
        if kept is None:
            return counted.sum(), losses.detach().view(targets.shape)
        assert weights is not None
        told = torch.zeros(targets.numel(), dtype=losses.dtype, device=losses.device).index_copy(0, kept, losses.detach())
        return (counted * weights.flatten()[kept]).sum(), told.view(targets.shape)

    def _logits(self, hidden: Tensor) -> Tensor:
        made = self.get_submodule(self.norm_name)(F.gelu(self.get_submodule(self.dense_name)(hidden)))
        logits: Tensor = self.decoder(made) + self.bias
        return logits

    def _losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        lse = logits.logsumexp(-1)
        return lse - logits.gather(-1, targets[:, None])[:, 0], lse


class MaskedLanguageModel(LanguageModel):
    """An encoder that says masked tokens."""

    trunk: ClassVar[str]

    def blocks(self) -> list[nn.Module]:
        return list(self.get_submodule(self.trunk).encoder.layer)  # type: ignore[union-attr, arg-type]

    def hidden(self, input_ids: Tensor, *, mask: masks.Mask | None = None, positions: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of the last block; every position sees every other one unless `mask` says otherwise."""
        found: Tensor = self.get_submodule(self.trunk)(input_ids, mask, positions)
        return found

    def forward(
        self,
        input_ids: Tensor,
        *,
        mask: masks.Mask | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        z_loss: float = 0.0,
        each: bool = False,
        logits: Literal["all", "last"] | Tensor | None = None,
    ) -> Output:
        """Logits of what stands at each position, or the loss where `targets` are given; arguments as in `cairn.models.decoder.Decoder.forward`."""
        from cairn.models.decoder import answer

        head: Any = self.get_submodule(self.head.rpartition(".")[0])
        return answer(head, self.hidden(input_ids, mask=mask, positions=positions), targets, weights, z_loss, logits, each)


class Bert(MaskedLanguageModel):
    """BERT; see `cairn.models.families.bert`."""

    embedding, head, trunk = "bert.embeddings.word_embeddings", "cls.predictions.decoder", "bert"

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__(a)
        self.bert = EncoderTrunk(a)
        self.cls = nn.Module()
        self.cls.add_module("predictions", MaskedHead(a, "LayerNorm", "transform"))
        self._tie()


class Roberta(MaskedLanguageModel):
    """RoBERTa; see `cairn.models.families.roberta`."""

    embedding, head, trunk = "roberta.embeddings.word_embeddings", "lm_head.decoder", "roberta"

    def __init__(self, a: EncoderSizes) -> None:
        super().__init__(a)
        self.roberta = EncoderTrunk(a)
        self.lm_head = MaskedHead(a, "layer_norm", None)
        self._tie()
