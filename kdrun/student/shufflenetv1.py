"""ShuffleNet for 32x32 images: Zhang et al., CVPR 2018, arXiv:1707.01083, Table 1 with g = 3 groups.

The distillation literature's CIFAR form (CRD, ICLR 2020, arXiv:1910.10699): a 1x1 stem without stride or max-pooling, and a ReLU
after the depthwise convolution, which the paper leaves out. Initialised as torch does by default, like the public code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdrun.student.layers import conv1x1, conv3x3, global_average, shuffle_channels

STEM = 24
STAGES = ((240, 4), (480, 8), (960, 4))  # (channels, blocks) for g = 3: Table 1
GROUPS = 3


class ShuffleUnit(nn.Module):
    """Fig. 2b, and 2c where `stride` is 2: the pooled input is concatenated, so the branch gives the missing channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        hidden = branch // 4
        self.groups = 1 if in_channels == STEM else groups  # Sec. 3.2: the first layer has too few channels to be grouped
        self.conv1 = conv1x1(in_channels, hidden, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(hidden, hidden, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(hidden, branch, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle_channels(self.relu1(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + x if self.pool is None else torch.cat([out, self.pool(x)], dim=1))


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    first = ShuffleUnit(in_channels, out_channels, 2, GROUPS)
    return nn.Sequential(first, *(ShuffleUnit(out_channels, out_channels, 1, GROUPS) for _ in range(blocks - 1)))


class ShuffleNet(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        (wide1, blocks1), (wide2, blocks2), (wide3, blocks3) = STAGES
        self.conv1 = conv1x1(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage(STEM, wide1, blocks1)
        self.layer2 = _stage(wide1, wide2, blocks2)
        self.layer3 = _stage(wide2, wide3, blocks3)
        self.fc = nn.Linear(wide3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(global_average(self.layer3(self.layer2(self.layer1(x)))))


def shufflenetv1(num_classes: int, in_channels: int = 3) -> nn.Module:
    return ShuffleNet(num_classes, in_channels)
