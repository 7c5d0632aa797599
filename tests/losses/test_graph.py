from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdrun.losses.divergence import cross_entropy, kl_divergence
from kdrun.losses.graph import high_frequency, low_frequency, with_self_loops

# The worked example: the path 0 - 1 - 2 with two classes.
Z = torch.tensor([[2, 0], [0, 0], [0, 1]], dtype=torch.float64)
H = torch.tensor([[1, 0], [0, 0], [0, 2]], dtype=torch.float64)
PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
TAU = 1.5
NONE = torch.empty(2, 0, dtype=torch.int64)


def draw(seed: int = 0, nodes: int = 12, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(student [N, C], teacher [N, C], edges [2, E]): every undirected edge in both directions, no loops, one node without any."""
    g = torch.Generator().manual_seed(seed)
    h, z = (2 * torch.randn(nodes, classes, generator=g, dtype=torch.float64) for _ in range(2))
    joined = torch.triu(torch.rand(nodes, nodes, generator=g) < 0.3, diagonal=1)
    joined[:, -1] = False
    pairs = joined.nonzero().T
    return h, z, torch.cat([pairs, pairs.flip(0)], 1)


def test_the_worked_example() -> None:
    assert (PATH.shape[1], with_self_loops(PATH, 3).shape[1]) == (4, 7)
    assert low_frequency(H, Z, PATH).mean().item() == pytest.approx(0.163198748, abs=1e-9)
    assert high_frequency(H, Z, PATH, TAU).mean().item() == pytest.approx(0.043545035, abs=1e-9)
    assert kl_divergence(H, Z).mean().item() == pytest.approx(0.049912833, abs=1e-9)
    assert cross_entropy(H, torch.tensor([0, -1, -1])).sum().item() == pytest.approx(0.313261688, abs=1e-9)


def test_gradient_of_low_frequency_in_the_worked_example() -> None:
    h = H.clone().requires_grad_()
    low_frequency(h, Z, PATH).mean().backward()
    expected = torch.tensor([[0.011617, -0.011617], [-0.021391, 0.021391], [-0.075791, 0.075791]], dtype=torch.float64)
    torch.testing.assert_close(h.grad, expected, rtol=0, atol=5e-7)


def smooth_targets(z: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of the teacher's probabilities over a node and its neighbours [N, C], how many they are [N])."""
    i, j = with_self_loops(edges, len(z))
    total = torch.zeros_like(z).index_add_(0, i, z.softmax(1)[j])
    degree = torch.bincount(i, minlength=len(z)).to(z.dtype)
    return total / degree[:, None], degree


def test_targets_of_low_frequency_in_the_worked_example() -> None:
    expected = torch.tensor([[0.690399, 0.309601], [0.549913, 0.450087], [0.384471, 0.615529]], dtype=torch.float64)
    torch.testing.assert_close(smooth_targets(Z, PATH)[0], expected, rtol=0, atol=5e-7)


def test_low_frequency_is_cross_entropy_with_the_smoothed_teacher_up_to_a_constant() -> None:
    h, z, edges = draw()
    targets, degree = smooth_targets(z, edges)
    gaps, gradients = [], []
    for student in (h, torch.randn(h.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)):
        s = student.clone().requires_grad_()
        low = low_frequency(s, z, edges).mean()
        smoothed = -(degree / degree.sum() * (targets * s.log_softmax(1)).sum(1)).sum()
        gaps.append((low - smoothed).item())
        gradients.append(torch.autograd.grad(low, s, retain_graph=True)[0])
        torch.testing.assert_close(gradients[-1], torch.autograd.grad(smoothed, s)[0], rtol=1e-10, atol=1e-14)
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-12)
    assert gaps[0] < 0  # minus the mean entropy of the teacher's rows
    at_the_minimum = targets.log().requires_grad_()
    low_frequency(at_the_minimum, z, edges).mean().backward()
    assert at_the_minimum.grad is not None
    assert at_the_minimum.grad.abs().max() < 1e-12
    assert gradients[0].abs().max() > 1e-3


def test_high_frequency_vanishes_where_all_differences_agree() -> None:
    _, z, edges = draw()
    shift = torch.tensor([3.0, -1.0, 0.5, 7.0], dtype=torch.float64)
    for student in (z, z + shift, -z):
        assert high_frequency(student, z, edges, TAU).abs().max().item() == pytest.approx(0, abs=1e-12)


def test_low_frequency_does_not_vanish_at_the_teacher() -> None:
    assert low_frequency(Z, Z, PATH).mean().item() == pytest.approx(0.141807534, abs=1e-9)
    flat = torch.ones_like(Z) * torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert low_frequency(flat, flat, PATH).abs().max().item() == 0  # unless the teacher says the same at both ends


@pytest.mark.parametrize("student", [H + torch.tensor([3.0, -1.0]), -H], ids=["shifted by the same vector", "negated"])
def test_high_frequency_is_free_of_a_shift_and_a_sign(student: Tensor) -> None:
    assert high_frequency(student, Z, PATH, TAU).mean().item() == pytest.approx(0.043545035, abs=1e-9)


def test_without_edges_low_frequency_is_node_to_node_and_high_frequency_is_nothing() -> None:
    h, z, _ = draw()
    torch.testing.assert_close(low_frequency(h, z, NONE), kl_divergence(h, z))
    student = h.clone().requires_grad_()
    nothing = high_frequency(student, z, NONE, TAU)
    assert nothing.shape == (0,)
    nothing.sum().backward()
    assert nothing.sum().item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_numbering_of_the_nodes_does_not_matter() -> None:
    h, z, edges = draw()
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))  # new node k was order[k]
    moved = order.argsort()[edges]
    for loss in (low_frequency, high_frequency):
        assert loss(h[order], z[order], moved).mean().item() == pytest.approx(loss(h, z, edges).mean().item(), abs=1e-12)


def test_turning_one_edge_changes_low_frequency_alone() -> None:
    h, z, edges = draw()
    turned = edges.clone()
    turned[:, 0] = edges[:, 0].flip(0)
    torch.testing.assert_close(high_frequency(h, z, turned, TAU), high_frequency(h, z, edges, TAU), rtol=1e-12, atol=1e-12)
    assert abs(low_frequency(h, z, turned).sum().item() - low_frequency(h, z, edges).sum().item()) > 1e-3
    torch.testing.assert_close(low_frequency(h, z, edges.flip(0)).sum(), low_frequency(h, z, edges).sum())  # both directions are there


def test_temperature_is_of_high_frequency_and_is_not_squared_away() -> None:
    h, z, edges = draw()
    torch.testing.assert_close(high_frequency(h, z, edges, 2.0), high_frequency(h / 2, z / 2, edges, 1.0), rtol=1e-12, atol=1e-12)


def test_values_match_a_sum_written_edge_by_edge() -> None:
    h, z, edges = draw(3)

    def kl(p: Tensor, q: Tensor) -> float:
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))

    low = [kl(z[j].softmax(0), h[i].softmax(0)) for i, j in with_self_loops(edges, len(h)).T.tolist()]
    high = [kl(((z[i] - z[j]).abs() / TAU).softmax(0), ((h[i] - h[j]).abs() / TAU).softmax(0)) for i, j in edges.T.tolist()]
    torch.testing.assert_close(low_frequency(h, z, edges), torch.tensor(low, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(high_frequency(h, z, edges, TAU), torch.tensor(high, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("excluded", ["none", "at every node", "by the teacher at one node"])
def test_extremes_give_finite_values_and_gradients(temperature: float, dtype: torch.dtype, excluded: str) -> None:
    h, z, edges = draw()
    h, z = (1e4 * x.sign().to(dtype) for x in (h, z))
    if excluded == "at every node":
        h[:, 0] = z[:, 0] = -torch.inf
    elif excluded == "by the teacher at one node":
        z[edges[0, 0], 0] = -torch.inf
    h.requires_grad_()
    for values in (low_frequency(h, z, edges), high_frequency(h, z, edges, temperature)):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad(values.sum(), h)
        assert gradient.isfinite().all()


def test_a_class_that_everybody_excludes_does_not_differ_along_an_edge() -> None:
    h, z, edges = draw()
    low, high = h.clone(), z.clone()
    low[:, 0] = high[:, 0] = -torch.inf
    same = [x.clone() for x in (h, z)]
    for x in same:
        x[:, 0] = 1.0
    torch.testing.assert_close(high_frequency(low, high, edges), high_frequency(*same, edges), rtol=1e-12, atol=1e-12)
