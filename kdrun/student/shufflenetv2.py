"""ShuffleNetV2 for 32x32 images: Ma et al., ECCV 2018, arXiv:1807.11164, Table 5.

The distillation literature's CIFAR form (CRD, ICLR 2020, arXiv:1910.10699): a 1x1 stem without stride or max-pooling.
Initialised as torch does by default, like the public code.

The ReLU at the end of a unit stands after the concatenation and the shuffle. That is the same function as in the paper, where it
stands on the branch alone: the other half has been through a ReLU before. But so a stage has ONE pre-activation map, in the
channel order of its output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.student.layers import conv1x1, conv3x3, global_average, shuffle_channels

STEM = 24
BLOCKS = (4, 8, 4)  # Table 5
WIDTHS = {  # stages 2, 3, 4 and the last convolution, by width multiplier: Table 5
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
}


class SplitUnit(nn.Module):
    """Fig. 3c: half of the channels pass, half go through the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(out)))))
        out = self.bn3(self.conv3(out))
        return self.relu2(shuffle_channels(torch.cat([passed, out], dim=1), 2))


class DownUnit(nn.Module):
    """Fig. 3d: both branches see all channels and halve the grid."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = conv3x3(in_channels, in_channels, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(self.relu1(self.bn3(self.conv3(x)))))
        right = self.bn5(self.conv5(right))
        return self.relu2(shuffle_channels(torch.cat([left, right], dim=1), 2))


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, out_channels), *(SplitUnit(out_channels) for _ in range(blocks - 1)))


class ShuffleNetV2(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, widths: tuple[int, int, int, int], in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(STEM, widths[0], BLOCKS[0])
        self.layer2 = _stage(widths[0], widths[1], BLOCKS[1])
        self.layer3 = _stage(widths[1], widths[2], BLOCKS[2])
        self.conv2 = conv1x1(widths[2], widths[3])
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(global_average(self.relu2(self.bn2(self.conv2(x)))))


def shufflenetv2(num_classes: int, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """`width`: the multiplier of the channels, a key of WIDTHS. Raises `kdrun.errors.Refused` for another."""
    if float(width) not in WIDTHS:
        raise Refused(Problem(f"no ShuffleNetV2 of width {width}", key="width", remedy=did_you_mean(str(width), map(str, WIDTHS))))
    return ShuffleNetV2(num_classes, WIDTHS[float(width)], in_channels)
