"""MobileNetV2 of half width for 32x32 images: Sandler et al., CVPR 2018, arXiv:1801.04381, Table 2.

The distillation literature's CIFAR form (CRD, ICLR 2020, arXiv:1910.10699): width 0.5, expansion 6, a stem of stride 2 and
stage strides 1,1,2,2,1,2,1; plain ReLU where the paper has ReLU6, and an expansion convolution also where the factor is 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdrun.student.layers import conv1x1, conv3x3, global_average, init_he

# (expansion, channels at width 1, blocks, stride): Table 2, with the strides of the CIFAR form.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280  # Table 2; the last layer is not narrowed


class InvertedResidual(nn.Module):
    """Expand, filter by depth, project to a linear bottleneck (Fig. 3b)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            conv1x1(in_channels, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv3x3(hidden, hidden, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv1x1(hidden, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """forward: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        super().__init__()
        channels = int(STEM * width)
        last = int(LAST * max(width, 1.0))
        self.conv1 = nn.Sequential(conv3x3(in_channels, channels, stride=2), nn.BatchNorm2d(channels), nn.ReLU())
        stages = []
        for expansion, full, blocks, stride in STAGES:
            stage = []
            for i in range(blocks):
                stage.append(InvertedResidual(channels, int(full * width), stride if i == 0 else 1, expansion))
                channels = int(full * width)
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(conv1x1(channels, last), nn.BatchNorm2d(last), nn.ReLU())
        self.classifier = nn.Linear(last, num_classes)
        init_he(self)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as the CRD benchmark's public code
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(global_average(self.conv2(self.blocks(self.conv1(x)))))


def mobilenetv2(num_classes: int, in_channels: int = 3, width: float = 0.5) -> nn.Module:
    return MobileNetV2(num_classes, width, in_channels)
