"""Plain regression of class maps: what masked distillation is compared with."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.objective.map_mse import MapMSE
from kdrun.types import Batch, ModelSpec, Output, Signal, Term
from tests.objective.test_pixel_kd import pixels
from tests.objective.toy import context, make


class Ones(nn.Module):
    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        return teacher.new_ones(len(teacher), 5, 5), teacher.new_ones(len(teacher), 5, teacher[0, 0].numel())


def regression(teacher: Tensor, student: Tensor, **values: object) -> dict[str, Term]:
    objective = make("map_mse", student_taps=["map"], teacher_taps=["map"], **values)
    assert isinstance(objective, MapMSE)
    spec = ModelSpec(5, (3, 8, 8), {"map": tuple(teacher.shape[1:])})
    connectors = objective.setup(dataclasses.replace(context(), student=spec, teacher=spec))
    assert not list(connectors.parameters())
    ids = torch.arange(len(teacher))
    output = Output(torch.zeros(len(teacher), 5), {"map": student}, {})
    return objective.terms(output, Signal(None, {"map": teacher}), Batch(ids, ids, ids, ids, {}), "student", connectors)


def test_map_regression_is_the_mean_square_of_each_sample() -> None:
    s, t, _ = pixels(1)
    found = regression(t, s)
    torch.testing.assert_close(found["mse"].sum, (s - t).square().mean((1, 2, 3)).sum(), rtol=1e-12, atol=0)
    assert found["mse"].unit == "sample"
    pooled = regression(t, s, pool=2)["mse"].sum
    torch.testing.assert_close(pooled, F.avg_pool2d(s - t, 2).square().mean((1, 2, 3)).sum(), rtol=1e-12, atol=0)


def test_map_regression_is_acam_with_masks_of_one() -> None:
    s, t, _ = pixels(2)
    objective = make("acam_kd", student_taps=["map"], teacher_taps=["map"])
    spec = ModelSpec(5, (3, 8, 8), {"map": (5, 4, 6)})
    connectors = objective.setup(dataclasses.replace(context(), student=spec, teacher=spec)).double()
    connectors["masks"] = nn.ModuleList([Ones()])
    ids = torch.arange(2)
    output = Output(torch.zeros(2, 5), {"map": s}, {})
    found = objective.terms(output, Signal(None, {"map": t}), Batch(ids, ids, ids, ids, {}), "student", connectors)
    for part in ("channel", "spatial"):
        torch.testing.assert_close(found[part].sum, regression(t, s)["mse"].sum, rtol=1e-12, atol=0)
