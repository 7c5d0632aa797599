from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdrun.errors import Refused
from kdrun.student.build import build
from kdrun.student.segmenter import PyramidPooling, deeplabv3, pspnet, segmenter
from kdrun.student.taps import Tapped, model_spec
from tests.student.composed import node

TINY = "test_resnet"  # timm's own test model: the stem and stages of a ResNet in half a million parameters


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", ["segmenter", "deeplabv3", "pspnet"])
@pytest.mark.parametrize("shape", [(3, 32, 48), (3, 33, 47)])
def test_logits_have_the_size_of_the_image_and_the_map_is_a_tap(name: str, shape: tuple[int, ...]) -> None:
    chosen = node("student", name)
    if name != "segmenter":
        chosen["name"], chosen["width"] = TINY, 16
    network = build(chosen, 7, shape).eval()
    spec = model_spec(network, shape, chosen["taps"])
    assert spec.classes == 7
    assert network(torch.zeros(2, *shape)).shape == (2, 7, *shape[1:])
    reduced = (7, *(-(-size // (1 if name == "segmenter" else 8)) for size in shape[1:]))
    assert spec.taps["map"] == reduced
    assert spec.taps["features"][1:] == reduced[1:]


def test_the_map_before_upsampling_gives_the_logits() -> None:
    network = Tapped(segmenter(5, stride=4), {"map": "map"}, ["map"]).eval()
    logits, taps = network(torch.randn(2, 3, 24, 24))
    assert taps["map"].shape == (2, 5, 6, 6)
    larger = nn.functional.interpolate(taps["map"], size=(24, 24), mode="bilinear", align_corners=False)
    assert torch.equal(logits, larger)
    plain, taps = Tapped(segmenter(5), {"map": "map"}, ["map"]).eval()(torch.randn(2, 3, 24, 24))
    assert torch.equal(plain, taps["map"])


def test_the_small_networks_are_those_of_the_bench() -> None:
    """3x3 convolutions without bias, BatchNorm, a 1x1 head with bias; the teacher's linear map of its maxima."""
    assert parameters(segmenter(5)) == 3 * 12 * 9 + 12 * 12 * 9 + 2 * 2 * 12 + 12 * 5 + 5
    teacher = segmenter(5, width=24, blocks=4, context=True)
    assert parameters(teacher) == 3 * 24 * 9 + 3 * 24 * 24 * 9 + 4 * 2 * 24 + 24 * 24 + 24 + 24 * 5 + 5


def test_context_carries_a_far_corner_to_every_position() -> None:
    for context in (False, True):
        network = segmenter(5, width=8, context=context).eval()
        image = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        other = image.clone()
        other[:, :, :4, :4] += 10
        with torch.no_grad():
            changed = (network(image) - network(other)).abs().sum(1)[0]
        assert bool(changed[12:, 12:].any()) == context
        assert changed[:4, :4].any()


@pytest.mark.parametrize(("stride", "blocks"), [(1, 1), (2, 1), (4, 3), (8, 3)])
def test_strides_make_the_map_smaller(stride: int, blocks: int) -> None:
    spec = model_spec(segmenter(5, blocks=blocks, stride=stride), (3, 24, 32), {"map": "map"})
    assert spec.taps["map"] == (5, 24 // stride, 32 // stride)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"blocks": 0}, "blocks"), ({"width": 0}, "width"), ({"stride": 3}, "stride"), ({"stride": 8, "blocks": 2}, "stride")],
)
def test_networks_that_cannot_be_are_refused(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(Refused) as refused:
        segmenter(5, **arguments)
    assert [p.key for p in refused.value.problems][-1] == key
    assert all(p.remedy for p in refused.value.problems)


def test_published_sizes() -> None:
    """DeepLabV3-MobileNetV2 has 3.2 M parameters in the paper's Table; PSPNet-R18 12.9 M in CIRKD's, with an auxiliary head."""
    with torch.device("meta"):
        assert round(parameters(deeplabv3(19, "mobilenetv2_100", width=128)) / 1e6, 1) == 3.2
        assert 12.5e6 < parameters(pspnet(19, "resnet18")) < 12.9e6


@pytest.mark.parametrize("maker", [deeplabv3, pspnet])
def test_all_parameters_of_a_head_are_used(maker: Any) -> None:
    network = maker(5, TINY, width=16)
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_pyramid_pooling_sees_the_mean_of_the_whole_map() -> None:
    module = PyramidPooling(8, (1, 2)).eval()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    pooled = module(x)
    assert pooled.shape == (2, 16, 4, 4)
    assert torch.equal(pooled[:, :8], x)
    torch.testing.assert_close(pooled[:, 8:12], pooled[:, 8:12, :1, :1].expand(-1, -1, 4, 4))
    assert (pooled[:, 12:, 0, 0] - pooled[:, 12:, 3, 3]).abs().max() > 1e-3
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = module(x.flatten(2)[..., order].unflatten(2, (4, 4)))
    torch.testing.assert_close(shuffled[:, 8:12], pooled[:, 8:12])


@pytest.mark.parametrize("maker", [deeplabv3, pspnet])
def test_an_unknown_backbone_is_refused_with_the_nearest(maker: Any) -> None:
    with pytest.raises(Refused, match="resnet18"):
        maker(5, "resnet1")
