from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.engine.records import METRICS, read_lines
from kdrun.losses.divergence import cross_entropy
from kdrun.objective.base import Objective
from kdrun.student.gnn import GNN
from kdrun.types import Batch, Output, Progress, Signal, Term
from tests.conftest import Outcome
from tests.engine.processes import kdrun_to_end
from tests.engine.running import assert_same_run, assert_same_training, run, run_killed
from tests.objective.toy import PROGRESS, make

# The worked example: the path 0 - 1 - 2 with two classes, the label of node 0 known.
Z = torch.tensor([[2, 0], [0, 0], [0, 1]], dtype=torch.float64)
H = torch.tensor([[1, 0], [0, 0], [0, 2]], dtype=torch.float64)
PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
LABELS = torch.tensor([0, -1, -1])
NONE = torch.empty(2, 0, dtype=torch.int64)


def terms(objective: Objective, h: Tensor = H, z: Tensor | None = Z, edges: Tensor = PATH, labels: Tensor = LABELS) -> dict[str, Term]:
    ids = torch.arange(len(h))
    batch = Batch(h, labels, ids, ids, {"edge_index": edges})
    return objective.terms(Output(h, {}, {}), Signal(z, {}), batch, "student", nn.ModuleDict())


def loss(objective: Objective, h: Tensor = H, edges: Tensor = PATH, labels: Tensor = LABELS, z: Tensor | None = Z) -> Tensor:
    """What the loop minimises, by the objective's own counts."""
    ids = torch.arange(len(h))
    counts = objective.count(Batch(h, labels, ids, ids, {"edge_index": edges}))
    weights = objective.weights(PROGRESS)
    parts = [weights[name] * term.sum / max(1, int(counts[term.unit])) for name, term in terms(objective, h, z, edges, labels).items()]
    return torch.stack(parts).sum()


def test_total_of_the_worked_example() -> None:
    assert loss(make("ff_g2m", weight=0.3, temperature=1.5)).item() == pytest.approx(0.238699154, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("ff_g2m", {"weight": 0.0, "use_high": False}, 0.163198748),
        ("ff_g2m", {"weight": 0.0, "use_low": False}, 0.043545035),
        ("glnn", {"weight": 0.0}, 0.049912833),
        ("glnn", {"weight": 0.0, "use_high": True}, 0.049912833 + 0.043545035),
        ("ff_g2m", {"weight": 1.0}, 0.313261688),
        ("glnn", {"weight": 0.3}, 0.3 * 0.313261688 + 0.7 * 0.049912833),
    ],
)
def test_parts_of_the_worked_example(name: str, values: dict[str, Any], expected: float) -> None:
    assert loss(make(name, **values)).item() == pytest.approx(expected, abs=2e-9)


def test_items_are_counted_by_edge_node_and_label() -> None:
    ids = torch.arange(3)
    counts = make("ff_g2m").count(Batch(H, LABELS, ids, ids, {"edge_index": PATH}))
    assert {unit: int(n) for unit, n in counts.items()} == {"sample": 3, "label": 1, "edge": 4, "edge_or_self": 7}
    assert set(make("ff_g2m").units()) == set(counts)


def test_weight_one_is_the_vanilla_mlp() -> None:
    objective = make("ff_g2m", weight=1.0)
    assert not objective.needs().teacher_logits
    assert set(terms(objective, z=None)) == {"ce"}
    assert loss(objective, z=None).item() == pytest.approx(cross_entropy(H, LABELS).sum().item())


def test_weight_zero_never_reads_a_label() -> None:
    objective = make("ff_g2m", weight=0.0)
    nowhere = torch.full((3,), 99)  # no class: whoever looked would fail
    assert set(terms(objective, labels=nowhere)) == {"low", "high"}
    assert loss(objective, labels=nowhere).item() == loss(objective).item()


def test_labels_of_other_nodes_do_not_count() -> None:
    objective = make("ff_g2m", weight=0.5)
    h = H.clone().requires_grad_()
    terms(objective, h)["ce"].sum.backward()
    assert h.grad is not None
    assert h.grad[0].abs().max() > 0
    assert not h.grad[1:].any()


def test_without_edges_it_is_glnn_and_finite() -> None:
    h = H.clone().requires_grad_()
    value = loss(make("ff_g2m", weight=0.3), h, NONE)
    value.backward()
    assert value.item() == pytest.approx(loss(make("glnn", weight=0.3), H, NONE).item(), abs=1e-12)
    assert h.grad is not None
    assert h.grad.isfinite().all()


def test_the_teacher_gets_no_gradient() -> None:
    z, h = Z.clone().requires_grad_(), H.clone().requires_grad_()
    loss(make("ff_g2m", use_node=True), h, z=z).backward()
    assert z.grad is None
    assert h.grad is not None


def test_numbering_of_the_nodes_does_not_matter() -> None:
    order = torch.tensor([2, 0, 1])  # new node k was order[k]
    for name in ("ff_g2m", "glnn"):
        moved = loss(make(name), H[order], order.argsort()[PATH], LABELS[order], Z[order])
        assert moved.item() == pytest.approx(loss(make(name)).item(), abs=1e-12)


def test_what_is_needed_follows_what_is_used() -> None:
    assert make("ff_g2m").needs().extra == ("edge_index",)
    assert make("glnn").needs().extra == ()
    assert make("glnn").needs().teacher_logits


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=0\.5: .*weight=1\.0"):
        make("ff_g2m", weight=0.5, use_low=False, use_high=False)
    assert make("ff_g2m", weight=1.0, use_low=False, use_high=False).weight == 1.0


@pytest.mark.parametrize("name", ["ff_g2m", "glnn"])
def test_a_graph_on_every_rank_is_a_graph_on_one(name: str) -> None:
    """Law 1 as the loop makes it: sums and counts both add up over ranks."""
    objective, h, ids = make(name), H.clone().requires_grad_(), torch.arange(3)
    weights = objective.weights(PROGRESS)
    ranks = [(terms(objective, h), objective.count(Batch(h, LABELS, ids, ids, {"edge_index": PATH}))) for _ in range(2)]
    counts = {unit: sum(int(counted[unit]) for _, counted in ranks) for unit in ranks[0][1]}
    total = torch.stack([weights[k] * term.sum / counts[term.unit] for found, _ in ranks for k, term in found.items()]).sum()
    assert total.item() == pytest.approx(loss(objective).item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, h), torch.autograd.grad(loss(objective, h), h), rtol=1e-12, atol=1e-14)


def test_the_weight_does_not_move() -> None:
    late = Progress(step=90, total_steps=100, steps_per_epoch=1)
    assert make("ff_g2m", weight=0.3).weights(late) == {"ce": 0.3, "node": 0.7, "low": 0.7, "high": 0.7}


# -- the laws, on the real path ------------------------------------------------------------------------------------

TINY = [
    "objective=ff_g2m",
    "dataset=csbm",
    "dataset.nodes=120",
    "dataset.edges=240",
    "dataset.labelled=5",
    "dataset.validation=30",
    "source=whole",
    "evaluation=graph",
    "teacher=mlp",
    "teacher.hidden=[8]",
    "student=mlp",
    "student.hidden=[8]",
    "optim=adamw",
    "optim.name=adam",
    "optim.lr=0.01",
    "optim.epochs=6",
    "hardware=cpu",
    "hardware.threads=1",
    "run.log_every=1",
]
NUMBERS = ("top1", "nll", "kl_teacher", "edge_kl", "neighbour_cosine")
RANKS = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2"]


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    """Law 1: every rank has the whole graph, and sums and counts double together. Without dropout, which ranks draw apart."""
    run(TINY, tmp_path / "one")
    done = kdrun_to_end("train", *TINY, *RANKS, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--quiet")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "two", tmp_path / "one")
    told = [[line for line in read_lines(tmp_path / name / METRICS) if line.get("split") == "test"] for name in ("one", "two")]
    for one, two in zip(*told, strict=True):  # only the first rank evaluates the graph, and every rank knows the result
        assert [one[key] for key in NUMBERS] == pytest.approx([two[key] for key in NUMBERS], rel=1e-4)


@pytest.mark.parametrize("teacher", ["mlp", "gcn"])
def test_a_killed_run_is_resumed_to_the_same_bytes(teacher: str, tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    """Law 2, with dropout and the weights of the best epoch."""
    base = [*(o for o in TINY if o != "teacher=mlp"), f"teacher={teacher}", "student.dropout=0.5", "run.checkpoint_every=2"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "broken", "step_done", 5)
    assert kdrun("resume", str(tmp_path / "broken"), "--quiet").code == 0
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def test_the_graph_network_speaks_once_in_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(self: GNN, x: Tensor, edge_index: Tensor) -> Tensor:
        if not self.training and len(x) == 120:  # in evaluation mode on the graph itself
            calls.append(1)
        return forward(self, x, edge_index)

    base = [*(o for o in TINY if o != "teacher=mlp"), "teacher=gcn"]
    run(base, tmp_path / "first")  # trains the teacher, which is kept
    forward = GNN.forward
    monkeypatch.setattr(GNN, "forward", counted)
    run(base, tmp_path / "second")
    assert len(calls) == 1
