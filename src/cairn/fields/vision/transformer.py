"""The network of the ViT family, with the parameter names that transformers publishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisionSizes(Protocol):
    """What the network asks of a family; the names are those of transformers' ViT."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_channels(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def patches(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def id2label(self) -> dict[str, str]: ...


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class PatchEmbeddings(nn.Module):
    """Images (B, C, H, W) to one vector for each patch, row by row: (B, N, D)."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.projection(pixel_values).flatten(2).transpose(1, 2)
        return found


class Embeddings(nn.Module):
    """The class token and the patches, each with its position: (B, 1 + N, D)."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.patches + 1, config.hidden_size))
        self.patch_embeddings = PatchEmbeddings(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixel_values)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings


class _Named(nn.Module):
    """One linear layer under the name `dense`, as the published files have it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dense(x)
        return found


class SelfAttention(nn.Module):
    """Every position sees every other one."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.head_size).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention and its output layer."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.output = _Named(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.output(self.attention(x))
        return found


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = _Named(config.hidden_size, config.intermediate_size)
        self.output = _Named(config.intermediate_size, config.hidden_size)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        found: Tensor = x + self.output(self.activation(self.intermediate(self.layernorm_after(x))))
        return found


class _Encoder(nn.Module):
    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class _Body(nn.Module):
    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = _Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings(pixel_values)
        for block in self.encoder.layer:
            x = block(x)
        found: Tensor = self.layernorm(x)
        return found


class VisionTransformer(nn.Module):
    """Images (B, C, H, W), normalised by the image processor, to the logits (B, K) of the classes."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.architecture = config
        self.vit = _Body(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label))

    def blocks(self) -> list[nn.Module]:
        """The blocks, bottom first: what sharding and recomputation work on."""
        return list(self.vit.encoder.layer)

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.vit(pixel_values)[:, 0])
        return found
