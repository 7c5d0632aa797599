"""Memory that is counted on shapes alone: right to the byte where it can be reckoned by hand, near what a process takes, free of traces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.config.compose import compose
from kdrun.dataset.base import Data
from kdrun.engine.build import Built, build, load_data
from kdrun.engine.distributed import Ranks
from kdrun.engine.footprint import footprint
from kdrun.engine.workload import work_of
from kdrun.evaluation import cost
from kdrun.student.resnet import resnet20
from kdrun.types import Batch, Progress
from tests.conftest import TINY

CPU = torch.device("cpu")
NUMBERS = 32 * 8 + 8 + 8 * 6 + 6  # of the student of TINY


def built(*overrides: str) -> tuple[dict[str, Any], Built]:
    tree = compose([*TINY, *overrides]).tree
    return tree, build(tree, load_data(tree), CPU, Ranks())


def rows(data: Data, count: int = 4) -> Batch:
    index = torch.arange(count)
    return data.rows("train", index, torch.zeros_like(index), seed=0, augment=False)


def counted(*overrides: str, micro: int = 32) -> dict[str, int]:
    tree, parts = built(*overrides)
    batch = parts.objective.prepare(rows(parts.data), Progress(0, parts.total_steps, parts.steps_per_epoch))
    found = footprint(tree, parts, batch, micro, CPU)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("optim", "buffers"),
    [
        (["optim=momentum"], 1),  # torch makes them at the first step
        (["optim=momentum", "optim.momentum=0.0"], 0),
        (["optim=adamw"], 2),
    ],
)
def test_what_an_optimiser_makes_at_its_first_step_is_counted(optim: list[str], buffers: int) -> None:
    found = counted("objective=ce", "teacher=none", *optim)
    assert found["weights"] == found["gradients"] == 4 * NUMBERS
    counters = 4 * 4 if buffers == 2 else 0  # Adam's step count of each of four tensors
    assert found["optimiser state"] == buffers * 4 * NUMBERS + counters


def test_activations_grow_with_the_rows_and_the_network() -> None:
    wide = [counted("objective=ce", "teacher=none", "student.hidden=[512]", micro=n)["activations"] for n in (1024, 2048)]
    assert wide[1] - wide[0] >= 1024 * 4 * (32 + 512 + 6)  # input, hidden and logits of every further row at least
    assert wide[1] == pytest.approx(2 * wide[0], rel=0.25)


def test_a_teacher_without_gradient_is_counted_by_its_peak() -> None:
    """Its widest layer is alive for a moment, although nothing of it is saved."""
    small, large = (counted("objective=kd", "teacher=mlp", f"teacher.hidden=[{width}]", micro=256) for width in (16, 4096))
    assert large["teacher"] == 4 * (32 * 4096 + 4096 + 4096 * 6 + 6)
    assert large["activations"] - small["activations"] > 0.9 * 256 * 4 * 4096


def test_counting_leaves_no_trace() -> None:
    tree, parts = built("objective=ce", "teacher=none", "dataset=digits", "student=resnet8")
    before = {name: value.clone() for name, value in parts.learner.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert footprint(tree, parts, rows(parts.data), 32, CPU) is not None
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in parts.learner.state_dict().items())  # BatchNorm's statistics too
    assert all(p.grad is None for p in parts.learner.parameters())


def test_a_step_that_looks_at_values_is_not_counted_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, parts = built("objective=ce", "teacher=none")
    original = type(parts.objective).terms

    def terms(self: Any, output: Any, *rest: Any) -> Any:
        return original(self, output._replace(logits=output.logits * float(output.logits.detach().sum())), *rest)

    monkeypatch.setattr(type(parts.objective), "terms", terms)
    assert footprint(tree, parts, rows(parts.data), 32, CPU) is None


def test_flops_and_parameters_of_resnet20_are_the_published_ones() -> None:
    """He et al. 2016, Table 6: 0.27 M parameters; 40.6 M multiply-adds of its convolutions on 32 x 32, each 2 FLOPs here."""
    network = resnet20(10)
    assert round(cost.parameters(network) / 1e6, 2) == 0.27
    assert cost.flops(network, (3, 32, 32)) / 2 == pytest.approx(40.6e6, rel=0.02)


def test_the_work_of_a_run_is_three_forward_passes_of_the_student_and_one_of_a_teacher_that_is_asked() -> None:
    tree, parts = built("objective=kd", "teacher=mlp", "teacher.hidden=[12]")
    work = work_of(tree, parts)
    student, teacher = 2 * (32 * 8 + 8 * 6), 2 * (32 * 12 + 12 * 6)
    assert (work.sample, work.training) == (3 * student + teacher, (3 * student + teacher) * 96 * 2)
    assert work.evaluation == 2 * 60 * student + 60 * teacher  # what the teacher says of the test split is kept
    tree, parts = built("objective=ce", "teacher=mlp", "teacher.hidden=[12]")
    assert work_of(tree, parts).sample == 3 * student


# The whole step of a convolutional network in a process of its own: what the process took above what it held before.
SCRIPT = """
import sys
from tests.engine.test_footprint import grown
print(*grown(sys.argv[1:]))
"""


def grown(overrides: list[str]) -> tuple[int, int]:
    """(predicted, measured) bytes of two steps above the memory before the first."""
    from kdrun.config.check import check
    from kdrun.engine import loop
    from kdrun.engine.device import peak_memory_bytes
    from kdrun.engine.forecast import forecast, memory_now
    from kdrun.engine.report import Reporter
    from kdrun.engine.stage import make_stage

    composed = compose(overrides)
    check(composed)
    tree = composed.tree
    parts = build(tree, load_data(tree), CPU, Ranks())
    stage = make_stage(tree, parts, CPU, Ranks(), "student", Reporter())
    told = forecast(tree, parts, stage)
    assert told is not None
    now = memory_now(CPU)
    assert told.predicted["before_first_step_bytes"] <= now
    for _ in range(2):
        loop.train_step(stage, loop.Unwatched())
    return told.predicted["peak_memory_bytes"] - told.predicted["before_first_step_bytes"], peak_memory_bytes(CPU) - now


def test_a_convolutional_step_takes_what_is_predicted_within_a_factor_of_one_and_a_half() -> None:
    """Libraries' workspaces and the allocator's reserve are not counted, and are small beside 300 MB of activations."""
    line = [
        "dataset=digits", "teacher=none", "objective=ce", "student=resnet56", "source.batch_size=1024", "optim.epochs=1", "hardware=cpu",
        "hardware.threads=1", "hardware.compile=off",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *line], capture_output=True, text=True, cwd=root, check=True, timeout=120)
    predicted, measured = map(int, done.stdout.split()[-2:])
    assert predicted > 2e8
    assert 1 / 1.5 < predicted / measured < 1.5
