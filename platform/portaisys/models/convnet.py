"""A residual CNN for small pictures (He et al. 2016, arXiv:1512.03385, basic blocks)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from portaisys import spec
from portaisys.spec import UserError


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. x_BCHW -> [B, width, H / stride, W / stride]. `stage`: whose width it has."""

    def __init__(self, channels: int, width: int, stride: int, stage: int = 0) -> None:
        super().__init__()
        self.stage = stage
        self.conv1 = _conv(channels, width, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 1)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x_BCHW)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x_BCHW))


def _conv(channels: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, 1, bias=False)


def convnet(options: spec.ConvNet, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Stem, stages of residual blocks, average pool, linear head."""
    if len(shape) != 3:
        raise UserError(f"model.name: convnet takes rows of [channels, height, width]; the data has {shape}")
    stem = options.stem or options.channels[0]
    strides = options.strides or (1, *[2] * (len(options.channels) - 1))
    layers: list[nn.Module] = [_conv(shape[0], stem, options.stem_stride), nn.BatchNorm2d(stem), nn.ReLU()]
    channels = stem
    for stage, (width, depth, stride) in enumerate(zip(options.channels, options.blocks, strides, strict=True)):
        for index in range(depth):
            layers.append(Block(channels, width, 1 if index else stride, stage))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
