"""Pieces that several of the small convolutional networks share."""

from __future__ import annotations

from torch import Tensor, nn


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, groups=groups, bias=False)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def global_average(maps: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C]. A mean and not a fixed window, so that the networks take 8x8 digits as well as 32x32 images."""
    return maps.mean(dim=(2, 3))


def shuffle_channels(maps: Tensor, groups: int) -> Tensor:
    """[B, C, H, W] -> the same with the channels of the `groups` interleaved (ShuffleNet, CVPR 2018, arXiv:1707.01083, Sec. 3.1)."""
    return maps.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def init_he(network: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out) (He et al., ICCV 2015, arXiv:1502.01852, Eq. 14), their biases 0, BatchNorm 1 and 0.

    Draws from the global torch RNG. Linear layers are left as they are: the families differ there.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
