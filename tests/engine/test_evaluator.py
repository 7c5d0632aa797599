from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdrun.dataset.stripes import StripesData
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import Evaluator
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.types import Batch, ModelSpec, Needs, Progress, Signal


class Counting:
    """A teacher that counts how often it is asked."""

    spec = ModelSpec(5, (3, 24, 24))
    follows = False

    def __init__(self) -> None:
        self.asked = 0

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        self.asked += 1
        return Signal(torch.zeros(len(batch.ids), 5), {})

    def after_step(self, student: nn.Module, progress: Progress) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Looks(Evaluation):
    def names(self, classes: int | None = None) -> list[str]:
        return ["top1"]

    def measure(self, network: nn.Module, rows: Rows, data: Any, device: torch.device) -> dict[str, float]:
        return {"top1": float(sum(said is not None for _, said in rows))}


class LooksAway(Looks):
    uses_teacher = False


@pytest.mark.parametrize(("evaluation", "asked"), [(Looks, 1), (LooksAway, 0)])
def test_a_teacher_is_asked_once_and_only_where_the_evaluation_looks_at_what_it_says(evaluation: type[Evaluation], asked: int) -> None:
    teacher, data = Counting(), StripesData(n_train=2, n_test=3).load()
    evaluator = Evaluator(data, evaluation(), teacher, torch.device("cpu"), Ranks())
    network: Any = nn.Identity()
    assert [evaluator.measure(network, "test")["top1"] for _ in range(2)] == [asked, asked]
    assert teacher.asked == asked


def test_pixels_and_boxes_are_measured_without_the_teacher() -> None:
    from kdrun.evaluation.detection import Detection
    from kdrun.evaluation.segmentation import Segmentation

    assert not Detection.uses_teacher
    assert not Segmentation.uses_teacher
    assert Evaluation.uses_teacher


@pytest.mark.parametrize(("rows", "world"), [(3, 2), (7, 3), (300, 2)])
def test_every_rank_has_rows_and_all_of_them_are_the_split(rows: int, world: int) -> None:
    """A metric that keeps rows cannot be gathered from a rank that has none."""
    data = StripesData(n_train=2, n_test=rows).load()
    found = []
    for rank in range(world):
        evaluator = Evaluator(data, Looks(), Counting(), torch.device("cpu"), Ranks(rank=rank, world=world))
        found.append([int(i) for batch in evaluator.batches("test") for i in batch.ids])
    assert all(found)
    assert sorted(i for ids in found for i in ids) == data.split("test").ids.tolist()
