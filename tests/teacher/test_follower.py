"""Teachers that are the student itself: its last epoch, or its moving average."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kdrun.errors import Refused
from kdrun.student.resnet import resnet8
from kdrun.student.weights import sha256_of
from kdrun.teacher.follower import EmaTeacher, Follower, SnapshotTeacher
from kdrun.types import Batch, ModelSpec, Needs, Progress, Signal
from tests.engine.running import run, staged

SPEC = ModelSpec(10, (1, 8, 8))
LOGITS, BOTH = Needs(teacher_logits=True), Needs(teacher_logits=True, teacher_taps=("f1",))
INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(INPUTS, torch.arange(4), torch.arange(4), torch.arange(4), {})


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet8(10, in_channels=1)


def disturb(network: nn.Module) -> None:
    """A step of training: weights move, and a forward moves BatchNorm's statistics."""
    network.train()(INPUTS)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1)


def at(step: int) -> Progress:
    return Progress(step, 12, 3)


@pytest.mark.parametrize("cls", [SnapshotTeacher, EmaTeacher])
def test_it_is_a_frozen_copy_in_evaluation_mode_whatever_is_called(cls: type[Follower]) -> None:
    network = student().train()
    teacher = cls(network, SPEC)
    before = sha256_of(teacher.network)
    teacher.module.train()
    assert not any(m.training for m in teacher.module.modules())
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    disturb(network)
    teacher.forward(INPUTS)
    assert sha256_of(teacher.network) == before


def test_a_snapshot_says_nothing_in_the_first_epoch_and_the_last_epoch_s_end_after() -> None:
    network = student()
    teacher = SnapshotTeacher(network, SPEC)
    for step in range(2):
        disturb(network)
        teacher.after_step(network, at(step))
        assert teacher.signal(BATCH, LOGITS) == Signal(None, {})
    disturb(network)
    teacher.after_step(network, at(2))  # the third of three steps
    then = copy.deepcopy(network).eval()(INPUTS)
    said = teacher.signal(BATCH, LOGITS).logits
    assert said is not None
    assert torch.equal(said, then)
    disturb(network)
    teacher.after_step(network, at(3))
    again = teacher.signal(BATCH, LOGITS).logits
    assert again is not None
    assert torch.equal(again, then)


def test_an_average_follows_every_step_with_its_decay() -> None:
    network = student()
    teacher = EmaTeacher(network, SPEC, decay=0.75)
    expected = {k: v.clone() for k, v in network.state_dict().items()}
    for step in range(3):
        disturb(network)
        teacher.after_step(network, at(step))
        for name, value in network.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value if value.is_floating_point() else value.clone()
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert teacher.network.state_dict()["bn1.num_batches_tracked"] == 3


def test_taps_are_given_and_the_student_keeps_none() -> None:
    network = student()
    teacher = EmaTeacher(network, SPEC, {"f1": "layer1"}, ("f1",))
    assert teacher.signal(BATCH, BOTH).taps["f1"].shape == (4, 16, 8, 8)
    assert not any(m._forward_hooks for m in network.modules())
    assert teacher.signal(BATCH, Needs()) == Signal(None, {})


@pytest.mark.parametrize("cls", [SnapshotTeacher, EmaTeacher])
def test_its_state_is_its_weights_and_whether_it_speaks(cls: type[Follower]) -> None:
    network = student()
    teacher, other = cls(network, SPEC), cls(student(1), SPEC)
    for step in range(3):
        disturb(network)
        teacher.after_step(network, at(step))
    other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    one, two = (t.signal(BATCH, LOGITS).logits for t in (teacher, other))
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(Refused, match=r"teacher\.decay"):
        EmaTeacher(student(), SPEC, decay=decay)


@pytest.mark.parametrize(("kind", "cls"), [("snapshot", SnapshotTeacher), ("ema", EmaTeacher)])
def test_the_configuration_s_kind_is_the_class(kind: str, cls: type[Follower], tiny: list[str], tmp_path: Path) -> None:
    teacher = staged([*tiny, f"teacher={kind}", "objective=ps_kd", "objective.memory=model"], tmp_path).stage.teacher
    assert type(teacher) is cls
    assert teacher.follows


def test_an_average_of_weights_can_teach_any_objective_on_logits(tiny: list[str], tmp_path: Path) -> None:
    summary = run([*tiny, "teacher=ema", "teacher.decay=0.5", "objective=kd"], tmp_path / "run")
    assert "top1" not in summary["teacher"]  # it has no score of its own to be measured before the run
    assert "agreement" not in summary["test"]


def test_a_copy_of_a_network_without_content_has_none_either() -> None:
    """A plan's networks: to copy the storage that they do not have writes over other memory. Tied weights stay tied."""
    with FakeTensorMode():
        network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
        network[2].weight = network[0].weight
        follower = EmaTeacher(network, ModelSpec(3, (3,)))
    theirs = follower.network.state_dict()
    assert theirs.keys() == network.state_dict().keys()
    assert all(isinstance(tensor, FakeTensor) for tensor in theirs.values())
    assert follower.network[2].weight is follower.network[0].weight  # type: ignore[index]
    assert follower.network[0].weight is not network[0].weight  # type: ignore[index]
    assert not any(p.requires_grad for p in follower.network.parameters())
    assert all(p.requires_grad for p in network.parameters())
