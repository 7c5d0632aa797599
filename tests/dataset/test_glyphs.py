from __future__ import annotations

import pytest
import torch

from kdrun.dataset.glyphs import CONTRAST, SHAPES, GlyphData, roll
from kdrun.dataset.noise import NoiseData
from kdrun.errors import Refused

SMALL = {"n_train": 400, "n_test": 40}


def inputs(data: GlyphData, split: str = "train") -> torch.Tensor:
    return torch.cat([b.inputs for b in data.load().batches(split, 512)])


def test_there_are_eight_classes_about_equally_often() -> None:
    data = GlyphData().load()
    assert (data.classes, data.input_shape) == (8, (3, 16, 16))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1500, "test": 1000}
    counts = torch.bincount(data.split("train").targets, minlength=8)
    assert counts.min() > 187.5 - 4.5 * 12.8  # binomial: mean 187.5, standard deviation 12.8
    assert counts.max() < 187.5 + 4.5 * 12.8


def test_without_noise_an_image_is_its_shape_shifted_and_dimmed() -> None:
    world = GlyphData(noise=0, **SMALL)  # type: ignore[arg-type]
    images, targets, masks = inputs(world), world.load().split("train").targets, world.masks()
    contrast = images.amax((1, 2, 3))
    assert CONTRAST[0] <= contrast.min() < contrast.max() <= CONTRAST[1]
    shifts = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    found = torch.zeros(len(shifts))
    for image, target, c in zip(images, targets, contrast, strict=True):
        assert torch.equal(image[0], image[1])
        moved = roll(masks[target].expand(len(shifts), -1, -1), shifts)
        matches = (moved * c == image[0]).flatten(1).all(1)
        assert matches.sum() == 1
        found += matches
    assert (found > 0).all()  # every shift of up to 3 pixels occurs among 400


def test_no_shape_touches_the_border_it_is_shifted_to() -> None:
    masks = GlyphData().masks()
    assert masks[:, :3].sum() == masks[:, -3:].sum() == masks[:, :, :3].sum() == masks[:, :, -3:].sum() == 0
    assert (masks.flatten(1).sum(1) >= 20).all()
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(SHAPES)


def test_noise_has_its_deviation_and_is_apart_for_every_pixel_and_channel() -> None:
    noise = inputs(GlyphData(**SMALL)) - inputs(GlyphData(noise=0, **SMALL))  # type: ignore[arg-type]
    assert abs(float(noise.std()) - 0.5) < 0.005
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 0.005


def test_a_sample_is_the_same_however_many_there_are() -> None:
    few, many = GlyphData(n_train=20, n_test=5), GlyphData(n_train=50, n_test=9)
    assert torch.equal(inputs(few), inputs(many)[:20])
    assert torch.equal(inputs(few, "test"), inputs(many, "test")[:5])
    assert not torch.equal(inputs(few)[:5], inputs(few, "test"))
    assert not torch.equal(inputs(GlyphData(n_train=20, n_test=5, seed=1)), inputs(few))


def test_every_load_is_the_same_and_a_subset_is_balanced() -> None:
    assert GlyphData(validation=0.1, **SMALL).load().fingerprint == GlyphData(validation=0.1, **SMALL).load().fingerprint  # type: ignore[arg-type]
    assert torch.bincount(GlyphData(subset=80).load().split("train").targets).tolist() == [10] * 8
    with pytest.raises(Refused):
        GlyphData(n_train=10, subset=11).load()


def test_other_sizes_show_the_same_shapes() -> None:
    large = GlyphData(size=32, shift=6).masks()
    small = torch.nn.functional.avg_pool2d(large[:, None], 2)[:, 0]
    assert ((small > 0.5) == (GlyphData().masks() > 0.5)).float().mean() > 0.97


@pytest.mark.parametrize("wrong", [{"size": 4}, {"n_train": 0}, {"shift": 4}, {"shift": -1}, {"noise": -0.1}, {"validation": 1.0}])
def test_a_world_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GlyphData(**wrong)  # type: ignore[arg-type]


def test_noise_images_tell_nothing_of_their_label() -> None:
    data = NoiseData(classes=4, input_shape=[2, 6, 6], n_train=400, n_test=8).load()
    (batch,) = data.batches("train", 400)
    assert batch.inputs.shape == (400, 2, 6, 6)
    assert abs(float(batch.inputs.mean())) < 0.03
    assert abs(float(batch.inputs.std()) - 1) < 0.02
    assert torch.bincount(batch.targets).min() > 60  # binomial: mean 100, standard deviation 8.7
    means = torch.stack([batch.inputs[batch.targets == c].mean(0) for c in range(4)])
    assert means.abs().max() < 0.5  # five standard deviations of a mean of 100
    more = next(iter(NoiseData(classes=4, input_shape=[2, 6, 6], n_train=500).load().batches("train", 500)))
    assert torch.equal(more.inputs[:400], batch.inputs)


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"n_test": 0}, {"input_shape": [3, 0]}, {"input_shape": []}])
def test_noise_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoiseData(**wrong)  # type: ignore[arg-type]
