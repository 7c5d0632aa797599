from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.objective.edgefd import COVERED, TARGETS, EdgeFD
from kdrun.plan.exchange import Upload, average, to_share
from kdrun.student.mlp import mlp
from kdrun.types import Batch, Output, Signal, Term
from tests.objective.toy import PROGRESS, make

# Client A knows the left, client B the right; nobody knows the third point.
PROXY = torch.tensor([[0.5], [9.5], [5.0], [1.9]])
MASKS = torch.tensor([[True, False, False, True], [False, True, False, False]])
SAID = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
Q = torch.tensor([[0.8808, 0.1192], [0.1192, 0.8808], [0.0, 0.0], [0.8808, 0.1192]], dtype=torch.float64)


def uploads(masks: Tensor, share: str = "probs", temperature: float = 1.0) -> list[Upload]:
    ids = torch.arange(4)
    rows = [to_share(SAID[c].expand(4, 2), share, temperature) for c in range(2)]  # type: ignore[arg-type]
    return [Upload(c, ids[masks[c]], rows[c][masks[c]]) for c in range(2)]


def shared(logits: Tensor, targets: Tensor, covered: Tensor) -> Batch:
    ids = torch.arange(len(logits))
    return Batch(logits, torch.full_like(ids, -1), ids, ids, {TARGETS: targets, COVERED: covered})


def terms(objective: EdgeFD, logits: Tensor, batch: Batch) -> dict[str, Term]:
    return objective.terms(Output(logits, {}, {}), Signal(None, {}), batch, "student", torch.nn.ModuleDict())


def distil(logits: Tensor, targets: Tensor, covered: Tensor, temperature: float = 1.0) -> Tensor:
    """What the loop minimises in a distillation step."""
    objective = make("edgefd", temperature=temperature)
    assert isinstance(objective, EdgeFD)
    batch = shared(logits, targets, covered)
    return terms(objective, logits, batch)["kd"].sum / torch.as_tensor(objective.count(batch)[COVERED]).clamp(min=1)


def full(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """An ensemble over all four points: targets [4, 2], 0 where nobody spoke, and the coverage."""
    q = torch.zeros(4, 2, dtype=targets.dtype)
    q[ids] = targets
    return q, torch.isin(torch.arange(4), ids)


def test_the_hand_example() -> None:
    ids, targets = average(uploads(MASKS), "probs", 1.0)
    q, covered = full(ids, targets)
    assert covered.tolist() == [True, True, False, True]
    torch.testing.assert_close(q, Q, rtol=0, atol=5e-5)
    student = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    loss = distil(student, q, covered)
    assert loss.item() == pytest.approx(0.327813325, abs=1e-9)
    loss.backward()
    expected = torch.tensor([[-0.1269, 0.1269], [0.1269, -0.1269], [0.0, 0.0], [-0.1269, 0.1269]], dtype=torch.float64)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=5e-5)


def test_without_a_filter_the_target_is_fedmd_s() -> None:
    ids, targets = average(uploads(torch.ones(2, 4, dtype=torch.bool)), "probs", 1.0)
    assert ids.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(targets, torch.full((4, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("share", ["probs", "logits"])
def test_a_client_that_hears_itself_alone_has_nothing_to_learn(share: str, temperature: float) -> None:
    torch.manual_seed(0)
    network = mlp(5, 3, [8]).double().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        said = to_share(network(x), share, temperature)  # type: ignore[arg-type]
        p = (network(x) / temperature).softmax(1)
    ids, q = average([Upload(0, torch.arange(6), said)], share, temperature)  # type: ignore[arg-type]
    torch.testing.assert_close(q, p, rtol=1e-12, atol=0)
    loss = distil(network(x), q, torch.ones(6, dtype=torch.bool), temperature)
    assert abs(loss.item()) < 1e-14
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() < 1e-14 for parameter in network.parameters())
    assert ids.tolist() == list(range(6))


def test_a_sample_that_nobody_spoke_of_gives_no_loss_and_no_gradient() -> None:
    covered = torch.tensor([True, False])
    for q in ([[0.3, 0.7], [0.0, 0.0]], [[0.3, 0.7], [0.9, 0.1]]):
        student = torch.tensor([[1.0, -1.0], [50.0, 3.0]], dtype=torch.float64, requires_grad=True)
        loss = distil(student, torch.tensor(q, dtype=torch.float64), covered)
        alone = distil(student[:1], torch.tensor(q[:1], dtype=torch.float64), covered[:1])
        assert loss.item() == pytest.approx(alone.item(), rel=1e-15)
        loss.backward()
        assert student.grad is not None
        assert student.grad[1].tolist() == [0.0, 0.0]
        assert student.grad[0].abs().min() > 0.1


def test_if_nobody_spoke_of_anything_nothing_is_nan_and_no_step_is_made() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    loss = distil(student, torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
    objective = EdgeFD()
    empty = shared(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
    for batch, active in ((empty, False), (shared(student, torch.ones(3, 4) / 4, torch.ones(3, dtype=torch.bool)), True), (empty, False)):
        objective.prepare(batch, PROGRESS)
        assert objective.active("student", PROGRESS) is active


def test_the_distillation_term_is_t_squared_times_the_divergence() -> None:
    g = torch.Generator().manual_seed(0)
    z, q = torch.randn(5, 7, generator=g, dtype=torch.float64), torch.rand(5, 7, generator=g, dtype=torch.float64).softmax(1)
    for temperature in (0.5, 1.0, 3.0):
        expected = temperature**2 * F.kl_div((z / temperature).log_softmax(1), q, reduction="batchmean")
        torch.testing.assert_close(distil(z, q, torch.ones(5, dtype=torch.bool), temperature), expected, rtol=1e-12, atol=0)


def test_no_gradient_reaches_what_was_said() -> None:
    q = torch.full((2, 3), 1 / 3, requires_grad=True)
    student = torch.randn(2, 3, requires_grad=True)
    distil(student, q, torch.ones(2, dtype=torch.bool)).backward()
    assert q.grad is None
    assert student.grad is not None


def test_a_private_batch_is_learned_from_its_labels_alone() -> None:
    z, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    ids = torch.arange(4)
    batch = Batch(z, y, ids, ids, {COVERED: torch.zeros(4, dtype=torch.bool)})
    found = terms(EdgeFD(), z, batch)
    assert set(found) == {"ce"}
    assert found["ce"].unit == "label"
    torch.testing.assert_close(found["ce"].sum / 4, F.cross_entropy(z, y))
    assert EdgeFD().count(batch)[COVERED] == 0


def test_targets_are_probabilities_where_probabilities_are_shared() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(50)
    rows = [torch.randn(50, 4, generator=g) for _ in range(3)]
    heard = [torch.rand(50, generator=g) < 0.5 for _ in range(3)]
    for share in ("probs", "logits"):
        found = average(
            [Upload(c, ids[m], to_share(r[m], share, 2.0)) for c, (r, m) in enumerate(zip(rows, heard, strict=True))], share, 2.0
        )  # type: ignore[arg-type]
        assert found.ids.tolist() == ids[heard[0] | heard[1] | heard[2]].tolist()
        torch.testing.assert_close(found.targets.sum(1), torch.ones(len(found.ids)), rtol=0, atol=1e-6)
        assert (found.targets >= 0).all()


def test_the_average_is_that_of_the_clients_that_spoke() -> None:
    a, b = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.1, 0.9]])
    found = average([Upload(0, torch.tensor([7, 3]), a), Upload(1, torch.tensor([7]), b)], "probs", 1.0)
    assert found.ids.tolist() == [3, 7]
    torch.testing.assert_close(found.targets, torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    logits = average(
        [Upload(0, torch.tensor([7]), torch.tensor([[2.0, 0.0]])), Upload(1, torch.tensor([7]), torch.tensor([[0.0, 4.0]]))], "logits", 2.0
    )
    torch.testing.assert_close(logits.targets, torch.tensor([[0.5, -0.5 + 1.5]]).softmax(1))


def test_neither_the_order_of_clients_nor_a_silent_one_changes_a_bit() -> None:
    g = torch.Generator().manual_seed(0)
    said = [Upload(c, torch.arange(c, 40), torch.randn(40 - c, 6, generator=g).softmax(1)) for c in range(8)]
    found = average(said, "probs", 1.0)
    silent = Upload(8, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 6))
    for other in (said[::-1], said[3:] + said[:3], [*said, silent], [silent, *said]):
        again = average(other, "probs", 1.0)
        assert torch.equal(again.ids, found.ids)
        assert torch.equal(again.targets, found.targets)


def test_if_all_are_silent_there_is_no_target() -> None:
    nothing = [Upload(c, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 6)) for c in range(2)]
    for share in ("probs", "logits"):
        found = average(nothing, share, 1.0)  # type: ignore[arg-type]
        assert found.ids.shape == (0,)
        assert found.targets.shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_certain_targets_and_extreme_logits_stay_finite(dtype: torch.dtype, temperature: float) -> None:
    student = (1e4 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).sign()).to(dtype).requires_grad_()
    q = F.one_hot(torch.arange(4), 5).float()
    loss = distil(student, q, torch.ones(4, dtype=torch.bool), temperature)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
