from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrun.dataset.stripes import CLASS_NAMES, PATCH, PERIOD, SIZE, StripesData
from kdrun.errors import Refused
from kdrun.types import Batch


def drawn(noise: float = 0.0, count: int = 300, part: str = "train", **values: Any) -> Batch:
    data = StripesData(n_train=count, noise=noise, **values).load()
    index = torch.arange(len(data.split(part)))
    return data.rows(part, index, torch.zeros_like(index), seed=0)


def bits(batch: Batch) -> Tensor:
    return batch.inputs[:, 0, 0, 0] > 0


def test_images_and_labels_have_their_shapes() -> None:
    batch = drawn(count=10)
    assert batch.inputs.shape == (10, 3, SIZE, SIZE)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.shape == (10, SIZE, SIZE)
    assert batch.targets.dtype == torch.int64
    assert (batch.targets.min(), batch.targets.max()) == (0, len(CLASS_NAMES) - 1)


def test_the_patch_carries_the_bit_and_the_bit_is_in_every_label() -> None:
    batch = drawn()
    patch = batch.inputs[:, :, :PATCH, :PATCH]
    assert torch.equal(patch, patch[:, :1, :1, :1].expand_as(patch))
    assert set(patch[:, 0, 0, 0].tolist()) == {-1.0, 1.0}
    assert not batch.targets[:, :PATCH, :PATCH].any()
    for image, bright in enumerate(bits(batch).tolist()):
        classes = set(batch.targets[image].unique().tolist()) - {0}
        assert classes <= ({3, 4} if bright else {1, 2})


def test_stripes_run_as_their_class_says() -> None:
    """Inside an object the value repeats after a period along the stripes' change, and does not change across it."""
    batch = drawn()
    value, labels = batch.inputs[:, 0], batch.targets
    for orientation, moved in ((0, lambda x: x[:, 1:] - x[:, :-1]), (1, lambda x: x[:, :, 1:] - x[:, :, :-1])):
        mine = (labels > 0) & ((labels - 1) % 2 == orientation)
        # Neighbours across the stripes that belong to one object mostly; where two objects of a kind touch, phases differ.
        both = (mine[:, 1:] & mine[:, :-1]) if orientation == 0 else (mine[:, :, 1:] & mine[:, :, :-1])
        assert (moved(value)[both].abs() < 1e-5).float().mean() > 0.9
        along = value.roll(-PERIOD, 2 - orientation) - value
        again = mine & mine.roll(-PERIOD, 2 - orientation)
        assert (along[again].abs() < 1e-5).float().mean() > 0.8
    assert value[labels > 0].abs().max() <= 1
    assert not value[:, PATCH:, PATCH:][labels[:, PATCH:, PATCH:] == 0].any()


def test_bits_orientations_and_areas_are_those_of_the_definition() -> None:
    batch = drawn(count=2000)
    spread = 4 * math.sqrt(0.25 / 2000)
    assert abs(float(bits(batch).float().mean()) - 0.5) < spread
    areas = torch.stack([(batch.targets == c).float().mean() for c in range(1, 5)])
    assert (areas - areas.mean()).abs().max() < 0.2 * areas.mean()
    # Three objects whose mean area is (pi + 4) / 2 * E[r^2], part of which is outside the image or hidden.
    whole = 3 * (math.pi + 4) / 2 * (4**2 + 2**2 / 12) / SIZE**2
    assert 0.6 * whole < float(areas.sum()) < whole


def test_noise_has_its_spread_and_leaves_the_labels() -> None:
    clean, noisy = drawn(0.0), drawn(0.8)
    assert torch.equal(clean.targets, noisy.targets)
    noise = noisy.inputs - clean.inputs
    assert float(noise.std()) == pytest.approx(0.8, rel=0.01)
    assert abs(float(noise.mean())) < 4 * 0.8 / math.sqrt(noise.numel())
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 4 * 0.64 / math.sqrt(noise[:, 0].numel())  # channels of their own


def test_a_sample_is_the_same_however_many_there_are() -> None:
    few, many = drawn(0.8, count=5), drawn(0.8, count=50)
    assert torch.equal(few.inputs, many.inputs[:5])
    assert torch.equal(few.targets, many.targets[:5])


def test_training_and_test_images_and_worlds_differ() -> None:
    first, test, other = drawn(count=150), drawn(count=150, part="test"), drawn(count=150, seed=1)
    assert not (first.targets == test.targets).flatten(1).all(1).any()
    assert not (first.targets == other.targets).flatten(1).all(1).any()
    assert StripesData(n_train=9).load().fingerprint == StripesData(n_train=9).load().fingerprint
    assert StripesData(n_train=9).load().fingerprint != StripesData(n_train=9, seed=1).load().fingerprint


def test_a_subset_keeps_the_ids_and_images_of_the_whole() -> None:
    whole, part = StripesData().load(), StripesData(subset=40).load()
    ids = part.split("train").ids
    assert len(ids) == 40
    assert ids.max() < 500
    view = torch.zeros(40, dtype=torch.int64)
    assert torch.equal(part.rows("train", torch.arange(40), view, 0).inputs, whole.rows("train", ids, view, 0).inputs)
    assert torch.equal(part.split("test").ids, whole.split("test").ids)
    assert (part.labels_by_id() >= 0).nonzero().flatten().tolist() == ids.tolist()


def test_a_subset_larger_than_its_split_is_refused() -> None:
    with pytest.raises(Refused, match=r"dataset\.subset"):
        StripesData(n_train=30, subset=40).load()


@pytest.mark.parametrize("values", [{"n_train": 0}, {"n_test": 0}, {"noise": -0.1}, {"validation": 1.0}])
def test_worlds_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        StripesData(**values)
