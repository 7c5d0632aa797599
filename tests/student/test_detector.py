from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kdrun.dataset.shapes import ShapesData
from kdrun.errors import Refused
from kdrun.evaluation.cost import flops
from kdrun.evaluation.detection import DetectionMeter
from kdrun.student.build import build
from kdrun.student.detector import CountedSampler, faster_rcnn, retinanet
from kdrun.student.taps import Tapped, model_spec
from kdrun.student.weights import save_student
from kdrun.types import Batch
from tests.student.composed import node

SMALL: dict[str, Any] = {"name": "plain", "width": 8, "frozen_norm": True, "anchor_sizes": [8, 16, 32, 64, 128]}
DETECTORS: dict[str, Callable[..., nn.Module]] = {"retinanet": retinanet, "faster_rcnn": faster_rcnn}
PLAIN_TRANSFORM: dict[str, Any] = {"min_size": 64, "max_size": 64, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def small(kind: str, **values: Any) -> nn.Module:
    torch.manual_seed(0)
    return DETECTORS[kind](4, **{**SMALL, **values})


@pytest.fixture(scope="module")
def batch() -> Batch:
    index = torch.arange(6)
    found = ShapesData(n_train=6, n_test=1, flip=0.0).load().rows("train", index, torch.zeros_like(index), seed=0)
    found.targets[2] = -1  # an image without objects
    return found._replace(extra={**found.extra, "labels": found.targets, "draw": 1000 + index})


def truth(batch: Batch, shift: int = 0) -> list[dict[str, Tensor]]:
    return [{"boxes": b[c >= 0], "labels": c[c >= 0] + shift} for b, c in zip(batch.extra["boxes"], batch.targets, strict=True)]


def losses(network: nn.Module, batch: Batch, rows: slice = slice(None)) -> Tensor:
    return network(batch.inputs[rows], **{name: batch.extra[name][rows] for name in network.takes})  # type: ignore[union-attr]


def in_torchvision(name: str, weights: dict[str, Tensor], backbone: str = "resnet18") -> nn.Module:
    """The detector as a user of plain torchvision builds it."""
    if name == "retinanet":
        pyramid = resnet_fpn_backbone(
            backbone_name=backbone, weights=None, trainable_layers=5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
        )
        network: nn.Module = detection.RetinaNet(pyramid, num_classes=4, detections_per_img=100, **PLAIN_TRANSFORM)
    else:
        pyramid = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
        network = detection.FasterRCNN(pyramid, num_classes=5, **PLAIN_TRANSFORM)
    network.load_state_dict(weights)
    return network


def in_pairs(name: str, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """Ours, and torchvision's with the weights that we export."""
    torch.manual_seed(0)
    ours = DETECTORS[name](4, name="resnet18", frozen_norm=True)
    with torch.no_grad():
        for module in ours.modules():  # statistics of no network, so that it is seen whether they travel
            if hasattr(module, "running_var"):
                module.running_var.fill_(2.0)  # type: ignore[union-attr, operator]
        if name == "retinanet":
            ours.head.classification_head.cls_logits.bias.fill_(-2.0)  # type: ignore[union-attr, operator]
    save_student(ours, tmp_path / "student.safetensors")
    return ours, in_torchvision(name, load_file(tmp_path / "student.safetensors"))


@pytest.mark.parametrize("name", DETECTORS)
def test_an_exported_detector_loads_in_plain_torchvision_and_finds_the_same(name: str, tmp_path: Path, batch: Batch) -> None:
    ours, theirs = in_pairs(name, tmp_path)
    with torch.no_grad():
        found, other = ours.eval()(batch.inputs[:1]), theirs.eval()(list(batch.inputs[:1]))
    assert found.shape == (1, 100, 6)
    for rows, image in zip(found, other, strict=True):
        rows = rows[rows[:, 5] >= 0]
        assert len(rows) == len(image["boxes"]) > 5
        torch.testing.assert_close(rows[:, :4], image["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(rows[:, 4], image["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(rows[:, 5].long(), image["labels"] - int(name == "faster_rcnn"))


def test_the_losses_of_a_retinanet_are_torchvisions(tmp_path: Path, batch: Batch) -> None:
    ours, theirs = in_pairs("retinanet", tmp_path)
    found, other = losses(ours, batch).mean(0), theirs(list(batch.inputs), truth(batch))
    torch.testing.assert_close(found, torch.stack([other["classification"], other["bbox_regression"]]), rtol=1e-5, atol=1e-6)


def test_the_losses_of_a_faster_rcnn_are_torchvisions_with_the_same_boxes_drawn(tmp_path: Path, batch: Batch) -> None:
    ours, theirs = in_pairs("faster_rcnn", tmp_path)
    samplers = [(stage, getattr(ours, stage).fg_bg_sampler) for stage in ("rpn", "roi_heads")]
    found = losses(ours, batch, slice(1, 3))
    for i, target in enumerate(truth(batch, shift=1)[1:3], start=1):
        for stage, sampler in samplers:
            sampler.image = batch.extra["draw"][i]
            getattr(theirs, stage).fg_bg_sampler = sampler
        other = theirs([batch.inputs[i]], [target])
        classes, boxes = other["loss_classifier"] + other["loss_objectness"], other["loss_box_reg"] + other["loss_rpn_box_reg"]
        torch.testing.assert_close(found[i - 1], torch.stack([classes, boxes]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_an_image_costs_the_same_in_every_batch(name: str, batch: Batch) -> None:
    network = small(name)
    whole = losses(network, batch)
    assert whole.shape == (6, 2)
    assert torch.isfinite(whole).all()
    assert whole[2, 1] == 0  # no object, no box to be wrong about
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        torch.testing.assert_close(losses(network, batch, rows), whole[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_rows_without_a_class_count_for_nothing(name: str, batch: Batch) -> None:
    network = small(name)
    spoilt = batch.extra["boxes"].clone()
    spoilt[batch.targets < 0] = torch.tensor([3.0, 3.0, 1.0, 1.0])
    other = batch._replace(extra={**batch.extra, "boxes": spoilt})
    assert torch.equal(losses(network, other), losses(network, batch))


@pytest.mark.parametrize("name", DETECTORS)
def test_every_trained_parameter_gets_a_gradient_and_the_first_parts_none(name: str, batch: Batch) -> None:
    network = small(name, trainable_layers=3)
    losses(network, batch).sum().backward()
    idle = {n for n, p in network.named_parameters() if p.grad is None}
    assert idle == {n for n in dict(network.named_parameters()) if n.startswith(("backbone.body.conv1", "backbone.body.layer1"))}
    assert [sum(p.requires_grad for p in small(name, trainable_layers=k).parameters()) for k in (0, 5)] == [
        len(list(network.parameters())) - 5,
        len(list(network.parameters())),
    ]


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_pretrained_backbone_is_frozen_as_in_torchvision_and_another_is_not(pretrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.student.detector.get_model", lambda name, weights, norm_layer: resnet18(norm_layer=norm_layer))
    network = retinanet(4, name="resnet18", pretrained_backbone=pretrained)
    frozen = {name.split(".")[2] for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == ({"conv1", "layer1"} if pretrained else set())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) is not pretrained


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_finite_at_extreme_scores(name: str, size: float, dtype: torch.dtype, batch: Batch) -> None:
    network = small(name)
    head = network.head.classification_head.cls_logits if name == "retinanet" else network.rpn.head.cls_logits  # type: ignore[union-attr]
    nn.init.constant_(head.bias, size)  # type: ignore[union-attr, arg-type]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = losses(network, batch, slice(0, 2)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "finest"), [("retinanet", 8), ("faster_rcnn", 16)])
def test_taps_are_the_levels_of_the_pyramid(name: str, finest: int, batch: Batch) -> None:
    chosen = node("student", name)
    network = build({**chosen, **SMALL}, 4, (3, 64, 64), reserved={"speaks"})
    spec = model_spec(network, (3, 64, 64), chosen["taps"])
    assert spec.taps == {f"fpn{i}": (8, *[max(1, finest // 2**i)] * 2) for i in range(5)}
    tapped = Tapped(network, chosen["taps"], chosen["taps"])
    _, taps = tapped(batch.inputs, batch.extra)
    for level, expected in zip(taps.values(), network.backbone(batch.inputs).values(), strict=True):  # type: ignore[operator, union-attr]
        assert torch.equal(level, expected)
    sum(level.square().sum() for level in taps.values()).backward()  # type: ignore[union-attr]
    assert network.backbone.body.layer4[0].weight.grad.abs().sum() > 0  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize("name", DETECTORS)
def test_evaluation_needs_no_truth_and_gives_rows_in_the_image(name: str, batch: Batch) -> None:
    network = small(name, detections=7).eval()
    assert network.takes == ()
    if name == "retinanet":
        nn.init.zeros_(network.head.classification_head.cls_logits.bias)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        found = network(batch.inputs)
    assert found.shape == (6, 7, 6)
    there = found[..., 5] >= 0
    assert there.any()
    assert (found[~there] == -1).all()
    assert found[there][:, :4].min() >= 0
    assert found[there][:, :4].max() <= 64
    assert set(found[there][:, 5].tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert (found[..., 4].diff(dim=1) <= 0).all()  # best first


@pytest.mark.parametrize("name", DETECTORS)
def test_lower_precision_in_the_backbone_keeps_the_pixels_of_the_boxes(name: str, batch: Batch) -> None:
    network = small(name)
    exact = losses(network, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = losses(network, batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_draws_are_a_function_of_the_image() -> None:
    sampler = CountedSampler(detection.FasterRCNN(small("faster_rcnn").backbone, num_classes=5).rpn.fg_bg_sampler, "anchors")  # type: ignore[arg-type]
    labels = torch.tensor([1.0] * 200 + [0.0] * 900 + [-1.0] * 50)
    drawn = []
    for image in (1, 1, 2):
        sampler.image = torch.tensor(image)
        (positive,), (negative,) = sampler([labels])
        assert (int(positive.sum()), int(negative.sum())) == (128, 128)
        assert (labels[positive] == 1).all()
        assert (labels[negative] == 0).all()
        drawn.append(positive | negative)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    (positive,), (negative,) = sampler([labels[150:300]])
    assert (int(positive.sum()), int(negative.sum())) == (50, 100)  # all that there are


@pytest.mark.parametrize(
    ("values", "key"),
    [({"name": "resnet51"}, "name"), ({"anchor_sizes": [8, 16]}, "anchor_sizes"), ({"trainable_layers": 6}, "trainable_layers")],
)
def test_arguments_that_cannot_be_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(Refused) as refused:
        small("retinanet", **values)
    assert refused.value.problems[0].key == key
    assert refused.value.problems[0].remedy


def test_weights_that_cannot_be_fetched_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **values: Any) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr("kdrun.student.detector.get_model", offline)
    with pytest.raises(Refused, match="pretrained_backbone=false"):
        retinanet(4, name="resnet18", pretrained_backbone=True)


def test_the_parameters_are_those_of_torchvisions_detectors() -> None:
    """As its documentation of the weights for 91 COCO categories states them."""
    with torch.device("meta"):
        assert sum(p.numel() for p in retinanet(91, frozen_norm=True).parameters()) == 34_014_999
        assert sum(p.numel() for p in faster_rcnn(90, frozen_norm=True).parameters()) == 41_755_286


def test_a_detector_learns_to_find_what_it_is_shown(batch: Batch) -> None:
    network = small("retinanet", width=16, frozen_norm=False)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3)
    for _ in range(120):
        optimizer.zero_grad()
        losses(network, batch).mean(0).sum().backward()
        optimizer.step()
    meter = DetectionMeter("cpu")
    with torch.no_grad():
        meter.add(network.eval()(batch.inputs), batch)
    assert meter.compute()["map_50"] > 80


@pytest.mark.parametrize("width", [16, 256])
def test_heads_begin_as_torchvisions_and_narrow_ones_so_that_the_signal_passes(width: int) -> None:
    torch.manual_seed(0)
    head = retinanet(4, name="plain", width=width).head.regression_head  # type: ignore[union-attr]
    assert head.bbox_reg.weight.std().item() == pytest.approx(0.01, rel=0.05)  # type: ignore[union-attr, operator]
    expected = 0.01 if width == 256 else (2 / (9 * width)) ** 0.5
    assert head.conv[0][0].weight.std().item() == pytest.approx(expected, rel=0.05)  # type: ignore[union-attr, index, operator]


def test_what_a_detector_costs_is_counted_as_it_is_used() -> None:
    assert flops(small("retinanet"), (3, 64, 64)) > 1e6
