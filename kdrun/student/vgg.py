"""VGG networks with BatchNorm for 32x32 images: Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556, Table 1.

The distillation literature's CIFAR form (CRD, ICLR 2020, arXiv:1910.10699): five blocks, max-pooling after the first three
only, so that the last two share a 4x4 grid; the mean over positions and a single linear layer; "vgg8" has one convolution a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.student.layers import global_average, init_he

WIDTHS = (64, 128, 256, 512, 512)  # Simonyan and Zisserman 2015, Table 1


def _block(in_channels: int, out_channels: int, convs: int) -> nn.Sequential:
    """Convolutions with BatchNorm and ReLU, but for the last ReLU: the block's value is its pre-activation."""
    layers: list[nn.Module] = []
    for i in range(convs):
        layers += [
            nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """forward: [B, in_channels, H, W] with H, W >= 8 -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, convs: Sequence[int], in_channels: int) -> None:
        super().__init__()
        self.block0 = _block(in_channels, WIDTHS[0], convs[0])
        self.relu0 = nn.ReLU()
        self.block1 = _block(WIDTHS[0], WIDTHS[1], convs[1])
        self.relu1 = nn.ReLU()
        self.block2 = _block(WIDTHS[1], WIDTHS[2], convs[2])
        self.relu2 = nn.ReLU()
        self.block3 = _block(WIDTHS[2], WIDTHS[3], convs[3])
        self.relu3 = nn.ReLU()
        self.block4 = _block(WIDTHS[3], WIDTHS[4], convs[4])
        self.relu4 = nn.ReLU()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        init_he(self)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as the CRD benchmark's public code
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu0(self.block0(x)))
        x = self.pool(self.relu1(self.block1(x)))
        x = self.pool(self.relu2(self.block2(x)))
        x = self.relu4(self.block4(self.relu3(self.block3(x))))
        return self.classifier(global_average(x))


def vgg(num_classes: int, convs: Sequence[int], in_channels: int = 3) -> nn.Module:
    """The network with this many convolutions in each of the five blocks. Raises `kdrun.errors.Refused` for another number of blocks."""
    if len(convs) != len(WIDTHS) or min(convs) < 1:
        what = f"needs five numbers of convolutions, each at least 1, not {list(convs)}"
        raise Refused(Problem(what, key="convs", remedy="[2, 2, 2, 2, 2]"))
    return VGG(num_classes, convs, in_channels)


def vgg8(num_classes: int, in_channels: int = 3) -> nn.Module:
    return vgg(num_classes, (1, 1, 1, 1, 1), in_channels)


def vgg11(num_classes: int, in_channels: int = 3) -> nn.Module:
    return vgg(num_classes, (1, 1, 2, 2, 2), in_channels)


def vgg13(num_classes: int, in_channels: int = 3) -> nn.Module:
    return vgg(num_classes, (2, 2, 2, 2, 2), in_channels)


def vgg16(num_classes: int, in_channels: int = 3) -> nn.Module:
    return vgg(num_classes, (2, 2, 3, 3, 3), in_channels)


def vgg19(num_classes: int, in_channels: int = 3) -> nn.Module:
    return vgg(num_classes, (2, 2, 4, 4, 4), in_channels)
