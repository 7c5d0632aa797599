from __future__ import annotations

import pytest
import torch

from kdrun.losses.relation import angles, pearson, relative_distances

G = torch.Generator().manual_seed(0)
A, B = (torch.randn(5, 7, generator=G, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("dim", [0, 1])
def test_pearson_is_the_correlation_along_a_dimension(dim: int) -> None:
    rows = zip(A.movedim(dim, -1), B.movedim(dim, -1), strict=True)
    expected = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in rows])
    torch.testing.assert_close(pearson(A, B, dim), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dim", [0, 1])
def test_pearson_ignores_shift_and_positive_scale_of_either_side(dim: int) -> None:
    expected = pearson(A, B, dim)
    torch.testing.assert_close(pearson(3 * A + 2, B, dim), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(pearson(A, 0.5 * B - 1, dim), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(pearson(-A, B, dim), -expected, rtol=0, atol=1e-8)


def test_pearson_of_a_constant_is_zero_with_finite_gradient() -> None:
    flat = torch.full((1, 4), 0.25, requires_grad=True)
    rho = pearson(flat, torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 1)
    rho.sum().backward()
    assert rho.item() == 0
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_distances_are_relative_to_the_mean_of_the_positive_ones() -> None:
    x = torch.tensor([[0, 0], [3, 4], [0, 1]], dtype=torch.float64)
    plain = torch.tensor([[0, 5, 1], [5, 0, 18**0.5], [1, 18**0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(relative_distances(x), plain / (2 * (6 + 18**0.5) / 6), rtol=1e-12, atol=0)


def test_duplicates_do_not_lower_the_mean_distance() -> None:
    x = torch.tensor([[0.0], [0.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(relative_distances(x), torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.float64))


def test_angles_are_cosines_at_the_first_of_the_triplet() -> None:
    x = A[:4]
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                if j != i and k != i:
                    expected[i, j, k] = torch.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
    torch.testing.assert_close(angles(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relation", [relative_distances, angles])
def test_points_that_coincide_have_no_relation_and_finite_gradients(relation) -> None:  # type: ignore[no-untyped-def]
    for count in (1, 3):
        x = torch.ones(count, 2, requires_grad=True)
        value = relation(x)
        value.sum().backward()
        assert not value.any()
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("relation", [relative_distances, angles])
def test_relations_keep_float32_under_autocast(relation) -> None:  # type: ignore[no-untyped-def]
    x = A.float()
    expected = relation(x)
    with torch.autocast("cpu", torch.bfloat16):
        value = relation(x)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize("relation", [relative_distances, angles])
def test_gradients_match_finite_differences(relation) -> None:  # type: ignore[no-untyped-def]
    x = A[:4, :3].clone()
    weights = torch.randn(relation(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: (weights * relation(v)).sum(), [x.requires_grad_()])


def test_gradient_of_pearson_matches_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda a: pearson(a, B, 1), [A.clone().requires_grad_()])
