from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from kdrun.dataset.gaussians import GaussianData
from kdrun.dataset.modes import ModesData
from kdrun.errors import Refused
from kdrun.evaluation.metrics import kind
from kdrun.evaluation.sampler import METRICS, Sampler, sliced_wasserstein, true_rows
from kdrun.student.denoiser import MLPDenoiser
from kdrun.student.generator import OneStepGenerator
from kdrun.student.taps import Tapped
from kdrun.teacher.live import LiveTeacher
from kdrun.types import ModelSpec

DATA = ModesData(n_train=8, n_test=8000).load()
CPU = torch.device("cpu")


class Generator(nn.Module):
    """Samples of the density, or of it changed: `as_label` for the label that is really drawn, `shift` for all points."""

    takes = ("labels",)

    def __init__(self, as_label: dict[int, int] | None = None, shift: float = 0.0, first_mode_only: bool = False) -> None:
        super().__init__()
        self.as_label, self.shift, self.first_mode_only = as_label or {}, shift, first_mode_only

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.tensor([self.as_label.get(int(c), int(c)) for c in labels])
        second = torch.zeros(len(z)) if self.first_mode_only else torch.arange(len(z)) // 8 % 2
        angle = 2 * math.pi * (drawn + 4 * second) / 8
        return torch.stack([angle.cos(), angle.sin()], 1) + 0.12 * z + self.shift


def measured(network: nn.Module, sampler: Sampler | None = None) -> dict[str, float]:
    return (sampler or Sampler()).measure(network, (), DATA, CPU)


def test_a_generator_that_is_the_density_forgets_nothing_and_keeps_all() -> None:
    found = measured(Generator())
    assert found["ua"] < 1
    assert found["override_rate"] < 1
    assert found["kept_accuracy"] > 99
    assert found["kept_sw"] < 0.02
    assert abs(found["mode_balance"] - 50) < 1
    assert found["calls"] == 1


def test_a_label_that_became_another_is_forgotten() -> None:
    found = measured(Generator({0: 1}))
    assert found["ua"] > 99
    assert found["override_rate"] > 99
    other = measured(Generator({0: 2}))
    assert other["ua"] > 99
    assert other["override_rate"] < 1
    assert other["kept_sw"] == measured(Generator())["kept_sw"]  # the forgotten label counts for nothing else


def test_a_kept_label_that_is_lost_shows() -> None:
    found = measured(Generator({3: 1}))
    assert abs(found["kept_accuracy"] - 200 / 3) < 1
    assert found["kept_sw"] > 0.1
    assert found["ua"] < 1


def test_a_lost_mode_shows_in_the_balance() -> None:
    found = measured(Generator(first_mode_only=True))
    assert found["mode_balance"] < 1
    assert found["kept_accuracy"] > 99


def test_a_shift_is_its_sliced_distance() -> None:
    """W1 of a shift by v along the direction u is |v.u|; over all directions of the plane the mean is 2 |v| / pi."""
    a = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.3, 0.4])
    assert float(sliced_wasserstein(a, a + shift, 32)) == pytest.approx(0.5 * 2 / math.pi, rel=1e-2)
    assert float(sliced_wasserstein(a, a[torch.randperm(500)], 32)) == pytest.approx(0, abs=1e-12)


def test_the_sliced_distance_is_the_mean_of_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 2, generator=g), 0.5 + 2 * torch.randn(300, 2, generator=g)
    angles = [math.pi * k / 32 for k in range(32)]
    each = [wasserstein_distance(a @ u, b @ u) for u in (torch.tensor([math.cos(x), math.sin(x)]) for x in angles)]
    assert float(sliced_wasserstein(a, b, 32)) == pytest.approx(sum(each) / 32, rel=1e-5)


def test_a_noise_predictor_is_asked_by_ddim() -> None:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(4, 2)
    seen: list[int] = []
    denoiser.register_forward_hook(lambda *args: seen.append(1))
    found = measured(denoiser, Sampler(calls=7))
    assert found["calls"] == 7
    assert len(seen) == 7
    assert measured(OneStepGenerator(denoiser), Sampler(calls=7))["calls"] == 1


def test_every_network_gets_the_same_latents() -> None:
    class Echo(nn.Module):
        takes = ("labels",)

        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            return z

    truth = true_rows(DATA, CPU)
    one, other = (Sampler().draw(Echo(), truth)[0] for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(Sampler(seed=1).draw(Echo(), truth)[0], one)


def test_a_diverged_generator_has_no_numbers() -> None:
    found = measured(Generator(shift=math.nan))
    assert set(found) == set(METRICS)
    assert all(math.isnan(v) for v in found.values())


def test_without_an_override_its_rate_is_not_measured() -> None:
    sampler = Sampler(override=None)
    assert "override_rate" not in sampler.names()
    assert list(measured(Generator(), sampler)) == sampler.names()


def test_every_metric_has_a_direction_and_is_measured() -> None:
    assert list(measured(Generator())) == Sampler().names() == list(METRICS)
    assert all(kind(name) is not None for name in METRICS)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(Refused, match="dataset=modes"):
        Sampler().measure(Generator(), (), GaussianData(n_train=8, n_test=8).load(), CPU)
    with pytest.raises(Refused, match="no conditional sampler"):
        measured(nn.Linear(2, 2))
    with pytest.raises(Refused, match="there is no label 9"):
        measured(Generator(), Sampler(forget=9))
    with pytest.raises(Refused, match=r"evaluation\.calls"):
        Sampler(calls=0)
    with pytest.raises(Refused, match="top1"):
        Sampler(primary="top1")


def test_the_option_builds() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf" / "evaluation" / "sampler.yaml").read_text())
    assert node.pop("_target_") == "kdrun.evaluation.sampler.Sampler"
    assert vars(Sampler(**node)) == vars(Sampler())


def test_the_picture_shows_truth_teacher_before_and_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(4, 2)
    teacher = LiveTeacher(Tapped(denoiser, {}), ModelSpec(2, (2,)))
    Sampler(calls=2).picture(tmp_path, OneStepGenerator(MLPDenoiser(4, 2)), teacher, DATA, CPU)
    picture = (tmp_path / "plots" / "samples.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
