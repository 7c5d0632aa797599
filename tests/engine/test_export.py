"""Law 5: the exported student holds the student alone and loads with plain torch and timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from kdrun.config.compose import compose
from kdrun.engine.build import load_data
from kdrun.engine.records import STUDENT_FILE, SUMMARY, read_json
from kdrun.student.mlp import mlp
from kdrun.student.resnet import resnet8
from tests.engine.running import Notes, run

DIGITS = [
    "dataset=digits",
    "dataset.subset=40",
    "dataset.subset_test=60",
    "source.batch_size=20",
    "optim.epochs=1",
    "hardware=cpu",
    "hardware.threads=1",
]
CIFAR = ["dataset=cifar100", "source.batch_size=100", "optim.epochs=1", "hardware=cpu", "hardware.threads=1"]


def top1(network: nn.Module, overrides: list[str]) -> float:
    """Accuracy on the test split, in percent, with nothing of kdrun but the data."""
    network.eval()
    with torch.no_grad():
        hits = [(network(b.inputs).argmax(1) == b.targets) for b in load_data(compose(overrides).tree).batches("test", 50)]
    return 100 * float(torch.cat(hits).double().mean())


def test_a_mlp_with_connectors_exports_the_student_alone(tiny: list[str], live: list[str], tmp_path: Path) -> None:
    objective = ["objective=crd", "objective.negatives=20", "objective.width=8"]
    summary = run([*tiny, *live, *objective], tmp_path / "run")
    state, network = load_file(tmp_path / "run" / STUDENT_FILE), mlp(6, 32, [8])
    assert state.keys() == network.state_dict().keys()
    network.load_state_dict(state)
    assert summary["test"]["top1"] == pytest.approx(top1(network, tiny), abs=1e-9)
    assert summary["student"]["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("extra", [[], ["optim.ema=0.9"], ["hardware.dtype=bf16"]], ids=["plain", "ema", "bf16"])
def test_a_resnet_with_a_teacher_and_a_regressor_exports_the_student_alone(extra: list[str], tmp_path: Path) -> None:
    objective = ["objective=fitnet", "teacher=resnet8", "teacher.checkpoint=" + str(tmp_path / "teacher.pth")]
    torch.save(resnet8(10, in_channels=1).state_dict(), tmp_path / "teacher.pth")
    run([*DIGITS, "student=resnet8", *objective, *extra], tmp_path / "run")
    state, network = load_file(tmp_path / "run" / STUDENT_FILE), resnet8(10, in_channels=1)
    assert state.keys() == network.state_dict().keys()  # BatchNorm's statistics included, connectors and teacher not
    network.load_state_dict(state)
    assert read_json(tmp_path / "run" / SUMMARY)["test"]["top1"] == pytest.approx(top1(network, DIGITS), abs=1e-9)


def test_a_timm_student_loads_into_timm(tiny_cifar100: Path, tmp_path: Path) -> None:
    data = [*CIFAR, f"dataset.path={tiny_cifar100}"]
    student = ["student=timm", "student.name=test_resnet", "student.taps={}"]
    summary = run([*data, *student, "teacher=none"], tmp_path / "run")
    network = timm.create_model("test_resnet", num_classes=100, checkpoint_path=tmp_path / "run" / STUDENT_FILE)
    assert summary["test"]["top1"] == pytest.approx(top1(network, data), abs=1e-9)
    again = timm.create_model("test_resnet", num_classes=100)
    again.load_state_dict(load_file(tmp_path / "run" / STUDENT_FILE))


def test_the_logits_are_those_of_the_student_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, not merely as often right."""
    seen: dict[str, nn.Module] = {}
    from kdrun.engine import session as runs

    original: Callable[..., None] = runs.save_student

    def save_student(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
        seen["student"] = module
        original(module, path, metadata)

    monkeypatch.setattr(runs, "save_student", save_student)
    run([*DIGITS, "student=resnet8"], tmp_path / "run", Notes())
    network = resnet8(10, in_channels=1)
    network.load_state_dict(load_file(tmp_path / "run" / STUDENT_FILE))
    inputs = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ours, theirs = network.to(memory_format=torch.channels_last).eval()(inputs), seen["student"].eval()(inputs)
    assert torch.equal(ours, theirs)
