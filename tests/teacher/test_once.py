"""On one graph a teacher speaks once: its forward runs a single time, whoever asks and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.dataset.csbm import CSBMData
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import Evaluator
from kdrun.evaluation.graph import GraphClassification
from kdrun.objective.ff_g2m import FFG2M
from kdrun.source.whole import Whole
from kdrun.student.mlp import mlp
from kdrun.student.taps import Tapped, model_spec
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.once import OnceTeacher
from kdrun.types import Needs, Signal

CPU = torch.device("cpu")
SMALL = {"nodes": 60, "edges": 90, "classes": 3, "features": 5, "labelled": 4, "validation": 12}


class Counting(nn.Module):
    """A network on the mean of the neighbours that counts how often it is asked."""

    takes = ("edge_index",)

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.asked = nn.Linear(5, 3), 0

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.asked += 1
        return self.fc(torch.zeros_like(x).index_add_(0, edge_index[0], x[edge_index[1]]))

    def example(self, rows: int) -> dict[str, Tensor]:
        return {"edge_index": torch.zeros(2, rows, dtype=torch.int64)}


def world(setting: str = "transductive") -> Data:
    return CSBMData(**SMALL, setting=setting).load()  # type: ignore[arg-type]


def teacher(kind: type[LiveTeacher]) -> tuple[Counting, LiveTeacher]:
    torch.manual_seed(0)
    network = Counting()
    made = kind(Tapped(network, {}), model_spec(network, (5,), {}))
    network.asked = 0
    return network, made


def use(made: LiveTeacher, data: Data, steps: int = 5) -> list[Signal]:
    """What a run does with its teacher: every step asks, and every evaluation of both splits."""
    source, objective = Whole().open(data, seed=1), FFG2M()
    evaluator = Evaluator(data, GraphClassification(top_k=(1,)), made, CPU, Ranks())
    student, said = mlp(3, 5, [4]), []
    for step in range(steps):
        (batch,) = source.group(step)
        said.append(made.signal(batch, objective.needs()))
        evaluator.measure_all(student)
    return said


def test_the_forward_is_called_once() -> None:
    network, made = teacher(OnceTeacher)
    said = use(made, world())
    assert network.asked == 1
    assert all(s.logits is said[0].logits for s in said)


def test_a_live_teacher_would_be_called_at_every_step() -> None:
    network, made = teacher(LiveTeacher)
    use(made, world())
    assert network.asked == 7  # five steps, two splits


def test_it_says_what_a_live_teacher_says() -> None:
    data = world()
    (batch,) = Whole().open(data, seed=1).group(0)
    once, live = (teacher(kind)[1].signal(batch, Needs(teacher_logits=True)).logits for kind in (OnceTeacher, LiveTeacher))
    assert once is not None
    assert live is not None
    assert torch.equal(once, live)
    assert not once.requires_grad


def test_another_graph_is_another_question() -> None:
    network, made = teacher(OnceTeacher)
    use(made, world("inductive"))
    assert network.asked == 2  # the observed graph, and the whole one at test time
    use(made, CSBMData(**SMALL, seed=1).load())  # type: ignore[arg-type]
    assert network.asked == 3


def test_who_asks_nothing_is_told_nothing() -> None:
    network, made = teacher(OnceTeacher)
    (batch,) = Whole().open(world(), seed=1).group(0)
    assert made.signal(batch, Needs()) == Signal(None, {})
    assert network.asked == 0


def test_an_answer_that_an_evaluation_asked_for_serves_training() -> None:
    _, made = teacher(OnceTeacher)
    data = world()
    with torch.inference_mode():
        (batch,) = Whole().open(data, seed=1).group(0)
        made.signal(batch, Needs(teacher_logits=True))
    (batch,) = Whole().open(data, seed=1).group(0)
    said = made.signal(batch, Needs(teacher_logits=True)).logits
    assert said is not None
    weight = torch.ones(3, requires_grad=True)
    (said * weight).sum().backward()  # refused for an inference tensor
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_it_speaks_in_full_precision(dtype: torch.dtype) -> None:
    _, made = teacher(OnceTeacher)
    (batch,) = Whole().open(world(), seed=1).group(0)
    with torch.autocast("cpu", dtype):
        said = made.signal(batch, Needs(teacher_logits=True)).logits
    assert said is not None
    assert said.dtype == torch.float32
