"""Pre-activation ResNets for 32x32 images: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv:1603.05027.

The CIFAR form of the self-distillation literature (github.com/lgcnsai/PS-KD-Pytorch, models/preact_resnet.py): widths and depths of the
ImageNet networks, a 3x3 stem of stride 1 with BatchNorm and ReLU, and no BatchNorm between the last stage and the mean over positions.
Initialised as torch does by default, like the public code. That code's ResNet-101 has post-activation bottlenecks although the paper's
tables call it a pre-activation one; here it is what the tables call it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from kdrun.student.layers import conv1x1, conv3x3, global_average
from kdrun.student.wrn import PreActivationBlock

WIDTHS = (64, 128, 256, 512)  # He et al., CVPR 2016, Table 1
EXPANSION = 4  # of a bottleneck


class PreActivationBottleneck(nn.Module):
    """Fig. 4e with a bottleneck's convolutions. Where the shape changes, the shortcut is a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(in_channels, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv3 = conv1x1(width, out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = conv1x1(in_channels, out_channels, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out = self.conv3(self.relu3(self.bn3(out)))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class PreActivationResNet(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(
        self, num_classes: int, blocks: tuple[int, ...], block: Callable[[int, int, int], nn.Module], expansion: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        channels, stages = WIDTHS[0], list[nn.Module]()
        for width, count in zip(WIDTHS, blocks, strict=True):
            first = block(channels, width, 2 if stages else 1)
            channels = width * expansion
            stages.append(nn.Sequential(first, *(block(channels, width, 1) for _ in range(count - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(global_average(x))


def preact_resnet18(num_classes: int, in_channels: int = 3) -> nn.Module:
    return PreActivationResNet(num_classes, (2, 2, 2, 2), PreActivationBlock, 1, in_channels)


def preact_resnet101(num_classes: int, in_channels: int = 3) -> nn.Module:
    return PreActivationResNet(num_classes, (3, 4, 23, 3), PreActivationBottleneck, EXPANSION, in_channels)
