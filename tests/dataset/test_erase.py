from __future__ import annotations

import torch
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF

from kdrun.dataset.augment import Augmented, Normalise, PadCropFlip
from kdrun.dataset.erase import Erase
from tests.dataset.test_augment import MEAN, STD, images, request


def test_the_same_rectangle_gives_torchvisions_pixels() -> None:
    x, asked = images(60, 16, 20), request(torch.arange(60))
    crop, erase = PadCropFlip(Normalise(MEAN, STD), 2, 0.5), Erase(0.5)
    plain, out = crop.batch(x, asked), Augmented(crop, erase=erase).batch(x, asked)
    boxes = erase.draws(asked, (16, 20))
    erased = boxes[:, 2] > 0
    assert 15 < int(erased.sum()) < 45
    for i in range(60):
        top, left, high, wide = boxes[i].tolist()
        reference = TF.erase(plain[i], top, left, high, wide, torch.zeros(1)) if erased[i] else plain[i]
        assert torch.equal(out[i], reference)


def test_rectangles_are_drawn_as_torchvisions() -> None:
    n, size = 20_000, (32, 32)
    boxes = Erase(1.0).draws(request(torch.arange(n)), size)
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 32
    assert boxes[:, 2:].max() < 32
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    theirs = torch.tensor([T.RandomErasing.get_params(torch.zeros(1, *size), (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(n)])
    torch.random.set_rng_state(generator)
    for column in range(4):
        ours, other = (part[:, column].double().sort().values for part in (boxes, theirs))
        assert float((ours - other).abs().mean()) < 0.25  # the distance of the two distributions (Wasserstein-1), pixels
    assert abs(float((boxes[:, 2] * boxes[:, 3]).double().mean() - (theirs[:, 2] * theirs[:, 3]).double().mean())) < 3


def test_the_probability_holds_and_draws_belong_to_sample_view_and_seed() -> None:
    ids, erase = torch.arange(20_000), Erase(0.25)
    base = erase.draws(request(ids), (32, 32))
    share = float((base[:, 2] > 0).float().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    assert torch.equal(erase.draws(request(ids[100:200]), (32, 32)), base[100:200])
    for other in (request(ids, view=1), request(ids, seed=2), request(ids + 20_000)):
        both = (base[:, 2] > 0) & (erase.draws(other, (32, 32))[:, 2] > 0)
        assert abs(float(both.float().mean()) - 1 / 16) < 0.01


def test_noise_is_standard_normal_and_replayed() -> None:
    x, erase = torch.full((400, 3, 16, 16), 9.0), Erase(1.0, "random")
    asked = request(torch.arange(400))
    out = erase(x, asked)
    noise = out[out != 9]
    assert abs(float(noise.mean())) < 4 / len(noise) ** 0.5
    assert abs(float(noise.std()) - 1) < 0.02
    parts = torch.cat([erase(x[part], request(part)) for part in torch.arange(400).split(150)])
    assert torch.equal(out, parts)
    assert not torch.equal(out, erase(x, request(torch.arange(400), view=1)))
    assert x.eq(9).all()


def test_a_rectangle_that_never_fits_is_left_out() -> None:
    x = torch.ones(50, 1, 1, 40)  # no height below 1
    assert torch.equal(Erase(1.0)(x, request(torch.arange(50))), x)
