"""Models of timm are students like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.errors import Refused
from kdrun.student.build import build
from kdrun.student.taps import Tapped, tap_shapes
from kdrun.student.timm import create
from tests.student.composed import node


def test_a_timm_model_is_built_for_the_data_and_tapped() -> None:
    chosen = node("student", "timm", "student.name=test_resnet")
    network = build(chosen, 7, (1, 32, 32))
    taps = {name: chosen["taps"][name] for name in ("f1", "f4", "pooled")}
    shapes = tap_shapes(network, (1, 32, 32), taps)
    logits, values = Tapped(network, taps, taps)(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    assert {name: tuple(value.shape[1:]) for name, value in values.items()} == shapes
    assert shapes["pooled"] == (shapes["f4"][0],)


def test_timm_taps_compile_and_are_not_changed_in_place() -> None:
    """timm's blocks add the shortcut in place and activate in place: bn2's value is overwritten twice after it is tapped."""
    torch.manual_seed(0)
    network = create("test_resnet", num_classes=5).eval()
    path = "layer1.0.bn2"
    seen: list[Tensor] = []
    network.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    tapped = Tapped(network, {}, [path])
    x = torch.randn(2, 3, 32, 32)
    _, taps = tapped(x)
    assert torch.equal(taps[path], seen[0])
    compiled = torch.compile(Tapped(create("test_resnet", num_classes=5), {}, [path, "global_pool"]), fullgraph=True, backend="eager")
    logits, taps = compiled(x)
    assert torch.equal(compiled._orig_mod.module.fc(taps["global_pool"]), logits)


def test_an_unknown_timm_model_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(Refused, match="timm has no model 'resnet_18'") as caught:
        build({"_target_": "kdrun.student.timm.create", "name": "resnet_18"}, 10, (3, 32, 32))
    assert caught.value.problems[0].key == "student.name"
    assert "resnet18" in caught.value.problems[0].remedy


def test_an_argument_that_timm_does_not_know_is_refused() -> None:
    with pytest.raises(Refused, match="unexpected keyword argument 'dpeth'"):
        create("test_resnet", num_classes=5, dpeth=3)


def test_pretrained_weights_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(Refused, match="cannot be had: no route to host") as caught:
        create("test_resnet", num_classes=5, pretrained=True)
    assert "checkpoint=" in caught.value.problems[0].remedy
    with pytest.raises(OSError, match="no route"):  # not about weights: a fault of another kind
        create("test_resnet", num_classes=5)
