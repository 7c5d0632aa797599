"""The networks of PS-KD's CIFAR-100 table: sizes as published, and what each family is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdrun.errors import Refused
from kdrun.student.build import build
from kdrun.student.densenet import DenseLayer
from kdrun.student.preact_resnet import PreActivationBottleneck
from kdrun.student.pyramidnet import PyramidBottleneck, pyramidnet
from kdrun.student.taps import Tapped, model_spec
from tests.student.composed import node

# Millions of parameters for so many classes, and who says so.
PUBLISHED = {
    "resnext29_8x64d": (10, 34.4, "Xie et al., CVPR 2017, Table 7"),
    "pyramidnet200_240": (100, 26.8, "Yun et al., CutMix, ICCV 2019, Table 5"),
    "densenet121": (10, 7.0, "github.com/kuangliu/pytorch-cifar"),
    "preact_resnet18": (10, 11.2, "github.com/kuangliu/pytorch-cifar"),
}
SMALL = ["preact_resnet18", "densenet121"]
ALL = [*PUBLISHED, "preact_resnet101"]


def on_meta(name: str, classes: int) -> nn.Module:
    with torch.device("meta"):
        return build(node("student", name), classes, (3, 32, 32))


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_the_published_one(name: str) -> None:
    classes, millions, _ = PUBLISHED[name]
    assert round(sum(p.numel() for p in on_meta(name, classes).parameters()) / 1e6, 1) == millions


def test_sizes_are_those_of_the_public_code_but_for_the_stem_s_norm() -> None:
    """kuangliu/pytorch-cifar has 11,171,146 and 6,956,298; PS-KD's stem of the first has a BatchNorm of 64 channels more."""
    assert sum(p.numel() for p in on_meta("preact_resnet18", 10).parameters()) == 11_171_146 + 2 * 64
    assert sum(p.numel() for p in on_meta("densenet121", 10).parameters()) == 6_956_298


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("preact_resnet18", 17), ("preact_resnet101", 100), ("densenet121", 120), ("resnext29_8x64d", 28), ("pyramidnet200_240", 199)],
)
def test_depth_is_the_one_in_the_name(name: str, convolutions: int) -> None:
    """The last layer is the linear one; shortcuts are not counted."""
    layers = [n for n, m in on_meta(name, 10).named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n and "downsample" not in n]
    assert len(layers) == convolutions


@pytest.mark.parametrize("name", ALL)
def test_other_image_sizes_and_channels_are_taken(name: str) -> None:
    with torch.device("meta"):
        network = build(node("student", name), 7, (1, 8, 8))
    for size in (8, 28, 64):
        assert model_spec(network, (1, size, size), {}).classes == 7


@pytest.mark.parametrize("name", SMALL)
def test_forward_returns_logits_and_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = build(node("student", name), 5, (3, 16, 16))
    logits = network(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_pooled_is_what_the_classifier_sees(name: str) -> None:
    chosen = node("student", name)
    network = build(chosen, 5, (3, 16, 16)).eval()
    logits, taps = Tapped(network, chosen["taps"], ["pooled"])(torch.randn(2, 3, 16, 16))
    assert torch.equal(network.get_submodule("fc")(taps["pooled"]), logits)


def test_no_network_writes_in_place() -> None:
    for name in ALL:
        assert not any(getattr(module, "inplace", False) for module in on_meta(name, 10).modules())


def test_a_dense_layer_keeps_what_it_was_given() -> None:
    x = torch.randn(2, 8, 4, 4)
    out = DenseLayer(8)(x)
    assert out.shape == (2, 40, 4, 4)
    assert torch.equal(out[:, :8], x)


def test_a_pre_activation_bottleneck_is_the_identity_without_its_branch() -> None:
    torch.manual_seed(0)
    block = PreActivationBottleneck(64, 16, 1)
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 64, 4, 4)
    assert block.shortcut is None
    assert torch.equal(block(x), x)


def test_a_pre_activation_shortcut_sees_the_activated_input() -> None:
    torch.manual_seed(0)
    block = PreActivationBottleneck(8, 4, 2).eval()
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 8, 4, 4)
    assert block.shortcut is not None
    assert torch.equal(block(x), block.shortcut(F.relu(block.bn1(x))))


def test_a_pyramidal_shortcut_averages_and_pads_with_zeros() -> None:
    torch.manual_seed(0)
    block = PyramidBottleneck(6, 4, 2).eval()
    nn.init.zeros_(block.bn4.weight)
    x = torch.randn(2, 6, 5, 5)
    out = block(x)
    assert out.shape == (2, 16, 3, 3)
    assert torch.equal(out[:, :6], F.avg_pool2d(x, 2, ceil_mode=True))
    assert not out[:, 6:].any()


def test_pyramid_widths_grow_linearly() -> None:
    with torch.device("meta"):
        network = pyramidnet(10, 29, 90)
    widths = [m.conv1.out_channels for m in network.modules() if isinstance(m, PyramidBottleneck)]
    assert widths == [26, 36, 46, 56, 66, 76, 86, 96, 106]


def test_illegal_shapes_are_refused_all_at_once() -> None:
    with pytest.raises(Refused, match=r"depth 9n\+2, not 100") as caught:
        pyramidnet(10, 100, -1)
    assert [p.key for p in caught.value.problems] == ["depth", "alpha"]
