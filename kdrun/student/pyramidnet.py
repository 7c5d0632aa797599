"""PyramidNet for 32x32 images: Han, Kim, Kim, "Deep Pyramidal Residual Networks", CVPR 2017, arXiv:1610.02915.

The additive form (Eq. 2): the channels grow by alpha / N at each of the N residual units, from 16 to 16 + alpha, and a bottleneck puts out
four times as many. A unit begins with a BatchNorm without ReLU and ends with a BatchNorm (Fig. 6d); its shortcut is the identity, averaged
over 2x2 positions where the grid halves, with zeros in the new channels (Sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.student.layers import conv1x1, conv3x3, global_average, init_he

STEM = 16
EXPANSION = 4
STAGES = 3


class PyramidBottleneck(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(width, width * EXPANSION)
        self.bn4 = nn.BatchNorm2d(width * EXPANSION)
        self.stride = stride
        self.new_channels = width * EXPANSION - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu1(self.bn2(self.conv1(self.bn1(x)))))
        out = self.bn4(self.conv3(self.relu2(self.bn3(out))))
        kept = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
        return out + F.pad(kept, (0, 0, 0, 0, 0, self.new_channels))


class PyramidNet(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, depth: int, alpha: int, in_channels: int) -> None:
        super().__init__()
        units = (depth - 2) // 9  # of each stage
        self.conv1 = conv3x3(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        channels = STEM

        def stage(number: int) -> Iterator[nn.Module]:
            nonlocal channels
            for unit in range(units):
                width = round(STEM + alpha * (number * units + unit + 1) / (STAGES * units))
                yield PyramidBottleneck(channels, width, 2 if number > 0 and unit == 0 else 1)
                channels = width * EXPANSION

        self.layer1 = nn.Sequential(*stage(0))
        self.layer2 = nn.Sequential(*stage(1))
        self.layer3 = nn.Sequential(*stage(2))
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(global_average(self.relu(self.bn2(x))))


def pyramidnet(num_classes: int, depth: int, alpha: int, in_channels: int = 3) -> nn.Module:
    """The bottleneck network of any depth 9n+2. Raises `kdrun.errors.Refused` for another depth or a negative alpha."""
    problems = []
    if depth < 11 or (depth - 2) % 9:
        problems.append(Problem(f"a PyramidNet of bottlenecks has depth 9n+2, not {depth}", key="depth", remedy="110, 164, 200, 272, ..."))
    if alpha < 0:
        problems.append(Problem(f"the channels grow by alpha, which is not negative: {alpha}", key="alpha", remedy="240"))
    if problems:
        raise Refused(problems)
    return PyramidNet(num_classes, depth, alpha, in_channels)


def pyramidnet200_240(num_classes: int, in_channels: int = 3) -> nn.Module:
    return pyramidnet(num_classes, 200, 240, in_channels)
