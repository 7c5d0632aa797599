"""The networks are those of the CIFAR-100 protocol: parameter counts and feature shapes of the public reference code.

References: github.com/HobbitLong/RepDistiller and github.com/megvii-research/mdistiller, 100 classes, inputs 3x32x32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdrun.errors import Refused
from kdrun.student.build import build
from kdrun.student.layers import shuffle_channels
from kdrun.student.resnet import PadShortcut, resnet, resnet8, resnet20
from kdrun.student.shufflenetv2 import SplitUnit, shufflenetv2
from kdrun.student.taps import Tapped, model_spec
from kdrun.student.vgg import vgg
from kdrun.student.wrn import wrn, wrn_16_1
from tests.student.composed import node, options

NARROW = [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64
WIDE = [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)], 256
WRN_2 = [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)], 128
VGG = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)], 512
# name: parameters, ([f0, f1, ...], width of pooled)
TABLE = {
    "resnet8": (83_892, NARROW),
    "resnet14": (181_108, NARROW),
    "resnet20": (278_324, NARROW),
    "resnet32": (472_756, NARROW),
    "resnet44": (667_188, NARROW),
    "resnet56": (861_620, NARROW),
    "resnet110": (1_736_564, NARROW),
    "resnet8x4": (1_233_540, WIDE),
    "resnet32x4": (7_433_860, WIDE),
    "wrn_16_1": (180_916, NARROW),
    "wrn_16_2": (703_284, WRN_2),
    "wrn_40_1": (569_780, NARROW),
    "wrn_40_2": (2_255_156, WRN_2),
    "vgg8": (3_965_028, VGG),
    "vgg11": (9_277_284, VGG),
    "vgg13": (9_462_180, VGG),
    "vgg16": (14_774_436, VGG),
    "vgg19": (20_086_692, VGG),
    "resnet50": (23_705_252, ([(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)], 2048)),
    "mobilenetv2": (812_836, ([(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)], 1280)),
    "shufflenetv1": (949_258, ([(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4)], 960)),
    "shufflenetv2": (1_355_528, ([(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4)], 1024)),
    "stage_resnet": (83_892, NARROW),
    # github.com/lgcnsai/PS-KD-Pytorch; see test_ps_kd_networks.py
    "preact_resnet18": (11_217_444, ([(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)], 512)),
    "preact_resnet101": (42_685_732, ([(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)], 2048)),
    "densenet121": (7_048_548, ([(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (1024, 4, 4)], 1024)),
    "resnext29_8x64d": (34_518_948, ([(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8)], 1024)),
    "pyramidnet200_240": (26_844_952, ([(16, 32, 32), (384, 32, 32), (704, 16, 16), (1024, 8, 8)], 1024)),
}
SMALL = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


def on_meta(name: str, classes: int = 100, input_shape: tuple[int, ...] = (3, 32, 32)) -> tuple[nn.Module, dict[str, str]]:
    chosen = node("student", name)
    with torch.device("meta"):
        return build(chosen, classes, input_shape), chosen["taps"]


def test_the_table_has_every_network_with_a_configuration_of_its_own() -> None:
    graphs, dense = {"gcn", "sage", "gat"}, {"segmenter", "deeplabv3", "pspnet", "retinanet", "faster_rcnn"}
    texts = {"causal_lm", "window_lm", "sum_policy"}
    others = {"mlp", "timm", "custom", "denoiser_mlp", "denoiser_unet", "generator_mlp", "generator_unet", *graphs, *dense, *texts}
    assert set(TABLE) == set(options("student")) - others


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_features_are_those_of_the_reference(name: str) -> None:
    parameters, (features, pooled) = TABLE[name]
    network, taps = on_meta(name)
    assert sum(p.numel() for p in network.parameters()) == parameters
    spec = model_spec(network, (3, 32, 32), taps)
    assert spec.classes == 100
    wanted = {f"f{i}": shape for i, shape in enumerate(features)}
    wanted |= {f"p{i}": shape for i, shape in enumerate(features) if i > 0}
    assert spec.taps == wanted | {"pooled": (pooled,)}


@pytest.mark.parametrize("name", [*SMALL, "resnet50"])
def test_other_image_sizes_and_channels_are_taken(name: str) -> None:
    network, taps = on_meta(name, 7, (1, 8, 8))
    for size in (8, 28, 64):
        assert model_spec(network, (1, size, size), taps).classes == 7


@pytest.mark.parametrize("name", SMALL)
def test_forward_returns_logits_alone_and_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = build(node("student", name), 5, (3, 16, 16))
    logits = network(torch.randn(4, 3, 16, 16))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (4, 5)
    # Squared: the sum of logits alone has no gradient through a BatchNorm that is followed by linear layers only.
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "vgg8", "shufflenetv1", "shufflenetv2"])
def test_a_stage_is_the_relu_of_its_pre_activation(name: str) -> None:
    torch.manual_seed(0)
    chosen = node("student", name)
    tapped = Tapped(build(chosen, 5, (3, 16, 16)), chosen["taps"], chosen["taps"])
    _, taps = tapped(torch.randn(2, 3, 16, 16))
    stages = [key for key in taps if key.startswith("p") and key != "pooled"]
    assert len(stages) >= 3
    for stage in stages:
        assert (taps[stage] < 0).any()
        assert torch.equal(F.relu(taps[stage]), taps["f" + stage[1:]])


def test_a_wrn_pre_activation_is_the_stage_through_the_batchnorm_that_follows() -> None:
    torch.manual_seed(0)
    network = wrn_16_1(5)
    chosen = node("student", "wrn_16_1")
    _, taps = Tapped(network, chosen["taps"], chosen["taps"])(torch.randn(4, 3, 16, 16))
    for stage, norm in (("1", network.layer2[0].bn1), ("2", network.layer3[0].bn1), ("3", network.bn1)):
        f = taps["f" + stage]
        assert (f < 0).any()  # raw
        torch.testing.assert_close(taps["p" + stage], F.batch_norm(f, None, None, norm.weight, norm.bias, training=True))


def test_pooled_is_what_the_classifier_sees() -> None:
    for name in SMALL:
        chosen = node("student", name)
        network = build(chosen, 5, (3, 16, 16)).eval()
        logits, taps = Tapped(network, chosen["taps"], ["pooled"])(torch.randn(2, 3, 16, 16))
        assert torch.equal(list(network.children())[-1](taps["pooled"]), logits)


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    x = torch.randn(2, 16, 9, 9)
    out = PadShortcut(16, 2)(x)
    zeros = torch.zeros(2, 8, 5, 5)
    assert torch.equal(out, torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1))


def test_option_a_networks_have_the_parameters_of_the_original_paper() -> None:
    # He et al. 2016, Table 6: 0.27M, 0.46M, 0.85M for 10 classes
    for depth, millions in ((20, 0.27), (32, 0.46), (56, 0.85)):
        parameters = sum(p.numel() for p in resnet(10, depth, shortcut="pad").parameters())
        assert round(parameters / 1e6, 2) == millions


def test_the_late_relu_of_shufflenetv2_is_the_function_of_the_paper() -> None:
    torch.manual_seed(0)
    unit = SplitUnit(8)
    x = torch.randn(2, 8, 4, 4).relu()  # what a unit before it gives
    kept, out = x[:, :4], x[:, 4:]
    out = unit.bn2(unit.conv2(unit.bn1(unit.conv1(out)).relu()))
    expected = shuffle_channels(torch.cat([kept, unit.bn3(unit.conv3(out)).relu()], dim=1), 2)
    assert torch.equal(unit(x), expected)


def test_channel_shuffle_interleaves_the_groups() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle_channels(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert shuffle_channels(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_initialisation_is_he_fan_out_and_follows_the_global_seed() -> None:
    torch.manual_seed(1)
    network = resnet20(10)
    torch.manual_seed(1)
    again = resnet20(10)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))
    weight = network.get_submodule("layer3.2.conv2").weight
    # 36,864 draws: the standard error of their standard deviation is 0.4 % of it
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_no_network_writes_in_place() -> None:
    for name in [*SMALL, "resnet50"]:
        assert not any(getattr(module, "inplace", False) for module in on_meta(name)[0].modules())


def test_illegal_shapes_of_a_family_are_refused_all_at_once() -> None:
    with pytest.raises(Refused, match=r"depth 6n\+2, not 21") as caught:
        resnet(10, 21, widths=(16, 32), shortcut="cnov")
    assert [p.key for p in caught.value.problems] == ["depth", "widths", "shortcut"]
    assert "did you mean conv?" in caught.value.problems[2].remedy
    with pytest.raises(Refused, match=r"depth 6n\+4, not 20"):
        wrn(10, 20, 1)
    with pytest.raises(Refused, match="widening factor"):
        wrn(10, 16, 0)
    with pytest.raises(Refused, match="five numbers"):
        vgg(10, (1, 1))
    with pytest.raises(Refused, match=r"no ShuffleNetV2 of width 0\.7"):
        shufflenetv2(10, width=0.7)
    with pytest.raises(Refused, match="unknown shortcut 'None'"):
        resnet8(10, shortcut="None")
