from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from kdrun.dataset.augment import Normalise, PadCropFlip, ResizedCropFlip, Rotate, crop_flip, local_rng, rotate
from kdrun.dataset.base import Request

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def images(count: int, height: int = 8, width: int = 8, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def request(ids: Tensor, view: int = 0, seed: int = 1, augment: bool = True) -> Request:
    return Request(torch.arange(len(ids)), ids, torch.full_like(ids, view), seed, augment)


def pil(image: Tensor) -> Image.Image:
    return TF.to_pil_image(image)


@pytest.mark.parametrize(("padding", "size"), [(4, (8, 8)), (2, (5, 9)), (0, (6, 6)), (9, (4, 4))])
def test_same_offsets_give_torchvisions_pixels(padding: int, size: tuple[int, int]) -> None:
    x = images(40, *size)
    transform = PadCropFlip(Normalise(MEAN, STD), padding, 0.5)
    asked = request(torch.arange(40))
    corner, mirrored = transform.draws(asked)
    assert 0 < int(mirrored.sum()) < 40
    out = transform.batch(x, asked)
    for i in range(40):
        image = TF.crop(TF.pad(pil(x[i]), [padding] * 4), *corner[i].tolist(), *size)
        image = TF.hflip(image) if mirrored[i] else image
        assert torch.equal(out[i], TF.normalize(TF.to_tensor(image), MEAN, STD))


def test_evaluation_is_torchvisions_totensor_and_normalize() -> None:
    x = images(4)
    out = PadCropFlip(Normalise(MEAN, STD), 4, 0.5).batch(x, request(torch.arange(4), augment=False))
    assert torch.equal(out, torch.stack([TF.normalize(TF.to_tensor(pil(i)), MEAN, STD) for i in x]))


def test_padding_is_black_before_normalisation() -> None:
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    out = crop_flip(white, torch.tensor([[0, 0]]), torch.tensor([False]), 2)
    assert out[0, :, :2].eq(0).all()
    assert out[0, :, :, :2].eq(0).all()
    assert out[0, :, 2:, 2:].eq(255).all()


def test_offsets_are_uniform_and_flips_have_their_probability() -> None:
    n, padding = 90_000, 4
    corner, mirrored = PadCropFlip(Normalise(MEAN, STD), padding, 0.3).draws(request(torch.arange(n)))
    cells = torch.bincount((corner[:, 0] * 9 + corner[:, 1]) * 2 + mirrored, minlength=162).double()
    share = torch.tensor([0.7, 0.3], dtype=torch.float64).repeat(81) / 81
    chi2 = ((cells - n * share).square() / (n * share)).sum()
    assert chi2 < 162 + 4 * (2 * 162) ** 0.5  # joint: so top, left and flip are independent of each other


def test_a_view_can_be_replayed_and_belongs_to_its_sample() -> None:
    x, transform = images(16), PadCropFlip(Normalise(MEAN, STD), 4, 0.5)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:16]
    whole = transform.batch(x, request(ids, view=5))
    assert torch.equal(whole, transform.batch(x, request(ids, view=5)))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    parts = torch.cat([transform.batch(x[part], request(ids[part], view=5)) for part in order.split(5)])
    assert torch.equal(whole[order], parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_change_the_view() -> None:
    x, transform = images(64), PadCropFlip(Normalise(MEAN, STD), 4, 0.5)
    asked = request(torch.arange(64))
    here, there = (transform.batch(x.to(device), asked).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)  # a GPU divides by 255 with a reciprocal: the last bit may differ


def test_views_seeds_and_samples_draw_differently() -> None:
    transform, ids = PadCropFlip(Normalise(MEAN, STD), 4, 0.5), torch.arange(100)
    base = torch.cat([d.long().view(100, -1) for d in transform.draws(request(ids))], 1)
    for other in (request(ids, view=1), request(ids, seed=2), request(ids + 100)):
        drawn = torch.cat([d.long().view(100, -1) for d in transform.draws(other)], 1)
        assert (drawn == base).all(1).float().mean() < 0.1  # by chance 1 in 162


@pytest.mark.parametrize("size", [(64, 64), (12, 20)])
def test_the_same_angle_gives_torchvisions_pixels(size: tuple[int, int]) -> None:
    x = images(20, *size)
    transform = Rotate(PadCropFlip(Normalise(MEAN, STD)), 20)
    asked = request(torch.arange(20))
    angles = transform.draws(asked)
    out = transform.batch(x, asked)
    reference = torch.stack([TF.to_tensor(TF.rotate(pil(i), float(a))) for i, a in zip(x, angles, strict=True)])
    reference = TF.normalize(reference, MEAN, STD)
    # Where two pixels are equally near the two may take different ones.
    assert (out != reference).any(1).float().mean() < 1e-3


def test_angles_are_uniform_either_way_and_belong_to_sample_view_and_seed() -> None:
    transform = Rotate(PadCropFlip(Normalise(MEAN, STD), 2, 0.5), 20)
    asked = request(torch.arange(20_000))
    angles = transform.draws(asked)
    cells = torch.histc(angles, 40, -20, 20)
    assert float(angles.abs().max()) <= 20
    assert ((cells - 500).square() / 500).sum() < 40 + 4 * (2 * 40) ** 0.5
    assert torch.equal(transform.draws(request(torch.arange(100, 200))), angles[100:200])
    for other in (request(asked.ids, view=1), request(asked.ids, seed=2)):
        assert abs(float(torch.corrcoef(torch.stack([angles, transform.draws(other)]))[0, 1])) < 4 / 20_000**0.5
    mirrored = transform.then.draws(asked)[1].float()
    assert abs(float(torch.corrcoef(torch.stack([angles, mirrored]))[0, 1])) < 4 / 20_000**0.5


def test_a_rotation_is_left_out_of_evaluation_and_comes_before_crop_and_flip() -> None:
    x, then = images(8), PadCropFlip(Normalise(MEAN, STD), 2, 0.5)
    plain = request(torch.arange(8), augment=False)
    assert torch.equal(Rotate(then, 20).batch(x, plain), then.batch(x, plain))
    asked = request(torch.arange(8))
    assert torch.equal(Rotate(then, 20).batch(x, asked), then.batch(rotate(x, Rotate(then, 20).draws(asked)), asked))
    turned = rotate(x, torch.full((8,), 90.0))
    assert torch.equal(turned, x.rot90(1, (2, 3)))


def test_resized_crop_is_torchvisions_under_the_same_seed() -> None:
    image = pil(images(1, 50, 70)[0])
    transform = ResizedCropFlip(Normalise(MEAN, STD), (32, 32), (0.2, 0.9), (0.5, 2.0), "bicubic", 0.5)
    reference = T.Compose([T.RandomResizedCrop((32, 32), (0.2, 0.9), (0.5, 2.0), T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip()])
    for key in range(8):
        torch.manual_seed(key)
        assert transform.sample(image, key) == reference(image)


@pytest.mark.parametrize(("resize", "how"), [(236, "bicubic"), (256, "bilinear")])
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(resize: int, how: Any) -> None:
    image = pil(images(1, 300, 400)[0])
    out = ResizedCropFlip(Normalise(MEAN, STD), (224, 224), eval_resize=resize, eval_interpolation=how).sample(image, None)
    long_side = int(resize * 400 / 300)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[how]
    left, top = round((long_side - 224) / 2), round((resize - 224) / 2)
    expected = image.resize((long_side, resize), resample).crop((left, top, left + 224, top + 224))
    assert out.size == (224, 224)
    assert out == expected


def test_local_rng_leaves_the_global_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with local_rng(5):
        first = draw()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    expected = draw()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    with pytest.raises(KeyError, match="True"), local_rng(5):
        raise KeyError(draw() == first)
    assert draw() == expected
