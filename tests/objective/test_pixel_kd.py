from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.objective.map_mse import MapMSE
from kdrun.types import Batch, ModelSpec, Output, Signal, Term
from tests.engine.running import assert_same_training, run
from tests.objective.dense import FROZEN, dense_run
from tests.objective.toy import PROGRESS, context, logit_terms, make


def pixels(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(2, 5, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(5, (2, 4, 6), generator=g)
    return s, t, targets.masked_fill(torch.rand(2, 4, 6, generator=g) < 0.3, -1)


def as_rows(s: Tensor, t: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The labelled pixels as samples of a classifier."""
    labelled = targets >= 0
    return s.permute(0, 2, 3, 1)[labelled], t.permute(0, 2, 3, 1)[labelled], targets[labelled]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_labelled_pixel_is_a_sample_of_kd(temperature: float) -> None:
    ours = logit_terms(make("pixel_kd", temperature=temperature), *pixels())
    kd = logit_terms(make("kd", temperature=temperature), *as_rows(*pixels()))
    for name in ("ce", "kd"):
        torch.testing.assert_close(ours[name].sum, kd[name].sum, rtol=1e-12, atol=0)
        assert ours[name].unit == "label"


def test_an_image_without_labels_adds_nothing() -> None:
    s, t, targets = pixels()
    empty = logit_terms(make("pixel_kd"), s, t, torch.full_like(targets, -1))
    assert [term.sum.item() for term in empty.values()] == [0.0, 0.0]


def test_weights_are_those_of_the_fields() -> None:
    assert make("pixel_kd", ce_weight=0.5, kd_weight=2.0).weights(PROGRESS) == {"ce": 0.5, "kd": 2.0}
    assert not make("pixel_kd", kd_weight=0.0).needs().teacher_logits


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


class Ones(nn.Module):
    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        return teacher.new_ones(len(teacher), 5, 5), teacher.new_ones(len(teacher), 5, teacher[0, 0].numel())


@pytest.mark.parametrize("objective", [["objective=pixel_kd"], ["objective=map_mse", "objective.pool=2", "objective.standardise=true"]])
def test_accumulation_does_not_change_the_training_of_a_segmenter(objective: list[str], tmp_path: Path) -> None:
    base = [*dense_run(tmp_path / "teacher.safetensors"), *objective, *FROZEN, "optim.epochs=1"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[5,2,1]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
