"""Taps are values: returned, compiled, never corrupted, never left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Refused
from kdrun.student.build import build
from kdrun.student.resnet import resnet8, resnet20
from kdrun.student.taps import Tapped, model_spec, tap_shapes
from tests.student.composed import node

TAPS = {"f3": "layer3", "p3": "layer3.-1.relu2@in", "pooled": "fc@in"}
FAMILIES = {  # smallest of each, with the smallest image that leaves BatchNorm something to normalise
    "resnet8": (3, 8, 8),
    "wrn_16_1": (3, 8, 8),
    "vgg8": (3, 16, 16),
    "mobilenetv2": (3, 32, 32),
    "shufflenetv1": (3, 16, 16),
    "shufflenetv2": (3, 16, 16),
    "mlp": (12,),
}


class InPlace(nn.Module):
    """What foreign networks do: an in-place ReLU after a BatchNorm, an in-place residual after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(x))
        y = self.conv(x)
        y += x
        return self.fc(y.mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    logits, taps = module(x)
    (logits.sum() + sum(tap.square().sum() for tap in taps.values())).backward()
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return logits.detach(), {name: tap.detach() for name, tap in taps.items()}, found


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_taps_equal_eager_taps(name: str) -> None:
    chosen, shape = node("student", name), FAMILIES[name]
    tapped = Tapped(build(chosen, 5, shape), chosen["taps"], chosen["taps"])
    compiled = torch.compile(tapped, fullgraph=True, backend="eager")
    x = torch.randn(4, *shape)
    logits, taps, grads = gradients(tapped, x)
    logits_c, taps_c, grads_c = gradients(compiled, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)
    assert set(taps_c) == set(taps) == set(chosen["taps"])
    assert torch.equal(logits_c, logits)
    assert all(torch.equal(taps_c[tap], taps[tap]) for tap in taps)
    assert all(torch.equal(a, b) for a, b in zip(grads_c, grads, strict=True))


@pytest.mark.parametrize("make", [lambda: resnet8(5), InPlace])
def test_taps_survive_functionalisation(make: type[nn.Module]) -> None:
    network = make()
    tapped = Tapped(network, {}, ["bn", "act@in"] if isinstance(network, InPlace) else ["bn1", "layer3.-1.relu2@in"])
    compiled = torch.compile(tapped, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    expected, got = gradients(tapped, x), gradients(compiled, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_tap_is_not_changed_by_what_the_network_does_in_place_afterwards() -> None:
    network = InPlace()
    x = torch.randn(4, 3, 8, 8)
    _, taps = Tapped(network, {}, ["bn", "act@in", "conv", "fc@in"])(x)
    normed = F.batch_norm(x, None, None, network.bn.weight, network.bn.bias, training=True)
    convolved = F.conv2d(normed.relu(), network.conv.weight, network.conv.bias)
    assert (normed < 0).any()
    torch.testing.assert_close(taps["bn"], normed)
    torch.testing.assert_close(taps["act@in"], normed)
    torch.testing.assert_close(taps["conv"], convolved)
    torch.testing.assert_close(taps["fc@in"], (convolved + normed.relu()).mean(dim=(2, 3)))


def test_taps_do_not_change_logits_or_gradients() -> None:
    network, x = resnet8(5), torch.randn(4, 3, 8, 8)
    network(x).sum().backward()
    plain = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    Tapped(network, TAPS, TAPS)(x)[0].sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), plain, strict=True))


def test_only_the_taps_asked_for_are_hooked() -> None:
    network = resnet8(5)
    tapped = Tapped(network, TAPS | {"stale": "layer9"}, ["pooled"])
    hooks = [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == [network.fc]
    assert list(tapped(torch.randn(2, 3, 8, 8))[1]) == ["pooled"]
    assert Tapped(resnet8(5), TAPS)(torch.randn(2, 3, 8, 8))[1] == {}


def test_aliases_and_module_paths_may_be_asked_for() -> None:
    network, x = resnet20(5).eval(), torch.randn(2, 3, 8, 8)
    _, taps = Tapped(network, TAPS, ["f3", "layer3", "layer3.2", "layer3.-1", "layer2.-3.conv1@in"])(x)
    assert torch.equal(taps["f3"], taps["layer3"])
    assert torch.equal(taps["layer3.-1"], taps["layer3.2"])
    assert torch.equal(taps["layer2.-3.conv1@in"], network.layer1(network.relu(network.bn1(network.conv1(x)))))


def test_a_module_that_runs_twice_gives_its_last_value() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x) - 1)

    _, taps = Tapped(Twice(), {}, ["act@in"])(torch.tensor([[3.0]]))
    assert taps["act@in"].item() == 2


def test_the_bare_network_keeps_its_names_and_leaves_nothing_behind() -> None:
    network = resnet8(5)
    names = list(network.state_dict())
    tapped = Tapped(network, TAPS, TAPS)
    assert list(tapped.module.state_dict()) == names
    tapped.module(torch.randn(2, 3, 8, 8))
    tapped(torch.randn(2, 3, 8, 8))
    assert tapped._box.taken is None


def test_a_copy_taps_itself() -> None:
    tapped = Tapped(resnet8(5), TAPS, ["pooled"])
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(tapped), pickle.loads(pickle.dumps(tapped))):
        with torch.no_grad():
            other.module.conv1.weight.mul_(2)
            other.module.bn1.bias.add_(1)
        _, taps = other(x)
        assert not torch.equal(taps["pooled"], tapped(x)[1]["pooled"])
        assert torch.equal(other.module.fc(taps["pooled"]), other(x)[0])


def test_an_unknown_tap_is_refused_with_the_nearest_aliases_and_paths() -> None:
    network = resnet8(5)
    with pytest.raises(Refused, match="unknown tap 'poled' of ResNet") as caught:
        Tapped(network, TAPS, ["poled", "layer33", "layer3.-9"], key="student.taps")
    first, second, third = caught.value.problems
    assert "pooled" in first.remedy
    assert first.key == "student.taps"
    assert "layer3" in second.remedy
    assert "layer3.-9" in third.what
    with pytest.raises(Refused) as caught:
        Tapped(network, {"f9": "layer9"}, ["f9"], key="student.taps")
    (problem,) = caught.value.problems
    assert problem.key == "student.taps.f9"
    assert "'layer9', which is no module of ResNet" in problem.what
    assert "layer3" in problem.remedy


def test_the_specification_leaves_the_network_as_it_was() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    network = nn.Sequential(Noisy(nn.BatchNorm1d(4)), nn.Dropout(), nn.Linear(4, 3))
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    spec = model_spec(network, (4,), {"noise": "0"})
    assert (spec.classes, spec.input_shape, spec.taps) == (3, (4,), {"noise": (4,)})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_shapes_are_those_of_a_real_forward() -> None:
    network = resnet8(5)
    shapes = tap_shapes(network, (3, 12, 12), TAPS)
    _, taps = Tapped(network, TAPS, TAPS)(torch.randn(2, 3, 12, 12))
    assert shapes == {name: tuple(tap.shape[1:]) for name, tap in taps.items()}
    assert list(tap_shapes(network, (3, 12, 12), TAPS, ["layer1"])) == ["layer1"]


def test_a_network_that_cannot_take_the_input_is_refused() -> None:
    with pytest.raises(Refused, match=r"ResNet cannot run on an input of shape \[1, 8, 8\]") as caught:
        tap_shapes(resnet8(5), (1, 8, 8), TAPS, key="student.taps")
    assert caught.value.problems[0].key == "student"


def test_a_tap_whose_module_does_not_run_is_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network.forward = network[0].forward  # type: ignore[method-assign]
    with pytest.raises(Refused, match=r"did not pass a tensor in the forward of Sequential: first"):
        tap_shapes(network, (2,), {"first": "0"})


def test_a_network_that_gives_no_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(Refused, match="returns tuple, not logits"):
        model_spec(Pair(), (2,), {})
