"""ResNets of basic blocks whose stages have depths of their own: the candidates of an architecture search.

The space S1 of DisWOT (Dong, Li, Wei, CVPR 2023, arXiv 2303.15678) has these networks with widths 16-16-32-64 and stage depths
1, 3, 5 or 7. With three equal depths n it is the ResNet of depth 6n+2 of `kdrun.student.resnet`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.student.resnet import NARROW, SHORTCUTS, ResNet


def stage_resnet(
    num_classes: int, depths: Sequence[int], widths: Sequence[int] = NARROW, in_channels: int = 3, shortcut: str = "conv"
) -> nn.Module:
    """`depths`: blocks of the three stages (strides 1, 2, 2). `widths`: channels of the stem and of the stages.

    Raises `kdrun.errors.Refused` for numbers that make no network.
    """
    problems = []
    if len(depths) != 3 or min(depths) < 1:
        problems.append(Problem(f"needs the blocks of three stages, at least 1 each, not {list(depths)}", key="depths", remedy="[1, 3, 5]"))
    if len(widths) != 4 or min(widths) < 1:
        problems.append(Problem(f"needs four widths (stem, three stages), not {list(widths)}", key="widths", remedy=f"{list(NARROW)}"))
    if shortcut not in SHORTCUTS:
        problems.append(Problem(f"unknown shortcut {shortcut!r}", key="shortcut", remedy=did_you_mean(shortcut, SHORTCUTS)))
    if problems:
        raise Refused(problems)
    return ResNet(num_classes, depths, widths, in_channels, shortcut)
