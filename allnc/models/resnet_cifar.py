"""ResNets for small images, as in He et al. (CVPR 2016), section 4.2."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadShortcut(nn.Module):
    """Shortcut A: every second pixel, with zero channels around the old ones; no parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (channels_out - channels_in) // 2
        self.padding = (before, channels_out - channels_in - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: Literal["A", "B"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        if stride == 1 and channels_in == channels_out:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(channels_in, channels_out, stride)
        else:
            project = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(residual + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """CIFAR ResNet without its classifier: three stages of n blocks, then the average over pixels.

    Args:
        depth: 6n + 2 layers (8, 20, 32, 44, 56, 110 ...), counting the classifier that is not here.
        width: channels of the first stage; the others have twice and four times as many.
        in_channels: channels of the images.
        shortcut: A (zero padding, the paper's choice on CIFAR) or B (projection) where the shape changes.
        feature_dim: F of a linear layer after the average, >= 1; None: no such layer.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = 16,
        in_channels: int = 3,
        shortcut: Literal["A", "B"] = "A",
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 20, 32, 44, 56 ...); got {depth}")
        blocks = (depth - 2) // 6
        self.num_features = feature_dim or 4 * width
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(channels, width << stage, stride, shortcut))
                channels = width << stage
        self.stages = nn.Sequential(*stages)
        self.reduction = nn.Linear(4 * width, feature_dim) if feature_dim else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images [N, in_channels, H, W] as [N, F], F = feature_dim or 4 width."""
        x = self.stages(F.relu(self.bn(self.conv(images)), inplace=True))
        return self.reduction(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
