"""Object detectors: torchvision's RetinaNet and Faster R-CNN, spoken to in tensors and with the levels of their pyramid as taps.

RetinaNet: Lin et al., ICCV 2017, arXiv 1708.02002. Faster R-CNN: Ren et al., NeurIPS 2015, arXiv 1506.01497. Both stand on a
feature pyramid (FPN: Lin et al., CVPR 2017, arXiv 1612.03144). As in torchvision the mode decides what a forward returns:

in training     losses [B, 2]: what the classes and what the boxes of an image cost, by torchvision's own losses of that image
in evaluation   detections [B, D, 6]: rows (x1, y1, x2, y2, score, class), best first, with -1 everywhere in the rows left over

Boxes are in pixels of the input, which is taken as it comes: resizing and normalising are the data set's. An image's losses do not
depend on the other images of its batch (with FrozenBatchNorm, `frozen_norm`), so a batch can be split. The weights have
torchvision's names: its RetinaNet loads them with as many classes, its FasterRCNN with one more, the background.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.models.detection import faster_rcnn as torchvision_faster_rcnn
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from kdrun import rng
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.losses.precision import widen, without_autocast
from kdrun.student.layers import conv3x3, init_he

PLAIN = "plain"  # the one backbone that is ours
RESNETS = ("resnet*", "resnext*", "wide_resnet*")  # among the names of torchvision
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # the parts of a backbone, from the end; bn1 goes with conv1
ANCHORS = (32, 64, 128, 256, 512)  # side in pixels for each level: both papers
RATIOS = (0.5, 1.0, 2.0)  # height / width: both papers
OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # scales of RetinaNet's anchors at each level: its Sec. 4
COLUMNS = 6  # of a detection
WIDTH = 256  # channels of the pyramid in both papers


class PlainBody(nn.Module):
    """A small backbone for small images: a stem and four stages of one 3x3 convolution each, all of stride 2."""

    def __init__(self, norm_layer: Any, width: int = 16) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        self.inplanes = widths[-1]
        self.conv1 = _stage(3, widths[0], norm_layer)
        for i in range(1, 5):
            self.add_module(f"layer{i}", _stage(widths[i - 1], widths[i], norm_layer))
        init_he(self)


def _stage(before: int, after: int, norm_layer: Any) -> nn.Sequential:
    return nn.Sequential(conv3x3(before, after, 2), norm_layer(after), nn.ReLU())


class Pyramid(BackboneWithFPN):
    """Backbone and feature pyramid. `levels.0`, the finest, and so on are where the maps pass that the heads see: the taps."""

    def __init__(self, body: nn.Module, stages: Sequence[int], width: int, extra: ExtraFPNBlock, count: int) -> None:
        channels = [body.inplanes // 2 ** (4 - stage) for stage in stages]
        super().__init__(body, {f"layer{stage}": str(i) for i, stage in enumerate(stages)}, channels, width, extra)
        self.levels = nn.ModuleList(nn.Identity() for _ in range(count))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        # Widened, because anchors and boxes take their precision from the maps: pixels beyond 256 do not fit into bfloat16.
        maps = zip(self.levels, super().forward(x).items(), strict=True)
        return OrderedDict((name, level(widen(values))) for level, (name, values) in maps)


class _AsTheyAre(nn.Module):
    """In the place of torchvision's transform, which would resize and normalise again."""

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        return _listed(images), targets

    def postprocess(self, found: Any, *sizes: Any) -> Any:
        return found


def _listed(images: Tensor) -> ImageList:
    height, width = images.shape[-2:]
    return ImageList(images, [(height, width)] * len(images))


class RetinaNet(torchvision_retinanet.RetinaNet):
    """torchvision's RetinaNet of classes 0 .. C - 1, one sigmoid each; see the module for what goes in and out."""

    def __init__(self, backbone: Pyramid, num_classes: int, anchor_sizes: Sequence[int], **kwargs: Any) -> None:
        sizes = tuple(tuple(int(side * octave) for octave in OCTAVE) for side in anchor_sizes)
        super().__init__(backbone, num_classes, anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)), **kwargs)
        self.transform = _AsTheyAre()
        if backbone.out_channels < WIDTH:  # the papers' N(0, 0.01^2) is made for WIDTH channels: in narrower towers the signal dies away
            for head in (self.head.classification_head, self.head.regression_head):
                init_he(head.conv)

    @property
    def takes(self) -> tuple[str, ...]:
        return ("boxes", "labels") if self.training else ()

    def forward(self, x: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W]; in training also boxes [B, M, 4] and labels [B, M], -1 where a row holds no object to be found."""
        if not self.training:
            return _rows(super().forward(x), self.detections_per_img)
        losses = super().forward(x, _truth(boxes, labels))
        return torch.stack([losses["classification"], losses["bbox_regression"]], 1)

    def compute_loss(self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
        """torchvision's loss of each image [B], where torchvision has their mean."""
        each = [
            super(RetinaNet, self).compute_loss([target], {name: widen(v[i : i + 1]) for name, v in head_outputs.items()}, [anchors[i]])
            for i, target in enumerate(targets)
        ]
        return {name: torch.stack([losses[name] for losses in each]) for name in each[0]}

    def postprocess_detections(self, head_outputs: dict[str, list[Tensor]], anchors: Any, image_shapes: Any) -> list[dict[str, Tensor]]:
        wide = {name: [widen(level) for level in levels] for name, levels in head_outputs.items()}
        return super().postprocess_detections(wide, anchors, image_shapes)


class CountedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of boxes to learn from, its draws a function of the image's key and not of what was drawn before."""

    def __init__(self, like: BalancedPositiveNegativeSampler, purpose: str) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self._key = rng.key(0, purpose)
        self.image: Tensor | int = 0  # the key of the image at hand, [] int64; torchvision's forward has no place for it

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, given the labels of its boxes [N]: which positive (1 and more) and which negative (0) are taken, bool [N]."""
        positive, negative = [], []
        for labels in matched_idxs:
            draws = rng.uniform(self._key, self.image, torch.arange(len(labels), device=labels.device))
            positive.append(_first(labels >= 1, draws, int(self.batch_size_per_image * self.positive_fraction)))
            negative.append(_first(labels == 0, draws, self.batch_size_per_image - int(positive[-1].sum())))
        return positive, negative


def _first(among: Tensor, draws: Tensor, count: int) -> Tensor:
    """Those `count` that drew the smallest numbers."""
    places = torch.where(among)[0]
    taken = torch.zeros_like(among)
    taken[places[draws[places].argsort(stable=True)[:count]]] = True
    return taken


class FasterRCNN(torchvision_faster_rcnn.FasterRCNN):
    """torchvision's Faster R-CNN of classes 0 .. C - 1 (and the background inside); see the module for what goes in and out.

    The losses of an image are those of its proposals together with those of its detections. `draw` [B] int64 keys the choice of
    the boxes that are learned from. Both stages run in float32, whatever the backbone runs in.
    """

    def __init__(self, backbone: Pyramid, num_classes: int, anchor_sizes: Sequence[int], **kwargs: Any) -> None:
        anchors = AnchorGenerator(tuple((side,) for side in anchor_sizes), (RATIOS,) * len(anchor_sizes))
        super().__init__(backbone, num_classes + 1, rpn_anchor_generator=anchors, **kwargs)
        for stage, purpose in ((self.rpn, "anchors"), (self.roi_heads, "proposals")):
            stage.fg_bg_sampler = CountedSampler(stage.fg_bg_sampler, purpose)

    @property
    def takes(self) -> tuple[str, ...]:
        return ("boxes", "labels", "draw") if self.training else ()

    def forward(self, x: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None, draw: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W]; in training also boxes [B, M, 4], labels [B, M], -1 where a row holds no object to be found, draw [B]."""
        features, images = self.backbone(x), _listed(x)
        with without_autocast(x):
            if self.training:
                truth = _truth(boxes, labels)
                each = [self._losses(features, x, i, target, draw) for i, target in enumerate(truth)]
                return torch.stack(each)
            proposals, _ = self.rpn(images, features)
            found, _ = self.roi_heads(features, proposals, images.image_sizes)
        return _rows([{**image, "labels": image["labels"] - 1} for image in found], self.roi_heads.detections_per_img)

    def _losses(self, features: dict[str, Tensor], x: Tensor, i: int, target: dict[str, Tensor], draw: Tensor | None) -> Tensor:
        """(classes, boxes) [2] of image i: torchvision's losses of a batch of this image alone."""
        assert draw is not None
        self.rpn.fg_bg_sampler.image = self.roi_heads.fg_bg_sampler.image = draw[i]
        image, own = _listed(x[i : i + 1]), {name: maps[i : i + 1] for name, maps in features.items()}
        shifted = [{**target, "labels": target["labels"] + 1}]
        proposals, first = self.rpn(image, own, shifted)
        _, second = self.roi_heads(own, proposals, image.image_sizes, shifted)
        classes = first["loss_objectness"] + second["loss_classifier"]
        return torch.stack([classes, first["loss_rpn_box_reg"] + second["loss_box_reg"]])


def _truth(boxes: Tensor | None, labels: Tensor | None) -> list[dict[str, Tensor]]:
    """The objects of each image as torchvision takes them."""
    assert boxes is not None
    assert labels is not None
    return [{"boxes": b[c >= 0], "labels": c[c >= 0]} for b, c in zip(boxes, labels, strict=True)]


def _rows(found: list[dict[str, Tensor]], size: int) -> Tensor:
    """torchvision's detections as one tensor [B, size, 6]."""
    rows = found[0]["boxes"].new_full((len(found), size, COLUMNS), -1.0)
    for row, image in zip(rows, found, strict=True):
        values = torch.cat([image["boxes"], image["scores"][:, None], image["labels"][:, None]], 1)
        row[: len(values)] = values
    return rows


def retinanet(
    num_classes: int,
    name: str = "resnet50",
    pretrained_backbone: bool = False,
    width: int = WIDTH,
    trainable_layers: int | None = None,
    frozen_norm: bool | None = None,
    anchor_sizes: Sequence[int] = ANCHORS,
    detections: int = 100,
) -> nn.Module:
    """RetinaNet on torchvision's ResNet `name`, with levels P3 to P7 of `width` channels; at most `detections` of an image are kept.

    The last `trainable_layers` of the backbone's five parts are trained. `frozen_norm`: fixed statistics and affine parameters in
    the backbone's BatchNorm. None is torchvision's rule for both: 3 and fixed on a pretrained backbone, else all and BatchNorm.
    Raises `kdrun.errors.Refused` for a backbone that there is not or whose weights cannot be had.
    """
    body = _body(name, pretrained_backbone, frozen_norm, trainable_layers)
    _check_anchors(anchor_sizes)
    pyramid = Pyramid(body, (2, 3, 4), width, LastLevelP6P7(width, width), len(ANCHORS))
    return RetinaNet(pyramid, num_classes, anchor_sizes, detections_per_img=detections)


def faster_rcnn(
    num_classes: int,
    name: str = "resnet50",
    pretrained_backbone: bool = False,
    width: int = WIDTH,
    trainable_layers: int | None = None,
    frozen_norm: bool | None = None,
    anchor_sizes: Sequence[int] = ANCHORS,
    detections: int = 100,
) -> nn.Module:
    """Faster R-CNN on torchvision's ResNet `name`, with levels P2 to P6 of `width` channels; otherwise as `retinanet`."""
    body = _body(name, pretrained_backbone, frozen_norm, trainable_layers)
    _check_anchors(anchor_sizes)
    pyramid = Pyramid(body, (1, 2, 3, 4), width, LastLevelMaxPool(), len(ANCHORS))
    return FasterRCNN(pyramid, num_classes, anchor_sizes, box_detections_per_img=detections)


def _check_anchors(sizes: Sequence[int]) -> None:
    if len(sizes) != len(ANCHORS) or min(sizes) < 1:
        what = f"{list(sizes)}, where the pyramid has {len(ANCHORS)} levels"
        raise Refused(Problem(what, key="anchor_sizes", remedy=f"a side in pixels for each, e.g. anchor_sizes={list(ANCHORS)}"))


def _body(name: str, pretrained: bool, frozen_norm: bool | None, trainable_layers: int | None) -> nn.Module:
    """The backbone with its first parts frozen."""
    frozen_norm = pretrained if frozen_norm is None else frozen_norm
    trainable_layers = (3 if pretrained else len(STAGES)) if trainable_layers is None else trainable_layers
    norm = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
    if not 0 <= trainable_layers <= len(STAGES):
        raise Refused(Problem(f"a backbone has 5 parts, not {trainable_layers}", key="trainable_layers", remedy="from 0 to 5"))
    body = PlainBody(norm) if name == PLAIN else _resnet(name, pretrained, norm)
    trained = (*STAGES[:trainable_layers], *(["bn1"] if trainable_layers == len(STAGES) else []))
    for parameter_name, parameter in body.named_parameters():
        if not parameter_name.startswith(trained):
            parameter.requires_grad_(False)
    return body


def _resnet(name: str, pretrained: bool, norm: Any) -> nn.Module:
    known = list_models(module=torchvision.models, include=RESNETS)
    if name not in known:
        raise Refused(Problem(f"torchvision has no ResNet {name!r}", key="name", remedy=did_you_mean(name, [*known, PLAIN])))
    try:
        return get_model(name, weights="IMAGENET1K_V1" if pretrained else None, norm_layer=norm)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        what = f"torchvision's weights of {name} cannot be had: {error}"
        remedy = "pretrained_backbone=false, or a network to fetch them from"
        raise Refused(Problem(what, key="pretrained_backbone", remedy=remedy)) from error
