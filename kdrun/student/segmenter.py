"""Segmentation networks: images [B, C, H, W] to logits [B, num_classes, H, W], with the class map before upsampling as tap `map`.

`segmenter` is a small plain network for small images. `deeplabv3` (Chen et al. 2017, arXiv 1706.05587) and `pspnet` (Zhao et al.,
CVPR 2017, arXiv 1612.01105) put their heads on the last features of any timm network, dilated to an output stride of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.student.layers import conv1x1, conv3x3
from kdrun.student.timm import create

STRIDES = (1, 2, 4, 8)
DROPOUT = 0.1  # before the class map, as in the public code of both heads


def _upsampled(maps: Tensor, like: Tensor) -> Tensor:
    """Maps at the height and width of the input, bilinear."""
    return maps if maps.shape[2:] == like.shape[2:] else F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv3x3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels), nn.ReLU())


class PlainSegmenter(nn.Module):
    """Blocks of 3x3 convolution, BatchNorm and ReLU, then a 1x1 convolution to the class map.

    `context`: a linear map of the global maximum of each channel is added at every position before the class map.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, strides: Sequence[int], context: bool) -> None:
        super().__init__()
        widths = [in_channels, *[width] * len(strides)]
        self.blocks = nn.Sequential(*(_block(a, b, s) for a, b, s in zip(widths, widths[1:], strides, strict=False)))
        self.context = nn.Linear(width, width) if context else None
        self.map = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(x)
        if self.context is not None:
            features = features + self.context(features.amax((2, 3)))[:, :, None, None]
        return _upsampled(self.map(features), x)


class BackboneSegmenter(nn.Module):
    """A backbone's last features, a head on them, the class map, upsampling."""

    def __init__(self, backbone: nn.Module, head: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.map = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return _upsampled(self.map(self.head(self.backbone(x)[-1])), x)


class PyramidPooling(nn.Module):
    """PSPNet's module: the features beside their means over grids of several sizes.  [B, C, H, W] -> [B, 2C, H, W]."""

    def __init__(self, channels: int, bins: Sequence[int]) -> None:
        super().__init__()
        each = channels // len(bins)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv1x1(channels, each), nn.BatchNorm2d(each), nn.ReLU()) for size in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(_upsampled(level(x), x) for level in self.levels)], 1)


def segmenter(
    num_classes: int, in_channels: int = 3, width: int = 12, blocks: int = 2, context: bool = False, stride: int = 1
) -> nn.Module:
    """`blocks` blocks of `width` channels; the first of them halve the map until it is `stride` times smaller than the image.

    Raises `kdrun.errors.Refused` for no block, no channel, or a stride that so many blocks do not reach.
    """
    problems = [
        Problem(f"at least 1, not {value}", key=key, remedy=f"{key}={good}")
        for key, value, good in (("width", width, 12), ("blocks", blocks, 2))
        if value < 1
    ]
    if stride not in STRIDES or stride.bit_length() - 1 > blocks:
        what = f"{blocks} blocks cannot make a map {stride} times smaller"
        problems.append(Problem(what, key="stride", remedy=f"one of {list(STRIDES)}, with a block for each halving"))
    if problems:
        raise Refused(problems)
    halving = stride.bit_length() - 1
    return PlainSegmenter(num_classes, in_channels, width, [2] * halving + [1] * (blocks - halving), context)


def deeplabv3(
    num_classes: int,
    name: str = "resnet18",
    in_chans: int = 3,
    pretrained_backbone: bool = False,
    width: int = 256,
    rates: Sequence[int] = (12, 24, 36),
    output_stride: int = 8,
) -> nn.Module:
    """DeepLabV3 on the timm network `name`: torchvision's atrous pyramid of `width` channels, a 3x3 block, the class map.

    Raises `kdrun.errors.Refused` for a backbone that timm does not know or whose pretrained weights cannot be had.
    """
    from torchvision.models.segmentation.deeplabv3 import ASPP

    backbone, channels = _backbone(name, in_chans, pretrained_backbone, output_stride)
    head = nn.Sequential(ASPP(channels, list(rates), width), _block(width, width), nn.Dropout(DROPOUT))
    return BackboneSegmenter(backbone, head, width, num_classes)


def pspnet(
    num_classes: int,
    name: str = "resnet18",
    in_chans: int = 3,
    pretrained_backbone: bool = False,
    width: int = 128,
    bins: Sequence[int] = (1, 2, 3, 6),
    output_stride: int = 8,
) -> nn.Module:
    """PSPNet on the timm network `name`: pooling over grids of `bins` cells a side, a 3x3 block of `width` channels, the class map.

    Raises `kdrun.errors.Refused` as `deeplabv3`.
    """
    backbone, channels = _backbone(name, in_chans, pretrained_backbone, output_stride)
    pooled = channels + channels // len(bins) * len(bins)
    head = nn.Sequential(PyramidPooling(channels, bins), _block(pooled, width), nn.Dropout(DROPOUT))
    return BackboneSegmenter(backbone, head, width, num_classes)


def _backbone(name: str, in_chans: int, pretrained: bool, output_stride: int) -> tuple[nn.Module, int]:
    """timm's network without its classifier, and the channels of its last features."""
    try:
        network = create(name, 0, in_chans, pretrained, features_only=True, output_stride=output_stride, out_indices=(-1,))
    except Refused as refused:
        raise Refused([_of_backbone(p) for p in refused.problems]) from refused
    return network, int(network.feature_info.channels()[-1])  # type: ignore[operator, union-attr]


def _of_backbone(problem: Problem) -> Problem:
    """The problem of a whole model, said of the backbone: a file with weights is one of the whole segmentation network here."""
    if problem.key != "pretrained":
        return problem
    return Problem(problem.what, "pretrained_backbone", problem.where, "pretrained_backbone=false, or a network to download them with")
