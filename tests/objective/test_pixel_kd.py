from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.running import assert_same_training, run
from tests.objective.dense import FROZEN, dense_run
from tests.objective.toy import PROGRESS, logit_terms, make


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


@pytest.mark.parametrize("objective", [["objective=pixel_kd"], ["objective=map_mse", "objective.pool=2", "objective.standardise=true"]])
def test_accumulation_does_not_change_the_training_of_a_segmenter(objective: list[str], tmp_path: Path) -> None:
    base = [*dense_run(tmp_path / "teacher.safetensors"), *objective, *FROZEN, "optim.epochs=1"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[5,2,1]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
