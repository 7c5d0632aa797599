"""Calibration error and selective risk, with the numbers of PS-KD's evaluation (Kim et al., ICCV 2021: 10 bins, AURC x 1000)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kdrun.evaluation.calibration import CalibrationError, selective_risk
from kdrun.evaluation.classification import Classification

CONFIDENCE, HITS = [0.95, 0.85, 0.58, 0.55], [1, 0, 1, 0]


def measured(logits: Tensor, targets: Tensor, sizes: list[int] | None = None) -> dict[str, float]:
    meter = Classification(bins=10, aurc=True).meter(logits.shape[1], "cpu")
    for s, y in zip(logits.split(sizes or len(logits)), targets.split(sizes or len(logits)), strict=True):
        meter.update(s, y)
    return meter.compute()


def binary(confidence: list[float], hits: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits of two classes with the first as likely as said, and targets that make the choice right or wrong."""
    p = torch.tensor(confidence, dtype=dtype)
    return torch.stack([p, 1 - p], dim=1).log(), 1 - torch.tensor(hits)


def calibration(confidence: list[float], dtype: torch.dtype) -> float:
    metric = CalibrationError(10)
    metric.update(torch.tensor(confidence, dtype=dtype).double(), torch.tensor(HITS).double(), torch.ones(4, dtype=torch.float64))
    return 100 * float(metric.compute())


def draw(rows: int = 200, classes: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, classes, generator=g)
    logits[1::3] = logits[::3][: len(logits[1::3])]  # ties
    return logits, torch.randint(classes, (rows,), generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_the_example(dtype: torch.dtype) -> None:
    found = measured(*binary(CONFIDENCE, HITS, dtype))
    assert found["ece"] == pytest.approx(25.75, abs=1e-4 if dtype == torch.float32 else 1e-9)
    assert found["aurc"] == pytest.approx(1000 / 3, abs=1e-9)
    assert found["e_aurc"] == pytest.approx(125.0, abs=1e-9)


def test_a_border_belongs_to_the_bin_below_it() -> None:
    confidence = [0.9, 0.8, 0.6, 0.55]
    assert calibration(confidence, torch.float64) == pytest.approx(26.25, abs=1e-9)
    assert calibration(confidence, torch.float32) == pytest.approx(41.25, abs=1e-4)  # there 0.6 is above the border
    aurc, excess = selective_risk(torch.tensor(confidence, dtype=torch.float64), torch.tensor(HITS))
    assert (1000 * aurc.item(), 1000 * excess.item()) == pytest.approx((1000 / 3, 125.0), abs=1e-9)


def test_certainty_and_no_confidence_at_all_have_a_bin() -> None:
    metric = CalibrationError(10)
    metric.update(torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double(), torch.ones(2).double())
    assert float(metric.compute()) == pytest.approx(0.5)


def test_area_is_the_mean_of_the_running_error_rates() -> None:
    g = torch.Generator().manual_seed(1)
    confidence, hits = torch.rand(50, generator=g, dtype=torch.float64), torch.rand(50, generator=g) < 0.7
    wrong = [not bool(hits[i]) for i in sorted(range(50), key=lambda i: -confidence[i].item())]
    rates = [sum(wrong[:k]) / k for k in range(1, 51)]
    best = sorted(wrong)
    expected = sum(rates) / 50, (sum(rates) - sum(sum(best[:k]) / k for k in range(1, 51))) / 50
    assert [v.item() for v in selective_risk(confidence, hits)] == pytest.approx(expected, abs=1e-12)


def test_the_best_order_has_no_excess_and_no_error_no_risk() -> None:
    confidence = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    assert selective_risk(confidence, torch.tensor([1, 1, 0]))[1].item() == pytest.approx(0, abs=1e-15)
    assert [v.item() for v in selective_risk(confidence, torch.tensor([1, 1, 1]))] == [0, 0]
    assert selective_risk(confidence, torch.tensor([0, 0, 0]))[0].item() == pytest.approx(1)


def test_equal_confidences_give_the_mean_over_their_orders() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.5], dtype=torch.float64)
    found = selective_risk(confidence, torch.tensor([1, 1, 0]))[0].item()
    orders = [
        selective_risk(torch.tensor([0.9, a, b], dtype=torch.float64), torch.tensor([1, 1, 0]))[0].item()
        for a, b in ((0.6, 0.5), (0.5, 0.6))
    ]
    assert found == pytest.approx(sum(orders) / 2, abs=1e-15)


def test_the_split_and_the_order_of_batches_do_not_change_the_risk() -> None:
    logits, targets = draw()
    whole = measured(logits, targets)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(2))
    for sizes in ([150, 50], [1, 198, 1]):
        assert measured(logits[order], targets[order], sizes) == pytest.approx(whole, rel=1e-6)
    found, again = measured(logits, targets), measured(logits[order], targets[order], [60, 140])
    assert (again["aurc"], again["e_aurc"]) == pytest.approx((found["aurc"], found["e_aurc"]), abs=1e-9)


def test_rows_without_a_label_are_no_samples() -> None:
    logits, targets = draw()
    metrics = [CalibrationError(10), CalibrationError(10)]
    confidence, hits = logits.softmax(1).max(1).values.double(), (logits.argmax(1) == targets).double()
    labelled = (torch.arange(len(logits)) % 2 == 0).double()
    metrics[0].update(confidence, hits, labelled)
    metrics[1].update(confidence[::2], hits[::2], torch.ones(len(hits[::2]), dtype=torch.float64))
    assert float(metrics[0].compute()) == pytest.approx(float(metrics[1].compute()), abs=1e-12)


def test_a_diverged_model_has_no_risk() -> None:
    logits, targets = draw()
    logits[3] = torch.nan
    found = measured(logits, targets)
    assert found["aurc"] != found["aurc"]
    assert found["e_aurc"] != found["e_aurc"]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    logits, targets = draw()
    mine = slice(0, 70) if rank == 0 else slice(70, None)
    torch.save(measured(logits[mine], targets[mine]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shares_have_the_risk_of_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    whole = measured(*draw())
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole, rel=1e-9)
