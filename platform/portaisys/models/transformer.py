"""A pre-norm transformer encoder, mean-pooled: over image patches (Dosovitskiy et al. 2021, arXiv:2010.11929) or token ids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portaisys import spec
from portaisys.spec import UserError


class Attention(nn.Module):
    """Multi-head self-attention. `head_dim` is stored, so that pruning may change the width around it; how many heads there are follows from the weights."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    @property
    def heads(self) -> int:
        return self.q.out_features // self.head_dim

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        q, k, v = (self._split(layer(x_BTD)) for layer in (self.q, self.k, self.v))
        y_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11T)
        y: Tensor = self.out(y_BHTd.transpose(1, 2).flatten(2))
        return y

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.reshape(*x_BTD.shape[:2], self.heads, self.head_dim).transpose(1, 2)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, stage: int = 0) -> None:
        super().__init__()
        self.stage = stage
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), bias_B11T)
        y: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))
        return y


class Encoder(nn.Module):
    """x_BCHW -> logits [B, classes]."""

    def __init__(self, options: spec.Transformer, channels: int, tokens: int, classes: int) -> None:
        super().__init__()
        dim, hidden = options.dim, int(options.dim * options.mlp_ratio)
        self.patches = nn.Conv2d(channels, dim, options.patch, options.patch)
        self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.layers = nn.ModuleList(Layer(dim, options.heads, hidden, stage) for stage in range(options.depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD).mean(1))
        return logits


def transformer(options: spec.Transformer, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The encoder for rows of [channels, height, width]. Raises UserError when patches do not tile the picture."""
    if len(shape) != 3 or shape[1] % options.patch or shape[2] % options.patch:
        raise UserError(f"model.patch: {options.patch} does not tile rows of {shape}; they must be [channels, height, width] with both a multiple of it")
    tokens = (shape[1] // options.patch) * (shape[2] // options.patch)
    return Encoder(options, shape[0], tokens, classes)


class TextEncoder(nn.Module):
    """ids_BT int64, 0 for padding -> logits [B, classes], whatever the padding. T is at most `tokens`."""

    position: Tensor

    def __init__(self, options: spec.TextTransformer, vocabulary: int, tokens: int, classes: int) -> None:
        super().__init__()
        dim, hidden = options.dim, int(options.dim * options.mlp_ratio)
        self.words = nn.Embedding(vocabulary, dim)
        self.register_buffer("position", _sinusoids(tokens, dim))
        self.layers = nn.ModuleList(Layer(dim, options.heads, hidden, stage) for stage in range(options.depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.words(ids_BT) + self.position[: ids_BT.shape[1]]
        real_BT = (ids_BT != 0).to(x_BTD.dtype)
        bias_B11T = ((1 - real_BT) * -1e4)[:, None, None]  # a number that fp16 has, and whose exp() is 0
        for layer in self.layers:
            x_BTD = layer(x_BTD, bias_B11T)
        real_BT1 = real_BT.unsqueeze(2)
        mean_BD = (self.norm(x_BTD) * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)
        logits: Tensor = self.head(mean_BD)
        return logits


def _sinusoids(tokens: int, dim: int) -> Tensor:
    """Positions as sines and cosines of falling frequency (Vaswani et al. 2017, section 3.5), [tokens, dim]: no rare last ones to learn."""
    angle = torch.arange(tokens)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000) / dim))
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def text_transformer(options: spec.TextTransformer, shape: tuple[int, ...], classes: int, vocabulary: int) -> nn.Module:
    """The encoder for rows of at most shape[0] ids out of `vocabulary`."""
    return TextEncoder(options, vocabulary, shape[0], classes)
