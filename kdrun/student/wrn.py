"""Wide residual networks: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146, Table 1.

WRN-d-k: depth d = 6n+4, three stages of n pre-activation blocks with 16k, 32k and 64k channels, no dropout. Where the width
changes, the shortcut is a 1x1 convolution of the activated input, without BatchNorm; elsewhere the identity of the raw input.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.student.layers import conv1x1, conv3x3, global_average, init_he


class PreActivationBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = conv1x1(in_channels, out_channels, stride) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class WideResNet(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, depth: int, width: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.layer1 = _stage(16, 16 * width, blocks, 1)
        self.layer2 = _stage(16 * width, 32 * width, blocks, 2)
        self.layer3 = _stage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        init_he(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(global_average(self.relu(self.bn1(x))))


def wrn(num_classes: int, depth: int, width: int, in_channels: int = 3) -> nn.Module:
    """WRN-`depth`-`width`. Raises `kdrun.errors.Refused` if the depth is not 6n+4 or the width is not positive."""
    problems = []
    if depth < 10 or (depth - 4) % 6:
        problems.append(Problem(f"a wide residual network has depth 6n+4, not {depth}", key="depth", remedy="10, 16, 22, 28, 40, ..."))
    if width < 1:
        problems.append(Problem(f"the widening factor is a positive integer, not {width}", key="width"))
    if problems:
        raise Refused(problems)
    return WideResNet(num_classes, depth, width, in_channels)


def wrn_16_1(num_classes: int, in_channels: int = 3) -> nn.Module:
    return wrn(num_classes, 16, 1, in_channels)


def wrn_16_2(num_classes: int, in_channels: int = 3) -> nn.Module:
    return wrn(num_classes, 16, 2, in_channels)


def wrn_40_1(num_classes: int, in_channels: int = 3) -> nn.Module:
    return wrn(num_classes, 40, 1, in_channels)


def wrn_40_2(num_classes: int, in_channels: int = 3) -> nn.Module:
    return wrn(num_classes, 40, 2, in_channels)
