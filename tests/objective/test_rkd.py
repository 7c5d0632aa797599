from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.objective.toy import add_up, make, tap_terms

ES = torch.tensor([[0, 0], [3, 4], [0, 1]], dtype=torch.float64)
ET = torch.tensor([[0, 0], [1, 0], [0, 2]], dtype=torch.float64)


def values(es: Tensor, et: Tensor) -> tuple[float, float]:
    terms = tap_terms(make("rkd"), "pooled", es, et, nn.ModuleDict())
    return terms["distance"].sum.item() / len(es) ** 2, terms["angle"].sum.item() / len(es) ** 3


def test_values_of_the_example() -> None:
    distance, angle = values(ES, ET)
    assert distance == pytest.approx(0.169323, abs=1e-6)
    assert angle == pytest.approx(0.116209, abs=1e-6)


def test_loss_of_the_example_is_25_distance_and_50_angle() -> None:
    objective = make("rkd", ce_weight=0.0)
    loss = add_up(objective, tap_terms(objective, "pooled", ES, ET, nn.ModuleDict()), samples=3)
    assert loss.item() == pytest.approx(10.043490, abs=1e-6)


def test_units_are_pair_and_triplet() -> None:
    terms = tap_terms(make("rkd"), "pooled", ES, ET, nn.ModuleDict())
    assert (terms["distance"].unit, terms["angle"].unit) == ("pair", "triplet")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rotation_translation_and_scale_of_either_side_change_nothing(side: str) -> None:
    g = torch.Generator().manual_seed(0)
    es, et = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    moved = 3.7 * (es if side == "student" else et) @ rotation + torch.tensor([5.0, -1, 2, 0])
    pair = (moved, et) if side == "student" else (es, moved)
    assert values(*pair) == pytest.approx(values(es, et), abs=1e-12)


def test_widths_need_not_agree() -> None:
    assert values(ES, torch.cat([ET, torch.zeros(3, 5)], dim=1)) == pytest.approx(values(ES, ET), abs=1e-12)


def test_loss_and_gradient_are_zero_at_agreement() -> None:
    es = ET.clone().requires_grad_()
    terms = tap_terms(make("rkd"), "pooled", es, ET, nn.ModuleDict())
    value = terms["distance"].sum + terms["angle"].sum
    value.backward()
    assert value.item() == 0
    assert es.grad is not None
    assert not es.grad.any()


def test_points_that_coincide_in_the_student_keep_a_bounded_gradient() -> None:
    es = torch.tensor([[0.0, 0], [0, 0], [3, 4]], requires_grad=True)
    terms = tap_terms(make("rkd"), "pooled", es, ET.float(), nn.ModuleDict())
    (terms["distance"].sum + terms["angle"].sum).backward()
    assert es.grad is not None
    assert es.grad.abs().max() < 10
