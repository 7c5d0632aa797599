"""ResNet-50 with a stem for 32x32 images: He et al., CVPR 2016, arXiv:1512.03385, Table 1.

The distillation literature's CIFAR form (CRD, ICLR 2020, arXiv:1910.10699): a 3x3 stem of stride 1 without max-pooling. As there,
the stride of a stage is in the 3x3 convolution of its first bottleneck.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdrun.student.layers import conv1x1, conv3x3, global_average, init_he

BLOCKS = (3, 4, 6, 3)  # Table 1
WIDTHS = (64, 128, 256, 512)  # Table 1
EXPANSION = 4


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + self.downsample(x))


def _stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(width * EXPANSION, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(in_channels, width, stride), *rest)


class ResNet50(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], BLOCKS[0], 1)
        self.layer2 = _stage(WIDTHS[0] * EXPANSION, WIDTHS[1], BLOCKS[1], 2)
        self.layer3 = _stage(WIDTHS[1] * EXPANSION, WIDTHS[2], BLOCKS[2], 2)
        self.layer4 = _stage(WIDTHS[2] * EXPANSION, WIDTHS[3], BLOCKS[3], 2)
        self.fc = nn.Linear(WIDTHS[3] * EXPANSION, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(global_average(x))


def resnet50(num_classes: int, in_channels: int = 3) -> nn.Module:
    return ResNet50(num_classes, in_channels)
