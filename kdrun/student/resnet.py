"""ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, Sec. 4.2.

Depth 6n+2: a 3x3 stem and three stages of n basic blocks. The knowledge distillation literature trains them on CIFAR-100 with a
projection (1x1 convolution and BatchNorm) wherever the shape changes, and knows two wider ones, "x4" (Tian et al., "Contrastive
Representation Distillation", ICLR 2020, arXiv:1910.10699, Sec. 4). The original paper's CIFAR-10 networks use identity shortcuts
with zero-padded channels (its option A): ``shortcut="pad"``.

No ReLU works in place: the input of a stage's last ReLU, its pre-activation, is a feature that objectives tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.student.layers import conv1x1, conv3x3, global_average, init_he

NARROW = (16, 16, 32, 64)  # stem and stages; He et al. 2016, Sec. 4.2
WIDE = (32, 64, 128, 256)  # the "x4" networks of CRD, ICLR 2020
SHORTCUTS = ("conv", "pad")


class PadShortcut(nn.Module):
    """Option A of He et al.: subsample the positions, fill the new channels with zeros; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(out_channels - in_channels, stride)
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(shortcut, in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.downsample(x))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]. `blocks` of each of the three stages."""

    def __init__(self, num_classes: int, blocks: Sequence[int], widths: Sequence[int], in_channels: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], blocks[0], 1, shortcut)
        self.layer2 = _stage(widths[1], widths[2], blocks[1], 2, shortcut)
        self.layer3 = _stage(widths[2], widths[3], blocks[2], 2, shortcut)
        self.fc = nn.Linear(widths[3], num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(global_average(x))


def resnet(num_classes: int, depth: int, widths: Sequence[int] = NARROW, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    """The network of any depth 6n+2. `widths`: channels of the stem and of the three stages.

    Raises `kdrun.errors.Refused` for another depth, number of widths or shortcut.
    """
    problems = []
    if depth < 8 or (depth - 2) % 6:
        problems.append(Problem(f"a ResNet of basic blocks has depth 6n+2, not {depth}", key="depth", remedy="8, 14, 20, 32, 56, ..."))
    if len(widths) != 4:
        problems.append(Problem(f"needs four widths (stem, three stages), not {len(widths)}", key="widths", remedy=f"{list(NARROW)}"))
    if shortcut not in SHORTCUTS:
        problems.append(Problem(f"unknown shortcut {shortcut!r}", key="shortcut", remedy=did_you_mean(shortcut, SHORTCUTS)))
    if problems:
        raise Refused(problems)
    return ResNet(num_classes, [(depth - 2) // 6] * 3, widths, in_channels, shortcut)


def resnet8(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 8, NARROW, in_channels, shortcut)


def resnet14(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 14, NARROW, in_channels, shortcut)


def resnet20(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 20, NARROW, in_channels, shortcut)


def resnet32(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 32, NARROW, in_channels, shortcut)


def resnet44(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 44, NARROW, in_channels, shortcut)


def resnet56(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 56, NARROW, in_channels, shortcut)


def resnet110(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 110, NARROW, in_channels, shortcut)


def resnet8x4(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 8, WIDE, in_channels, shortcut)


def resnet32x4(num_classes: int, in_channels: int = 3, shortcut: str = "conv") -> nn.Module:
    return resnet(num_classes, 32, WIDE, in_channels, shortcut)
