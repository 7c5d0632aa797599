from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF

from kdrun import rng
from kdrun.dataset import colour
from kdrun.dataset.augment import Augmented, Normalise, PadCropFlip, ResizedCropFlip, local_rng
from kdrun.dataset.colour import EIGENVALUES, EIGENVECTORS, ColorJitter, lighting
from tests.dataset.test_augment import MEAN, STD, images, request

LIBRARY = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
JITTER = ColorJitter(0.4, 0.4, 0.4, 0.1)


def smooth(count: int, size: int = 16) -> Tensor:
    """Images with flat parts, extremes and grey pixels, beside noise."""
    x = images(count, size, size)
    x[0], x[1], x[2, :, : size // 2] = 0, 255, 128
    x[3] = x[3, :1]
    return x


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("which", "low", "high"), [(0, 0.0, 2.0), (1, 0.0, 2.0), (2, 0.0, 2.0), (3, -0.5, 0.5)])
def test_each_change_is_torchvisions_image_by_image(which: int, low: float, high: float, channels: int) -> None:
    x = smooth(40)[:, :channels]
    factors = low + (high - low) * torch.rand(40, generator=torch.Generator().manual_seed(1))
    out = colour.CHANGES[which](x, factors)
    assert out.dtype == torch.uint8
    reference = torch.stack([LIBRARY[which](image, float(f)) for image, f in zip(x, factors, strict=True)])
    off = (out.int() - reference.int()).abs()
    off = torch.minimum(off, 256 - off) if which == 3 else off
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) < 2e-3


def test_jitter_is_torchvisions_in_the_drawn_order_and_leaves_its_input_alone() -> None:
    x = smooth(60)
    before, asked = x.clone(), request(torch.arange(60))
    out = JITTER.batch(x, asked)
    assert torch.equal(x, before)
    order, factors = JITTER.draws(asked)
    for i in range(60):
        reference = x[i]
        for which in order[i].tolist():
            reference = LIBRARY[which](reference, float(factors[i, which]))
        # A grey level that one step gets otherwise, the next may enlarge.
        assert (out[i].int() - reference.int()).abs().float().mean() < 0.05
        assert int((out[i].int() - reference.int()).abs().max()) <= 4


def test_one_change_alone_is_exact_to_a_grey_level() -> None:
    x, asked = smooth(30), request(torch.arange(30))
    alone = ColorJitter(saturation=0.8)
    _, factors = alone.draws(asked)
    reference = torch.stack([TF.adjust_saturation(image, float(f)) for image, f in zip(x, factors[:, 2], strict=True)])
    assert int((alone.batch(x, asked).int() - reference.int()).abs().max()) <= 1


def test_factors_are_uniform_and_the_orders_equally_likely() -> None:
    n = 24_000
    order, factors = ColorJitter(0.4, 1.5, 0.4, 0.1).draws(request(torch.arange(n)))
    assert factors[:, 1].min() >= 0  # never a negative contrast
    for column, low, high in ((0, 0.6, 1.4), (1, 0.0, 2.5), (2, 0.6, 1.4), (3, -0.1, 0.1)):
        cells = torch.histc(factors[:, column], 20, low, high)
        assert int(cells.sum()) == n
        assert ((cells - n / 20).square() / (n / 20)).sum() < 20 + 4 * 40**0.5
    cells = torch.bincount((order * torch.tensor([64, 16, 4, 1])).sum(1)).double()
    cells = cells[cells > 0]
    assert len(cells) == 24
    assert ((cells - n / 24).square() / (n / 24)).sum() < 24 + 4 * 48**0.5


def test_draws_belong_to_sample_view_and_seed() -> None:
    ids = torch.arange(2000)
    base = JITTER.draws(request(ids))[1]
    assert torch.equal(JITTER.draws(request(ids[500:600]))[1], base[500:600])
    for other in (request(ids, view=1), request(ids, seed=2), request(ids + 2000)):
        drawn = JITTER.draws(other)[1]
        for column in range(4):
            assert abs(float(torch.corrcoef(torch.stack([base[:, column], drawn[:, column]]))[0, 1])) < 4 / 2000**0.5


def test_lighting_adds_alexnets_noise() -> None:
    n, std = 40_000, 0.1
    added = lighting(request(torch.arange(n)), std).double()
    vectors, values = torch.tensor(EIGENVECTORS).double(), torch.tensor(EIGENVALUES).double()
    expected = vectors @ torch.diag((std * values).square()) @ vectors.T
    assert torch.allclose(added.T @ added / n, expected, atol=0.03 * float(expected.max()))
    assert added.mean(0).abs().max() < 4 * std * float(values[0]) / n**0.5
    # They are the principal components: orthonormal to the digits that are published.
    assert torch.allclose(vectors.T @ vectors, torch.eye(3).double(), atol=2e-3)


def test_lighting_comes_before_the_normalisation_and_erasing_after_it() -> None:
    x, asked, crop = images(8), request(torch.arange(8)), PadCropFlip(Normalise(MEAN, STD), 2, 0.5)
    out = Augmented(crop, lighting=0.1).batch(x, asked)
    pixels = crop.place(x, asked).float() / 255 + lighting(asked, 0.1)[:, :, None, None]
    torch.testing.assert_close(out, (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), rtol=1e-5, atol=1e-6)


def test_colours_change_after_the_crop_and_not_in_evaluation() -> None:
    x, crop = images(8), PadCropFlip(Normalise(MEAN, STD), 2, 0.5)
    transform, asked = Augmented(crop, (JITTER,)), request(torch.arange(8))
    assert torch.equal(transform.batch(x, asked), crop.normalise(JITTER.batch(crop.place(x, asked), asked)))
    plain = request(torch.arange(8), augment=False)
    assert torch.equal(transform.batch(x, plain), crop.batch(x, plain))
    assert transform.random
    assert Augmented(PadCropFlip(Normalise(MEAN, STD)), (JITTER,)).random


def test_a_batch_may_be_cut_anywhere() -> None:
    x, ids = images(32), torch.randperm(500, generator=torch.Generator().manual_seed(3))[:32]
    transform = Augmented(PadCropFlip(Normalise(MEAN, STD), 2, 0.5), (JITTER,), 0.1)
    whole = transform.batch(x, request(ids, view=2))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    parts = torch.cat([transform.batch(x[part], request(ids[part], view=2)) for part in order.split([1, 7, 24])])
    assert torch.equal(whole[order], parts)


def test_in_workers_torchvision_jitters_the_same_crop() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    crop = ResizedCropFlip(Normalise(MEAN, STD), (16, 16))
    transform = Augmented(crop, (JITTER,))
    seen = transform.sample(image, 7)
    assert seen == transform.sample(image, 7)
    assert seen != transform.sample(image, 8)
    with local_rng(rng.key(7, "colours")):
        assert seen == T.ColorJitter(0.4, 0.4, 0.4, 0.1)(crop.sample(image, 7))
    assert transform.sample(image, None) == crop.sample(image, None)
    stored = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None]
    assert torch.equal(transform.batch(stored, request(torch.arange(1))), crop.normalise(stored))


def test_the_name_of_a_transform_says_all_its_settings() -> None:
    crop = PadCropFlip(Normalise(MEAN, STD), 2, 0.5)
    names = {repr(Augmented(crop, (dataclasses.replace(JITTER, **change),))) for change in ({}, {"hue": 0.2}, {"contrast": 0.1})}
    assert len({*names, repr(Augmented(crop, (JITTER,), 0.1))}) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_change_the_colours_by_more_than_a_grey_level() -> None:
    x, asked = images(64), request(torch.arange(64))
    for only in ("brightness", "contrast", "saturation", "hue"):
        jitter = ColorJitter(**{only: 0.3})
        here, there = (jitter.batch(x.to(device), asked).cpu().int() for device in ("cpu", "cuda"))
        off = (here - there).abs()
        assert int(off.max()) <= 1
