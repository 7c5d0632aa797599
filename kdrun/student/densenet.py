"""DenseNet-121 for 32x32 images: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, arXiv:1608.06993, Table 1.

The CIFAR form of the self-distillation literature (github.com/lgcnsai/PS-KD-Pytorch, models/densenet_cifar.py): a 3x3 stem of stride 1
without BatchNorm or max-pooling. Initialised as torch does by default, like the public code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.student.layers import conv1x1, conv3x3, global_average

BLOCKS = (6, 12, 24, 16)  # Table 1, DenseNet-121
GROWTH = 32  # new channels of a layer: Table 1
BOTTLENECK = 4  # channels before the 3x3 convolution, in growths: Sec. 3, "bottleneck layers"
COMPRESSION = 0.5  # of a transition: Sec. 3, "compression"


class DenseLayer(nn.Module):
    """[B, C, H, W] -> [B, C + GROWTH, H, W]: the input with GROWTH new channels behind it."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(in_channels, BOTTLENECK * GROWTH)
        self.bn2 = nn.BatchNorm2d(BOTTLENECK * GROWTH)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(BOTTLENECK * GROWTH, GROWTH)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return torch.cat([x, new], dim=1)


class Transition(nn.Module):
    """Between two dense blocks: fewer channels, half the grid."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv = conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(self.relu(self.bn(x))), 2)


class DenseNet121(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels, stages, transitions = 2 * GROWTH, list[nn.Module](), list[nn.Module]()
        self.conv1 = conv3x3(in_channels, channels)
        for layers in BLOCKS:
            if stages:
                transitions.append(Transition(channels, int(channels * COMPRESSION)))
                channels = int(channels * COMPRESSION)
            stages.append(nn.Sequential(*(DenseLayer(channels + i * GROWTH) for i in range(layers))))
            channels += layers * GROWTH
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.transition1, self.transition2, self.transition3 = transitions
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.layer1(self.conv1(x)))
        x = self.transition3(self.layer3(self.transition2(self.layer2(x))))
        return self.fc(global_average(self.relu(self.bn(self.layer4(x)))))


def densenet121(num_classes: int, in_channels: int = 3) -> nn.Module:
    return DenseNet121(num_classes, in_channels)
