from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from kdrun.dataset.digits import DigitsData


def test_all_digits_are_there_once() -> None:
    data = DigitsData().load()
    assert data.total_ids == 1797
    assert data.input_shape == (1, 8, 8)
    assert sorted(torch.cat([s.ids for s in data.splits.values()]).tolist()) == list(range(1797))
    pixels = torch.cat([s.storage.inputs for s in data.splits.values()])  # type: ignore[attr-defined]
    assert int(pixels.sum()) == int(torch.from_numpy(load_digits().images).mul(255 / 16).round().sum())
    assert int(pixels.max()) == 255


def test_the_test_split_is_about_a_third_with_every_class_well_there() -> None:
    test = DigitsData().load().split("test")
    assert 0.30 < len(test) / 1797 < 0.37
    assert torch.bincount(test.targets).min() >= 50


def test_every_load_is_the_same() -> None:
    assert DigitsData(validation=0.1).load().fingerprint == DigitsData(validation=0.1).load().fingerprint


def test_a_subset_is_balanced() -> None:
    assert torch.bincount(DigitsData(subset=100).load().split("train").targets).tolist() == [10] * 10


def test_inputs_are_standardised_over_the_training_rows() -> None:
    inputs = torch.cat([b.inputs for b in DigitsData().load().batches("train", 256)]).double()
    assert abs(float(inputs.mean())) < 1e-5
    assert abs(float(inputs.std(correction=0)) - 1) < 1e-5
