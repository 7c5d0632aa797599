"""ResNeXt-29 for 32x32 images: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, arXiv:1611.05431.

Sec. 5.4: a 3x3 stem with 64 channels and three stages of three bottlenecks with 256, 512 and 1024 output channels; ResNeXt-29, 8x64d has
a grouped convolution of 8 groups of 64 channels in the first stage, which doubles with every stage.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdrun.student.layers import conv1x1, conv3x3, global_average, init_he

STEM = 64
WIDTHS = (256, 512, 1024)  # output of the stages: Sec. 5.4
BLOCKS = 3  # of a stage: 29 = 9 * 3 + 2 layers


class GroupedBottleneck(nn.Module):
    """Fig. 3c. Where the shape changes, the shortcut is a 1x1 convolution with BatchNorm."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + self.downsample(x))


class ResNeXt29(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]. `groups` x `width`: the cardinality and the channels of a group."""

    def __init__(self, num_classes: int, groups: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        channels, inner, stages = STEM, groups * width, list[nn.Module]()
        for out_channels in WIDTHS:
            first = GroupedBottleneck(channels, inner, out_channels, 2 if stages else 1, groups)
            rest = (GroupedBottleneck(out_channels, inner, out_channels, 1, groups) for _ in range(BLOCKS - 1))
            stages.append(nn.Sequential(first, *rest))
            channels, inner = out_channels, 2 * inner
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)
        # as the public code does: github.com/lgcnsai/PS-KD-Pytorch, models/resnext.py
        nn.init.kaiming_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(global_average(x))


def resnext29_8x64d(num_classes: int, in_channels: int = 3) -> nn.Module:
    return ResNeXt29(num_classes, 8, 64, in_channels)
