"""Noise predictors and the one-step generators around them."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdrun.errors import Refused
from kdrun.losses.score import linear_schedule
from kdrun.student.build import build
from kdrun.student.denoiser import MLPDenoiser, UNetDenoiser, time_features
from kdrun.student.generator import OneStepGenerator, Solver, ddim, one_step_mlp, one_step_unet, solve
from kdrun.student.taps import model_spec
from kdrun.student.weights import save_student
from tests.student.composed import node

SMALL_UNET: dict[str, Any] = {"size": 16, "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention_at": 8}
LABELS, TIMES = torch.tensor([0, 3, 2]), torch.tensor([0, 440, 999])


def seeded(network: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return network(*args, **kwargs).eval()


def test_the_mlp_is_the_one_of_the_worked_example() -> None:
    network = MLPDenoiser(4, 2)
    assert [tuple(p.shape) for p in network.hidden.parameters() if p.dim() == 2] == [(64, 66), (64, 64), (64, 64)]
    assert [type(m).__name__ for m in network.hidden] == ["Linear", "SiLU"] * 3
    assert tuple(network.embedding.weight.shape) == (4, 32)
    assert tuple(network.out.weight.shape) == (2, 64)


def test_time_features_are_sines_and_cosines_at_log_spaced_frequencies() -> None:
    features = time_features(TIMES, 32)
    frequency = 10 ** torch.linspace(0, -4, 16, dtype=torch.float64)
    expected = torch.cat([(TIMES[:, None] * frequency).sin(), (TIMES[:, None] * frequency).cos()], 1)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-4)
    assert (torch.pdist(time_features(torch.arange(1000), 32)) > 0.01).all()  # no two steps look alike


def test_noise_depends_on_point_label_and_time() -> None:
    network, x = seeded(MLPDenoiser, 4, 2), torch.randn(3, 2)
    noise = network(x, labels=LABELS, t=TIMES)
    assert noise.shape == x.shape
    asked = ((x + 1, LABELS, TIMES), (x, 3 - LABELS, TIMES), (x, LABELS, TIMES // 2 + 1))
    for other in (network(a, labels=b, t=c) for a, b, c in asked):
        assert ((other - noise).abs().amax(1) > 1e-4).all()  # of every row


@pytest.mark.parametrize("factory", [MLPDenoiser, UNetDenoiser])
def test_one_more_label_stands_for_none_when_asked(factory: Any) -> None:
    sizes: dict[str, Any] = {} if factory is MLPDenoiser else SMALL_UNET
    if factory is UNetDenoiser:
        pytest.importorskip("diffusers")
    assert factory(4, 3, **sizes, null_label=True).null_label == 4
    assert factory(4, 3, **sizes, null_label=True).labels == 5
    assert factory(4, 3, **sizes, null_label=False).null_label is None


@pytest.mark.parametrize("values", [{"width": 0}, {"depth": 0}, {"features": 31}])
def test_sizes_that_cannot_be_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MLPDenoiser(4, 2, **values)


def test_the_unet_speaks_of_images_and_trains() -> None:
    pytest.importorskip("diffusers")
    network = seeded(UNetDenoiser, 4, 3, **SMALL_UNET)
    x = torch.randn(3, 3, 16, 16)
    noise = network(x, labels=LABELS, t=TIMES)
    assert noise.shape == x.shape
    for other in (network(x, labels=3 - LABELS, t=TIMES), network(x, labels=LABELS, t=TIMES // 2 + 1)):
        assert ((other - noise).abs().amax((1, 2, 3)) > 1e-4).all()
    noise.square().sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters())


def test_the_unet_has_ddpms_layout() -> None:
    """At 32x32: channels 128 times 1, 2, 2, 2, two blocks each, attention at 16 and in the middle, 35.7 million parameters (App. B)."""
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = build(node("student", "denoiser_unet"), 10, (3, 32, 32), reserved={"speaks"})
    unet: Any = network.unet
    assert [type(b).__name__ for b in unet.down_blocks] == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    assert [type(b).__name__ for b in unet.up_blocks] == ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    assert [len(b.resnets) for b in unet.down_blocks] == [2, 2, 2, 2]
    assert {a.heads for b in (unet.down_blocks[1], unet.mid_block) for a in b.attentions} == {1}
    labels = unet.class_embedding.weight.numel()
    assert round((sum(p.numel() for p in network.parameters()) - labels) / 1e6, 1) == 35.7
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} >= {0.1}


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("diffusers"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused, match=r'pip install "kdrun\[diffusion\]"'):
        UNetDenoiser(4, 3)


# -- generators -----------------------------------------------------------------------------------------------------------


class Zero(nn.Module):
    takes = ("labels", "t")
    schedule = linear_schedule()

    def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        self.seen = x, labels, t
        return torch.zeros_like(x)


def test_a_network_that_says_nothing_gives_the_scaled_latent() -> None:
    zero, z = Zero(), torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5000) % 4
    samples = OneStepGenerator(zero)(z, labels=labels)
    torch.testing.assert_close(samples, 2.5023 * z, rtol=1e-4, atol=0)
    x_init, given, t = zero.seen
    torch.testing.assert_close(x_init, 0.9286 * z, rtol=1e-4, atol=0)  # no signal: not of standard deviation 1
    assert abs(float(x_init.std()) - 0.9286) < 4 * 0.9286 / 20_000**0.5
    assert torch.equal(given, labels)
    assert t.eq(440).all()


def test_the_generator_is_the_data_prediction_of_its_input() -> None:
    network, z, schedule = seeded(MLPDenoiser, 4, 2), torch.randn(3, 2), linear_schedule()
    t = torch.full((3,), 440)
    x_init = schedule.at(440)[1] * z
    expected = schedule.to_x0(x_init, t, network(x_init, labels=LABELS, t=t))
    torch.testing.assert_close(OneStepGenerator(network)(z, labels=LABELS), expected, rtol=1e-5, atol=1e-6)
    calls: list[int] = []
    network.register_forward_hook(lambda *args: calls.append(1))
    OneStepGenerator(network)(z, labels=LABELS)
    assert len(calls) == 1


def test_a_step_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t_init=1000: legal range \[0, 1000\)"):
        one_step_mlp(4, 2, t_init=1000)


def test_the_exported_generator_loads_alone(tmp_path: Path) -> None:
    generator, z = seeded(one_step_mlp, 4, 2, width=8), torch.randn(3, 2)
    save_student(generator, tmp_path / "student.safetensors", {})
    fresh = one_step_mlp(4, 2, width=8)
    state = load_file(tmp_path / "student.safetensors")
    assert all(name.startswith("denoiser.") for name in state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(z, labels=LABELS), generator(z, labels=LABELS))


@pytest.mark.parametrize("name", ["denoiser_mlp", "generator_mlp", "denoiser_unet", "generator_unet"])
def test_every_option_speaks_as_its_input_is_shaped(name: str) -> None:
    if name.endswith("unet"):
        pytest.importorskip("diffusers")
    chosen, shape = node("student", name), (3, 32, 32) if name.endswith("unet") else (2,)
    assert chosen["speaks"] == "tensor"
    with torch.device("meta"):
        network = build(chosen, 10, shape, reserved={"speaks"})
        x = torch.zeros(2, *shape)
        assert network(x, **network.example(2)).shape == x.shape
    assert model_spec(network, shape, {}).input_shape == shape
    assert isinstance(network, OneStepGenerator) == name.startswith("generator")


def test_generator_and_denoiser_of_one_size_share_their_weights() -> None:
    pytest.importorskip("diffusers")
    generator, denoiser = one_step_unet(4, 3, **SMALL_UNET), UNetDenoiser(4, 3, **SMALL_UNET)
    generator.denoiser.load_state_dict(denoiser.state_dict())


# -- the forward process of images, and solvers of diffusers --------------------------------------------------------------


def test_the_forward_process_of_images_is_that_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    network = UNetDenoiser(4, 3, **SMALL_UNET)
    torch.testing.assert_close(network.schedule.abar, linear_schedule().abar, rtol=2e-6, atol=0)
    cosine = UNetDenoiser(4, 3, beta_schedule="squaredcos_cap_v2", **SMALL_UNET).schedule
    assert len(cosine) == 1000
    assert cosine.abar[500] > 2 * network.schedule.abar[500]  # the cosine schedule keeps more of the signal in the middle
    with torch.device("meta"):
        assert UNetDenoiser(4, 3, **SMALL_UNET).schedule.sigma(440) == pytest.approx(2.5023, abs=1e-4)
    with pytest.raises(ValueError, match="beta_schedule='cosine': legal values linear"):
        UNetDenoiser(4, 3, beta_schedule="cosine", **SMALL_UNET)  # type: ignore[arg-type]


class ExactScore(nn.Module):
    """The noise of x0 ~ N(0.7, 0.3^2), and diffusers' forward process."""

    takes = ("labels", "t")

    def __init__(self) -> None:
        super().__init__()
        diffusers = pytest.importorskip("diffusers")
        self.scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        a, b = linear_schedule().scales(t, x)
        return b * (x - a * 0.7) / (a**2 * 0.3**2 + b**2)


@pytest.mark.parametrize("solver", get_args(Solver))
def test_every_solver_finds_the_density_of_an_exact_score(solver: Solver) -> None:
    network = ExactScore()
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    samples = solve(network, solver, z, torch.zeros(20_000, dtype=torch.int64), 200)
    assert network.calls == 200
    assert abs(float(samples.mean()) - 0.7) < 0.02
    assert abs(float(samples.std()) - 0.3) < 0.02


def test_the_solver_ddim_is_ours() -> None:
    network, z = ExactScore(), torch.randn(50, 1, generator=torch.Generator().manual_seed(2))
    labels = torch.zeros(50, dtype=torch.int64)
    theirs = solve(network, "DDIMScheduler", z, labels, 40)
    torch.testing.assert_close(theirs, ddim(network, linear_schedule(), z, labels, 40), rtol=1e-4, atol=1e-4)


# -- DDIM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 5, 40])
def test_ddim_is_that_of_diffusers(calls: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    network, z = seeded(MLPDenoiser, 4, 2), torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    theirs = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(calls)
    x = z
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(network(x, labels=LABELS, t=t.expand(3)), t, x).prev_sample
        ours = ddim(network, linear_schedule(), z, LABELS, calls)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_ddim_finds_the_density_of_an_exact_score() -> None:
    """For x0 ~ N(m, s^2) with its exact noise prediction the samples are N(m, s^2)."""

    class Exact(nn.Module):
        def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
            a, b = linear_schedule().scales(t, x)
            return b * (x - a * 0.7) / (a**2 * 0.3**2 + b**2)

    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = ddim(Exact(), linear_schedule(), z, torch.zeros(20_000, dtype=torch.int64), 200)
    assert abs(float(samples.mean()) - 0.7) < 0.02
    assert abs(float(samples.std()) - 0.3) < 0.02
