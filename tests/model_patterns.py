"""The model patterns of docs/operators.md: what people build in torch, each as small as it can be and still be that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portaisys import models, spec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pattern:
    """`module`: makes it. `inputs`: so many rows of every input. `note`: what to know, or to write instead. `dims`: free dimensions beside the batch, with their profile."""

    module: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    note: str = ""
    dims: tuple[tuple[str, int, int, int], ...] = ()


class Net(nn.Module):
    """Layers by name, and what forward does with them: `steps(net, *inputs)`."""

    def __init__(self, steps: Callable[..., Any], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.steps = steps
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, Tensor) else layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.steps(self, *inputs)


# --- rows -----------------------------------------------------------------------------------------------------------


def of(*shapes: Shape) -> Callable[[int], tuple[Tensor, ...]]:
    """Normal numbers, float32 [batch, *shape] for each shape."""
    return lambda batch: tuple(torch.randn(batch, *shape) for shape in shapes)


PICTURE = of((3, 12, 12))
VECTOR = of((16,))
SEQUENCE = of((8, 16))
HEADS = of((4, 8, 16))  # 4 heads, 8 tokens


def sequences_of_any_length(batch: int) -> tuple[Tensor]:
    """As many tokens as rows, and four."""
    return (torch.randn(batch, batch + 4, 16),)


def tokens_and_mask(batch: int) -> tuple[Tensor, Tensor]:
    """Ids of 8 tokens, and which of them count: at least the first."""
    return torch.randint(0, 50, (batch, 8)), torch.arange(8) < torch.randint(1, 9, (batch, 1))


def heads_and_mask(batch: int) -> tuple[Tensor, Tensor]:
    """Queries, and which of the 8 keys each row may look at: at least the first."""
    return torch.randn(batch, 4, 8, 16), (torch.arange(8) < torch.randint(1, 9, (batch, 1))).reshape(batch, 1, 1, 8)


def picture_and_grid(batch: int) -> tuple[Tensor, Tensor]:
    """Pictures, and where to look in each; a few places lie outside."""
    return torch.randn(batch, 3, 12, 12), torch.rand(batch, 6, 6, 2) * 2.2 - 1.1


def rows_and_indices(batch: int) -> tuple[Tensor, Tensor]:
    """Rows of 16 numbers, and 4 different places in each."""
    return torch.randn(batch, 16), torch.stack([torch.randperm(16)[:4] for _ in range(batch)])


# --- steps that do not fit on a line --------------------------------------------------------------------------------


def conv(channels: int, width: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=options.get("dilation", 1), **options)


def head(width: int) -> nn.Sequential:
    """Channels [batch, width, ...] -> [batch, 10]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def excite(net: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Channels weighed by what they hold (Hu et al. 2018, arXiv:1709.01507)."""
    y_BCHW = net.conv(x_BCHW)
    return y_BCHW * net.gate(y_BCHW.mean((2, 3)))[:, :, None, None]


def rope(net: nn.Module, x_BHTd: Tensor) -> Tensor:
    """Rotary positions with sines and cosines (Su et al. 2021, arXiv:2104.09864)."""
    angle_Td = torch.outer(torch.arange(8.0), 100 ** -(torch.arange(8.0) / 8)).repeat(1, 2)
    left, right = net.q(x_BHTd).chunk(2, -1)
    return net.q(x_BHTd) * angle_Td.cos() + torch.cat([-right, left], -1) * angle_Td.sin()


def complex_rope(net: nn.Module, x_BHTd: Tensor) -> Tensor:
    """The same as a product of complex numbers."""
    turn_Td = torch.polar(torch.ones(8, 8), torch.outer(torch.arange(8.0), 100 ** -(torch.arange(8.0) / 8)))
    pairs = torch.view_as_complex(net.q(x_BHTd).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_Td).flatten(-2)


def alibi(net: nn.Module, x_BHTd: Tensor) -> Tensor:
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409)."""
    place = torch.arange(8.0)
    slopes_H11 = 2 ** -(2 * torch.arange(1.0, 5)).reshape(4, 1, 1)
    return F.scaled_dot_product_attention(net.q(x_BHTd), x_BHTd, x_BHTd, attn_mask=-slopes_H11 * (place - place[:, None]).abs())


def sinusoids(net: nn.Module, x_BTD: Tensor) -> Tensor:
    """Positions (Vaswani et al. 2017, arXiv:1706.03762) for as many tokens as come, then attention."""
    angle_TD = torch.arange(x_BTD.shape[1])[:, None] * 100 ** -(torch.arange(8.0) / 8)
    x_BTD = x_BTD + torch.cat([angle_TD.sin(), angle_TD.cos()], -1)
    return ((net.q(x_BTD) @ x_BTD.mT).softmax(-1) @ x_BTD).mean(1)


def masked_mean(net: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    weight_BT1 = mask_BT[:, :, None].float()
    return net.head((net.table(ids_BT) * weight_BT1).sum(1) / weight_BT1.sum(1))


def experts(net: nn.Module, x_BD: Tensor) -> Tensor:
    """Two of four experts a row; all are computed, the others weigh nothing."""
    value, index = net.router(x_BD).softmax(-1).topk(2)
    weight_BE = torch.zeros(x_BD.shape[0], 4).scatter(1, index, value / value.sum(-1, keepdim=True))
    return torch.einsum("be,bd,edo->bo", weight_BE, x_BD, net.experts)


def picked_rows(net: nn.Module, x_BD: Tensor) -> Tensor:
    y = net.head(x_BD)
    return y - y[x_BD[:, 0] > -9].mean(0)


# --- the table ------------------------------------------------------------------------------------------------------

PATTERNS: dict[str, Pattern] = {
    # pictures
    "residual CNN of `models`": Pattern(lambda: models.build(spec.ConvNet(channels=(8, 16)), (3, 12, 12), 10), PICTURE),
    "vision transformer of `models`": Pattern(lambda: models.build(spec.Transformer(name="transformer", dim=16, depth=1, heads=2), (3, 12, 12), 10), PICTURE),
    "conv + batch norm + ReLU, depthwise separable conv": Pattern(
        lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), nn.Conv2d(8, 16, 1), head(16)), PICTURE
    ),
    "dilated and grouped conv": Pattern(lambda: nn.Sequential(conv(3, 8, dilation=2), conv(8, 8, groups=2), head(8)), PICTURE),
    "transposed conv": Pattern(lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), PICTURE),
    "1-d and 3-d conv": Pattern(
        lambda: Net(lambda net, x, y: (net.one(x), net.three(y)), one=nn.Conv1d(8, 8, 3, padding=1), three=nn.Conv3d(2, 4, 3, padding=1)), of((8, 16), (2, 6, 8, 8))
    ),
    "max, average and adaptive pooling": Pattern(
        lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((3, 1)), nn.Flatten(), nn.Linear(24, 10)), PICTURE
    ),
    "squeeze and excitation": Pattern(lambda: Net(excite, conv=conv(3, 8), gate=nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())), PICTURE),
    "pixel shuffle, bilinear upsampling": Pattern(lambda: nn.Sequential(conv(3, 12), nn.PixelShuffle(2), nn.Upsample(scale_factor=2, mode="bilinear")), PICTURE),
    "antialiased resize": Pattern(
        lambda: Net(lambda net, x: F.interpolate(net.conv(x), size=(6, 6), mode="bilinear", antialias=True), conv=conv(3, 4)), PICTURE,
        "Resize: OpenVINO passes over `antialias` without a word, TensorRT refuses it. Resize before the model, or average-pool",
    ),
    "grid sample": Pattern(lambda: Net(lambda net, x, grid: F.grid_sample(net.conv(x), grid, align_corners=False), conv=conv(3, 4)), picture_and_grid),
    # norms and activations
    "LayerNorm, RMSNorm": Pattern(lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.RMSNorm(16)), SEQUENCE),
    "GroupNorm, InstanceNorm": Pattern(lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)), PICTURE),
    "GELU, SiLU, Hardswish, softmax": Pattern(
        lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16), nn.Hardswish(), nn.Softmax(-1)), VECTOR
    ),
    # attention and positions
    "attention (SDPA)": Pattern(lambda: Net(lambda net, x: F.scaled_dot_product_attention(net.q(x), x, x), q=nn.Linear(16, 16)), HEADS),
    "SDPA, causal": Pattern(lambda: Net(lambda net, x: F.scaled_dot_product_attention(net.q(x), x, x, is_causal=True), q=nn.Linear(16, 16)), HEADS),
    "SDPA, boolean mask": Pattern(lambda: Net(lambda net, x, mask: F.scaled_dot_product_attention(net.q(x), x, x, attn_mask=mask), q=nn.Linear(16, 16)), heads_and_mask),
    "SDPA, grouped queries": Pattern(lambda: Net(lambda net, x: F.scaled_dot_product_attention(net.q(x), x[:, :2], x[:, :2], enable_gqa=True), q=nn.Linear(16, 16)), HEADS),
    "SDPA without a dimension of heads": Pattern(
        lambda: Net(lambda net, x: F.scaled_dot_product_attention(net.q(x), x, x), q=nn.Linear(16, 16)), SEQUENCE,
        "the exporter knows it of [batch, heads, tokens, dim] alone: `unsqueeze(1)` before, `squeeze(1)` after",
    ),
    "nn.MultiheadAttention": Pattern(lambda: Net(lambda net, x: net.mha(x, x, x)[0], mha=nn.MultiheadAttention(16, 2, batch_first=True)), SEQUENCE),
    "rotary positions, real": Pattern(lambda: Net(rope, q=nn.Linear(16, 16)), HEADS),
    "rotary positions, complex": Pattern(lambda: Net(complex_rope, q=nn.Linear(16, 16)), HEADS),
    "ALiBi": Pattern(lambda: Net(alibi, q=nn.Linear(16, 16)), HEADS),
    "sinusoids made in forward, any length": Pattern(lambda: Net(sinusoids, q=nn.Linear(16, 16)), sequences_of_any_length, dims=(("tokens", 1, 8, 32),)),
    # sequences, tables and indices
    "LSTM": Pattern(lambda: Net(lambda net, x: net.rnn(x)[0], rnn=nn.LSTM(16, 16, batch_first=True)), of((4, 16))),
    "GRU": Pattern(lambda: Net(lambda net, x: net.rnn(x)[0], rnn=nn.GRU(16, 16, batch_first=True)), of((4, 16))),
    "embedding and masked mean": Pattern(lambda: Net(masked_mean, table=nn.Embedding(50, 16), head=nn.Linear(16, 10)), tokens_and_mask),
    "einsum": Pattern(lambda: Net(lambda net, x: torch.einsum("bti,ij,bsj->bts", x, net.w, x), w=torch.randn(16, 16)), SEQUENCE),
    "top-k": Pattern(lambda: Net(lambda net, x: tuple(net.head(x).topk(3)), head=nn.Linear(16, 10)), VECTOR),
    "gather and scatter": Pattern(lambda: Net(lambda net, x, at: net.head(x).scatter(1, at, x.gather(1, at)), head=nn.Linear(16, 16)), rows_and_indices),
    "scatter_add": Pattern(
        lambda: Net(lambda net, x, at: net.head(x).scatter_add(1, at, x.gather(1, at)), head=nn.Linear(16, 16)), rows_and_indices,
        "ScatterElements with `reduction`. Multiply by a one-hot of the indices, and sum",
    ),
    "cumulative sum": Pattern(lambda: Net(lambda net, x: net.head(x).cumsum(1), head=nn.Linear(16, 10)), SEQUENCE),
    "mixture of experts, 2 of 4": Pattern(lambda: Net(experts, router=nn.Linear(16, 4), experts=torch.randn(4, 16, 10)), VECTOR),
    "FFT": Pattern(
        lambda: Net(lambda net, x: torch.view_as_real(torch.fft.rfft(net.head(x))), head=nn.Linear(16, 16)), VECTOR,
        "DFT: OpenVINO leaves a dimension too many. Multiply by the matrix of the transform",
    ),
    "boolean-mask indexing": Pattern(lambda: Net(picked_rows, head=nn.Linear(16, 10)), VECTOR, "multiply by the mask and divide by its sum"),
    # control flow, inputs and outputs
    "torch.cond": Pattern(lambda: Net(lambda net, x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (net.head(x),)), head=nn.Linear(16, 10)), VECTOR),
    "Python's if on a tensor": Pattern(lambda: Net(lambda net, x: net.head(x) * 2 if x.sum() > 0 else net.head(x) - 1, head=nn.Linear(16, 10)), VECTOR, "`torch.cond`"),
    "the batch as a number": Pattern(
        lambda: Net(lambda net, x: net.head(x).reshape(int(x.shape[0]), 2, 5), head=nn.Linear(16, 10)), VECTOR, "`unflatten`, or `x.shape[0]` without `int`"
    ),
    "several inputs, a dict of outputs": Pattern(
        lambda: Net(lambda net, x, y: {"logits": net.head(x) + net.other(y), "features": x.relu()}, head=nn.Linear(16, 10), other=nn.Linear(4, 10)), of((16,), (4,))
    ),
}
