from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.dataset.csbm import CSBMData
from kdrun.errors import Refused, RunFailed
from kdrun.evaluation.base import Rows
from kdrun.evaluation.classification import Classification
from kdrun.evaluation.graph import GraphClassification, neighbour_cosine
from kdrun.evaluation.metrics import kind
from kdrun.losses.graph import high_frequency
from kdrun.types import Batch

PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # of the nodes 0 - 1 - 2; node 3 is alone
CPU = torch.device("cpu")


class Says(nn.Module):
    """A network that says what it is told to."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def data() -> Data:
    return CSBMData(nodes=60, edges=90, classes=3, features=5, labelled=4, validation=12).load()


def batch(targets: list[int], edges: Tensor = PATH) -> Batch:
    ids = torch.arange(len(targets))
    return Batch(torch.zeros(len(targets), 5), torch.tensor(targets), ids, ids, {"edge_index": edges})


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(4, 3, generator=g) for _ in range(2))
    return student, teacher


def measured(student: Tensor, rows: Rows) -> dict[str, float]:
    return GraphClassification(top_k=(1,)).measure(Says(student), rows, data(), CPU)


def test_nodes_without_a_label_do_not_count() -> None:
    student, teacher = draw()
    found = measured(student, [(batch([2, -1, 0, -1]), teacher)])
    meter = Classification(top_k=(1,)).meter(3, CPU)
    meter.update(student[[0, 2]], torch.tensor([2, 0]), teacher[[0, 2]])
    expected = meter.compute()
    assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_diagnostics_look_at_all_nodes_and_edges() -> None:
    student, teacher = draw()
    found = measured(student, [(batch([2, -1, -1, -1]), teacher)])
    assert found["edge_kl"] == pytest.approx(high_frequency(student, teacher, PATH).mean().item(), rel=1e-6)
    p = student.softmax(1)
    cosines = [torch.cosine_similarity(p[i], around, 0) for i, around in ((0, p[1]), (1, p[0] + p[2]), (2, p[1]))]
    assert found["neighbour_cosine"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-6)
    torch.testing.assert_close(neighbour_cosine(student, PATH), torch.stack(cosines), rtol=1e-6, atol=0)
    several = measured(student, [(batch([2, -1, -1, -1]), teacher)] * 3)
    assert several["edge_kl"] == pytest.approx(found["edge_kl"])


def test_a_student_that_says_what_the_teacher_says_is_at_no_distance() -> None:
    _, teacher = draw()
    found = measured(teacher + torch.tensor([3.0, -1.0, 0.5]), [(batch([0, 1, 2, 0]), teacher)])
    assert found["edge_kl"] == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_or_an_edge_a_diagnostic_is_left_out() -> None:
    student, teacher = draw()
    assert "edge_kl" not in measured(student, [(batch([0, 1, 2, 0]), None)])
    lonely = measured(student, [(batch([0, 1, 2, 0], torch.empty(2, 0, dtype=torch.int64)), teacher)])
    assert not {"edge_kl", "neighbour_cosine"} & set(lonely)
    assert "top1" in lonely


def test_every_name_is_measured_and_has_a_kind() -> None:
    student, teacher = draw()
    found = measured(student, [(batch([0, 1, 2, 0]), teacher)])
    assert set(found) == set(GraphClassification(top_k=(1,)).names(3))
    assert all(kind(name) for name in found)
    cosine, distance = kind("neighbour_cosine"), kind("edge_kl")
    assert cosine is not None
    assert distance is not None
    assert cosine.higher_is_better
    assert (distance.higher_is_better, distance.unit) == (False, "nats")


def test_the_network_is_asked_once_with_its_edges() -> None:
    class Counting(Says):
        takes = ("edge_index",)
        asked = 0

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            assert torch.equal(edge_index, PATH)
            self.asked += 1
            return self.logits

    network = Counting(draw()[0])
    GraphClassification(top_k=(1,)).measure(network, [(batch([0, 1, 2, 0]), None)], data(), CPU)
    assert network.asked == 1


def test_half_precision_does_not_overflow_and_extremes_stay_finite() -> None:
    student, teacher = (1e4 * x.sign() for x in draw())
    found = measured(student.half(), [(batch([0, 1, 2, 0]), teacher.bfloat16())])
    assert math.isfinite(found["edge_kl"])
    assert math.isfinite(found["neighbour_cosine"])


def test_a_split_without_labels_and_a_primary_of_another_name_are_refused() -> None:
    with pytest.raises(RunFailed, match="saw no sample"):
        measured(draw()[0], [(batch([-1, -1, -1, -1]), None)])
    assert GraphClassification(primary="edge_kl").primary == "edge_kl"
    with pytest.raises(Refused, match="neighbour_cosine"):
        GraphClassification(primary="neighbor_cosine")
