from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.losses.similarity import (
    channel_relations,
    class_similarity,
    relation_similarity,
    row_normalised_gram,
    semantic_similarity,
    semantic_similarity_by_matrices,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def m_r(teacher: Tensor, student: Tensor) -> Tensor:
    return relation_similarity(row_normalised_gram(teacher), row_normalised_gram(student))


MAPS = normal(6, 5, 4, 4), normal(6, 3, 2, 2, seed=1)
SLOPES = normal(7, 9), normal(7, 9, seed=1)


def test_relation_similarity_of_the_worked_example() -> None:
    teacher, student = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[0.707107, 0.707107], [0.447214, 0.894427]], dtype=torch.float64)
    torch.testing.assert_close(row_normalised_gram(student), expected, rtol=0, atol=1e-6)
    assert m_r(teacher, student).item() == pytest.approx(-0.199233, abs=1e-6)


def test_semantic_similarity_of_the_worked_example() -> None:
    teacher, student = torch.tensor([[3.0, 4.0], [1.0, -1.0]]), torch.tensor([[4.0, 3.0], [1.0, 1.0]])
    assert semantic_similarity(teacher, student).item() == pytest.approx(-1.04, abs=1e-12)
    assert semantic_similarity_by_matrices(teacher, student).item() == pytest.approx(-1.04, abs=1e-12)
    of_classes = [-semantic_similarity(teacher[c : c + 1], student[c : c + 1]).item() for c in (0, 1)]
    assert of_classes == pytest.approx([0.08, 2.0], abs=1e-12)


def test_a_network_is_exactly_as_itself() -> None:
    assert m_r(MAPS[0], MAPS[0]).item() == 0
    assert semantic_similarity_by_matrices(SLOPES[0], SLOPES[0]).item() == 0
    assert class_similarity(SLOPES[0], SLOPES[0]).item() == 0
    assert semantic_similarity(SLOPES[0], SLOPES[0]).item() == pytest.approx(0, abs=1e-15)


def test_scores_are_at_most_zero_and_semantics_at_least_minus_four() -> None:
    for seed in range(20):
        teacher, student = normal(4, 5, seed=seed), normal(4, 5, seed=seed + 100)
        assert m_r(teacher, student) < 0
        assert class_similarity(teacher, student) < 0
        assert -4 < semantic_similarity(teacher, student) < 0


@pytest.mark.parametrize("zeros", [False, True])
def test_closed_form_equals_matrix_form(zeros: bool) -> None:
    teacher, student = (slopes.clone() for slopes in SLOPES)
    if zeros:  # features that are dead over the batch: in one network, in both, in all classes
        teacher[2, 3] = teacher[:, 5] = student[:, 5] = student[4] = 0
    closed, matrices = semantic_similarity(teacher, student), semantic_similarity_by_matrices(teacher, student)
    torch.testing.assert_close(closed, matrices, rtol=0, atol=1e-12)
    torch.testing.assert_close(semantic_similarity(teacher.float(), student.float()), matrices, rtol=0, atol=1e-6)


def test_without_zeros_it_is_the_agreement_of_signs_times_the_cosine() -> None:
    teacher, student = SLOPES
    rho = (teacher.sign() * student.sign()).mean(1)
    cosine = torch.cosine_similarity(teacher, student, dim=1)
    torch.testing.assert_close(semantic_similarity(teacher, student), -2 * (1 - rho * cosine).mean(), rtol=0, atol=1e-12)


def test_a_row_of_the_channel_relations_is_the_signed_direction() -> None:
    (a,) = normal(1, 4)
    expected = a.sign()[:, None] * (a / a.norm())
    torch.testing.assert_close(channel_relations(a[None])[0], expected, rtol=1e-12, atol=0)


def test_relations_ignore_scale_order_of_channels_and_rotations_of_the_features() -> None:
    teacher, student = MAPS
    expected = m_r(teacher, student)
    rotation = torch.linalg.qr(normal(student[0].numel(), student[0].numel(), seed=2)).Q
    for changed in (3.5 * student, student[:, [2, 0, 1]], student.flatten(1) @ rotation):
        torch.testing.assert_close(m_r(teacher, changed), expected, rtol=1e-10, atol=0)
    assert abs(m_r(teacher, student + 1) - expected) > 1e-3


def test_semantics_ignore_the_scale_of_each_class() -> None:
    teacher, student = SLOPES
    scale = normal(7, 1, seed=3).exp()
    for score in (semantic_similarity, semantic_similarity_by_matrices):
        torch.testing.assert_close(score(teacher, scale * student), score(teacher, student), rtol=1e-10, atol=0)
    assert abs(semantic_similarity(teacher, -student) - semantic_similarity(teacher, student)) < 1e-12  # both signs and cosine turn


def test_class_relations_compare_networks_of_any_width() -> None:
    teacher, student = normal(7, 9), normal(7, 4, seed=1)
    gram = student @ student.T
    expected = gram / gram.norm(dim=1, keepdim=True)
    torch.testing.assert_close(row_normalised_gram(student), expected, rtol=1e-12, atol=0)
    assert class_similarity(teacher, student) < 0
    torch.testing.assert_close(class_similarity(teacher, 2 * student), class_similarity(teacher, student), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError):
        semantic_similarity(teacher, student)


def test_a_sample_without_features_relates_to_nothing() -> None:
    maps = MAPS[1].clone()
    maps[0] = 0
    relations = row_normalised_gram(maps)
    assert relations.isfinite().all()
    assert relations[0].tolist() == [0] * 6
