"""Law 6: the teacher's weights and buffers are the same before and after, whatever `train()` was called; what it is given is its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from kdrun.config.compose import compose
from kdrun.engine import loop
from kdrun.engine.build import load_data
from kdrun.engine.stage import StageRun
from kdrun.errors import CheckFailed, Refused
from kdrun.student.resnet import resnet8
from kdrun.student.taps import Tapped
from kdrun.student.weights import bare, sha256_of
from kdrun.teacher.live import LiveTeacher, affine_between
from kdrun.types import Batch, ModelSpec, Needs
from tests.engine.running import run, staged

DIGITS = [
    "dataset=digits",
    "dataset.subset=40",
    "dataset.subset_test=20",
    "student=resnet8",
    "source.batch_size=20",
    "optim.epochs=2",
    "hardware=cpu",
    "hardware.threads=1",
    "run.log_every=1",
]
BOTH = Needs(teacher_logits=True, teacher_taps=("f1",))


@pytest.fixture
def batchnorm(tmp_path: Path) -> list[str]:
    """A run beside a teacher with BatchNorm, whose statistics any forward in training mode would move."""
    torch.save(resnet8(10, in_channels=1).state_dict(), tmp_path / "teacher.pth")
    return [*DIGITS, "teacher=resnet8", f"teacher.checkpoint={tmp_path / 'teacher.pth'}", "objective=fitnet"]


def live(affine: tuple[torch.Tensor, torch.Tensor] | None = None) -> LiveTeacher:
    torch.manual_seed(0)
    network = Tapped(resnet8(10, in_channels=1), {"f1": "layer1"}, ("f1",))
    return LiveTeacher(network, ModelSpec(10, (1, 8, 8)), affine)


def batch(inputs: torch.Tensor) -> Batch:
    ids = torch.arange(len(inputs))
    return Batch(inputs, ids, ids, ids, {})


def modes(module: nn.Module) -> set[bool]:
    return {m.training for m in module.modules()}


def test_a_teacher_with_batchnorm_is_the_same_after_a_run(batchnorm: list[str], tmp_path: Path) -> None:
    summary = run(batchnorm, tmp_path / "run")
    network = resnet8(10, in_channels=1)
    network.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True))
    assert summary["teacher"]["sha256"] == sha256_of(network)


def test_a_teacher_that_changed_during_the_run_fails_it(batchnorm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StageRun.step_done

    def step_done(self: StageRun, step: int) -> None:
        if step == 2:
            self.built.teacher.module.module.bn1.running_mean += 1e-3
        original(self, step)

    monkeypatch.setattr(StageRun, "step_done", step_done)
    with pytest.raises(CheckFailed, match="the teacher's weights or buffers changed"):
        run(batchnorm, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_teacher_stays_in_evaluation_mode_whatever_is_called(batchnorm: list[str], tmp_path: Path) -> None:
    stage = staged(batchnorm, tmp_path / "run").stage
    teacher = stage.teacher
    assert isinstance(teacher, LiveTeacher)
    for call in (stage.learner.train, teacher.module.train, nn.Sequential(teacher.module).train):
        call()
        assert modes(teacher.module) == {False}
    assert modes(stage.learner) == {True}
    before = sha256_of(teacher.module)

    class Nobody:
        def logged(self, step: int, record: dict[str, float]) -> None: ...
        def step_done(self, step: int) -> None: ...
        def stop_requested(self) -> bool:
            return False

    loop.train(stage, Nobody())
    assert sha256_of(teacher.module) == before
    assert [p for p in teacher.module.parameters() if p.grad is not None or p.requires_grad] == []


def test_a_teacher_is_no_part_of_what_is_trained_or_saved(batchnorm: list[str], tmp_path: Path) -> None:
    run = staged(batchnorm, tmp_path / "run")
    theirs = {id(p) for p in run.built.teacher.module.parameters()}
    assert not theirs & {id(p) for p in run.stage.learner.parameters()}
    assert not theirs & {id(p) for o in run.stage.optimizers.values() for g in o.param_groups for p in g["params"]}


def test_no_gradient_reaches_the_inputs_through_the_teacher() -> None:
    inputs = torch.randn(3, 1, 8, 8, requires_grad=True)
    signal = live().signal(batch(inputs), BOTH)
    assert signal.logits is not None
    assert not signal.logits.requires_grad
    assert not signal.taps["f1"].requires_grad


def test_a_teacher_that_is_not_needed_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = live()
    monkeypatch.setattr(teacher, "forward", lambda inputs: pytest.fail("it was asked"))
    signal = teacher.signal(batch(torch.randn(2, 1, 8, 8)), Needs())
    assert (signal.logits, signal.taps) == (None, {})


@pytest.mark.parametrize("shape", [(3, 8, 8), (3,)], ids=["images", "vectors"])
def test_renormalised_inputs_are_those_the_teacher_would_have_had(shape: tuple[int, ...]) -> None:
    """Pixels (or features) normalised the data set's way, then renormalised, against pixels normalised the teacher's way."""
    ours, theirs = ((0.51, 0.49, 0.44), (0.27, 0.26, 0.28)), ((0.5, 0.4, 0.3), (0.2, 0.5, 0.9))
    pixels = torch.rand(5, *shape)

    def normalised(values: torch.Tensor, how: Sequence[Sequence[float]]) -> torch.Tensor:
        mean, std = (torch.tensor(v).view(-1, *[1] * (len(shape) - 1)) for v in how)
        return (values - mean) / std

    teacher = LiveTeacher(nn.Identity(), ModelSpec(3, shape), affine_between(*ours, *theirs))
    torch.testing.assert_close(teacher.renormalise(normalised(pixels, ours)), normalised(pixels, theirs), rtol=1e-5, atol=1e-6)


def test_renormalisation_reaches_what_is_said_and_what_is_measured(batchnorm: list[str], tmp_path: Path) -> None:
    data = load_data(compose(DIGITS).tree)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    own_mean, own_std = mean + 0.1, std * 2
    told = [f"teacher.mean={own_mean.flatten().tolist()}", f"teacher.std={own_std.flatten().tolist()}", "teacher.renormalise=true"]

    def by_hand(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network.eval()((inputs * std + mean - own_mean) / own_std)

    stage = staged([*batchnorm, *told], tmp_path / "stage").stage
    assert isinstance(stage.teacher, LiveTeacher)
    inputs = stage.source.group(0)[0]
    said = stage.teacher.signal(inputs, Needs(teacher_logits=True)).logits
    torch.testing.assert_close(said, by_hand(bare(stage.teacher.module), inputs.inputs), rtol=1e-4, atol=1e-5)

    summary = run([*batchnorm, *told], tmp_path / "run")
    network = resnet8(10, in_channels=1)
    network.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True))
    test = next(data.batches("test", len(data.split("test"))))
    nll = nn.functional.cross_entropy(by_hand(network, test.inputs), test.targets)
    assert summary["teacher"]["nll"] == pytest.approx(float(nll), rel=1e-4)


# -- placement ------------------------------------------------------------------------------------------------------------


class Elsewhere(nn.Module):
    """Says where it was asked, and speaks from there: what comes in must be on `meta`, what goes out is on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked: list[torch.device] = []

    def forward(self, x: torch.Tensor, extra: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.asked += [x.device, *(row.device for row in extra.values())]
        return torch.ones(len(x), 3), {"f1": torch.ones(len(x), 2)}


def test_a_teacher_elsewhere_is_given_its_rows_there() -> None:
    network = Elsewhere()
    teacher = LiveTeacher(network, ModelSpec(3, (2,)))
    teacher.to(torch.device("cpu"), torch.contiguous_format, "meta")
    assert next(network.parameters()).device.type == "meta"
    ids = torch.arange(4)
    said = teacher.signal(Batch(torch.zeros(4, 2), ids, ids, ids, {"row": ids}), BOTH)
    assert {device.type for device in network.asked} == {"meta"}
    assert said.logits is not None
    assert said.logits.device.type == said.taps["f1"].device.type == "cpu"


def test_the_place_of_a_teacher_changes_no_result(batchnorm: list[str], tmp_path: Path) -> None:
    first = run(batchnorm, tmp_path / "same")
    assert run([*batchnorm, "teacher.placement=cpu"], tmp_path / "cpu")["test"] == first["test"]
    hashes = [compose([*batchnorm, *more]).hash() for more in ([], ["teacher.placement=cpu"])]
    assert hashes[0] == hashes[1]  # where it runs is not what is computed


@pytest.mark.parametrize(("place", "words"), [("cuda:9", "there is no cuda:9 here"), ("gpu", "is no device")])
def test_a_place_that_there_is_not_is_refused(place: str, words: str, batchnorm: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=words):
        run([*batchnorm, f"teacher.placement={place}"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
