from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from kdrun.dataset.augment import Normalise, PadCropFlip
from kdrun.dataset.base import Data, Resident, Split
from kdrun.errors import Refused
from kdrun.evaluation.image_sampler import METRICS, ImageSampler, to_pixels
from kdrun.evaluation.metrics import kind
from kdrun.student.mlp import mlp
from kdrun.student.weights import save_student

CPU, HALF = torch.device("cpu"), (0.5,) * 3
GREYS = torch.tensor([40.0, 120.0, 200.0])  # of the three classes


def world() -> Data:
    """Images of one grey with noise, by class."""
    labels = torch.arange(90) % 3
    noise = torch.randn(90, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = (GREYS[labels].view(-1, 1, 1, 1) + 10 * noise).round().clamp(0, 255).to(torch.uint8)
    splits = {
        n: Split(Resident(pixels, PadCropFlip(Normalise(HALF, HALF), 0, 0.0)), labels, torch.arange(90) + k)
        for k, n in ((0, "train"), (90, "test"))
    }
    return Data("greys", ("a", "b", "c"), (3, 4, 4), HALF, HALF, splits, 180)


class Painter(nn.Module):
    """The world's images, some labels painted as others."""

    takes = ("labels",)

    def __init__(self, as_label: dict[int, int] | None = None, noise: float = 10.0) -> None:
        super().__init__()
        self.as_label, self.spread = as_label or {}, noise

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.tensor([self.as_label.get(int(c), int(c)) for c in labels])
        return (GREYS[drawn].view(-1, 1, 1, 1) + self.spread * z) / 127.5 - 1


class Means(nn.Module):
    """Features that take no download: the mean of every channel, and of its upper half."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.float().mean((2, 3)), x[:, :, :2].float().mean((2, 3))], 1)


@pytest.fixture(autouse=True)
def no_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageSampler, "_frechet_metric", lambda self: FrechetInceptionDistance(feature=Means(), normalize=True))


@pytest.fixture
def classifier(tmp_path: Path) -> dict[str, Any]:
    """The class by the mean grey: a linear network whose logits are -(x - g)^2 up to a constant, for inputs in [0, 1]."""
    network: Any = mlp(3, 48, [])
    greys = GREYS / 255
    with torch.no_grad():
        network.fc.weight.copy_((2 * greys / 48)[:, None].expand(3, 48))
        network.fc.bias.copy_(-greys.square())
    save_student(network, tmp_path / "judge.safetensors", {})
    return {"_target_": "kdrun.student.mlp.mlp", "hidden": [], "checkpoint": str(tmp_path / "judge.safetensors")}


def sampler(**values: Any) -> ImageSampler:
    return ImageSampler(**{"samples": 40, **values})


def judged(network: nn.Module, classifier: dict[str, Any]) -> dict[str, float]:
    return sampler(classifier=classifier, classifier_mean=[0.0] * 3, classifier_std=[1.0] * 3).measure(network, (), world(), CPU)


def test_the_distance_is_small_for_the_kept_classes_as_they_are_and_large_otherwise() -> None:
    same, other = (sampler().measure(Painter(c), (), world(), CPU)["fid"] for c in ({}, {1: 2}))
    assert same < 0.01
    assert other > 5 * same
    assert sampler().measure(Painter({0: 1}), (), world(), CPU)["fid"] == same  # of the forgotten label it knows nothing


def test_the_classifier_tells_what_was_forgotten_and_what_was_kept(classifier: dict[str, Any]) -> None:
    plain = judged(Painter(), classifier)
    assert (plain["ua"], plain["override_rate"], plain["kept_accuracy"], plain["calls"]) == (0, 0, 100, 1)
    forgot = judged(Painter({0: 1}), classifier)
    assert (forgot["ua"], forgot["override_rate"], forgot["kept_accuracy"]) == (100, 100, 100)
    lost = judged(Painter({2: 1}), classifier)
    assert (lost["ua"], lost["kept_accuracy"]) == (0, 50)


def test_without_a_classifier_its_metrics_are_absent() -> None:
    assert set(sampler().measure(Painter(), (), world(), CPU)) == {"fid", "calls"}
    assert set(sampler(fid=False, primary="calls").measure(Painter(), (), world(), CPU)) == {"calls"}


def test_pixels_are_those_of_the_data_set() -> None:
    data = world()
    batch = data.rows("train", torch.arange(5), torch.zeros(5, dtype=torch.int64), 0)
    stored: Any = data.split("train").storage
    torch.testing.assert_close(to_pixels(batch.inputs, data), stored.inputs[:5] / 255, rtol=0, atol=1e-6)
    assert to_pixels(torch.full((1, 3, 4, 4), 9.0), data).max() == 1


def test_a_diverged_sampler_has_no_numbers() -> None:
    found = sampler().measure(Painter(noise=math.nan), (), world(), CPU)
    assert set(found) == set(METRICS)
    assert all(math.isnan(v) for v in found.values())


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="needs a classifier"):
        sampler(primary="ua")
    with pytest.raises(Refused, match=r"classifier\.checkpoint"):
        sampler(classifier={"_target_": "kdrun.student.mlp.mlp", "hidden": []})
    with pytest.raises(Refused, match="switched off"):
        sampler(fid=False)
    with pytest.raises(Refused, match=r"evaluation\.solver"):
        sampler(solver="DDIM")
    with pytest.raises(Refused, match="there is no label 3"):
        sampler(forget=3).measure(Painter(), (), world(), CPU)
    with pytest.raises(Refused, match="no conditional sampler"):
        sampler().measure(nn.Flatten(), (), world(), CPU)
    with pytest.raises(Refused, match=r"evaluation\.classifier\.checkpoint"):
        judged(Painter(), {"_target_": "kdrun.student.mlp.mlp", "hidden": [], "checkpoint": "nowhere.safetensors"})


def test_every_metric_has_a_direction() -> None:
    assert all(kind(name) is not None for name in METRICS)


def test_the_option_builds() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf" / "evaluation" / "image_sampler.yaml").read_text())
    assert node.pop("_target_") == "kdrun.evaluation.image_sampler.ImageSampler"
    assert vars(ImageSampler(**node)) == vars(ImageSampler())


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_extra_is_found_before_the_run(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.evaluation.image_sampler.find_spec", lambda name: object() if installed else None)
    found = sampler().problems(world())
    assert [(p.key, "kdrun[diffusion]" in p.remedy) for p in found] == [("evaluation.fid", True)] * (not installed)
