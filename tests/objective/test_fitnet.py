from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kdrun.errors import Refused
from kdrun.objective.fitnet import ConvRegressor
from kdrun.types import ModelSpec
from tests.objective.toy import context, make, tap_terms

# The 1-channel maps of the hand-computed example.
FS = torch.tensor([[[1, 0], [0, 1]], [[0, 2], [1, 0]]], dtype=torch.float64)[:, None]
FT = torch.tensor([[[2, 0], [1, 1]], [[0, 1], [1, 1]]], dtype=torch.float64)[:, None]
IDENTITY = nn.ModuleDict({"regressor": nn.Identity()})


def test_mean_squared_error_of_the_example() -> None:
    assert tap_terms(make("fitnet"), "f2", FS, FT, IDENTITY)["hint"].sum.item() / 2 == pytest.approx(0.5, abs=1e-6)


def test_hint_is_a_mean_over_elements_of_a_sample() -> None:
    wide = tap_terms(make("fitnet"), "f2", FS.repeat(1, 5, 3, 3), FT.repeat(1, 5, 3, 3), IDENTITY)["hint"]
    assert wide.sum.item() / 2 == pytest.approx(0.5, abs=1e-6)
    assert wide.unit == "sample"


def test_loss_and_gradient_are_zero_at_agreement() -> None:
    fs = FT.clone().requires_grad_()
    value = tap_terms(make("fitnet"), "f2", fs, FT, IDENTITY)["hint"].sum
    value.backward()
    assert value.item() == 0
    assert fs.grad is not None
    assert not fs.grad.any()


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel"),
    [
        ((3, 8, 8), (5, 4, 4), nn.Conv2d, (3, 3)),  # twice as large
        ((3, 4, 4), (5, 8, 8), nn.ConvTranspose2d, (4, 4)),  # half as large
        ((3, 8, 8), (5, 8, 8), nn.Conv2d, (1, 1)),
        ((3, 8, 8), (5, 3, 3), nn.Conv2d, (6, 6)),
        ((3, 8, 6), (5, 5, 5), nn.Conv2d, (4, 2)),
        ((6,), (7,), nn.Conv2d, (1, 1)),  # vectors
        ((3, 2, 2), (7,), nn.Conv2d, (3, 3)),
    ],
)
def test_regressor_reaches_the_teachers_shape(
    student: tuple[int, ...], teacher: tuple[int, ...], kind: type, kernel: tuple[int, int]
) -> None:
    regressor = ConvRegressor(student, teacher)
    assert type(regressor.conv) is kind
    assert regressor.conv.kernel_size == kernel
    out = regressor(torch.randn(2, *student))
    assert out.shape == (2, *teacher)
    assert (out >= 0).all()  # ReLU


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5, 9, 9)), ((3, 4, 8), (5, 8, 4)), ((3, 4), (5, 4))])
def test_shapes_that_no_convolution_joins_are_refused_with_a_remedy(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    known = context()
    bad = dataclasses.replace(known, student=ModelSpec(5, (3, 8, 8), {"f2": student}), teacher=ModelSpec(5, (3, 8, 8), {"f2": teacher}))
    with pytest.raises(Refused) as refused:
        make("fitnet").setup(bad)
    (problem,) = refused.value.problems
    assert problem.key == "objective.student_tap"
    assert str(student) in problem.what
    assert str(teacher) in problem.what
    assert "objective.student_tap=" in problem.remedy


def test_taps_are_those_of_the_fields() -> None:
    needs = make("fitnet", student_tap="f1", teacher_tap="f3").needs()
    assert (needs.student_taps, needs.teacher_taps, needs.teacher_logits) == (("f1",), ("f3",), False)
