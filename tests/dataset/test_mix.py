from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import beta, kstest
from torch import Tensor
from torchvision.transforms.v2 import CutMix, MixUp

from kdrun.dataset.base import Data, taken
from kdrun.dataset.images import ImageData
from kdrun.dataset.mix import OWN_SHARE, PARTNER, Drawn, MixedSplit, Mixing, boxes_of, mix
from tests.dataset.builders import splits, write_parquet
from tests.dataset.test_augment import request

SHAPE = (3, 32, 32)
ROWS = 24


def pictures(folder: Path, **settings: Any) -> Data:
    write_parquet(folder, splits(ROWS, 6), image="image")
    given = {"input_shape": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "padding": 2, "flip": 0.5, "workers": 0, **settings}
    return ImageData("x", path=str(folder), **given).load()


def random_images(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_is_torchvisions_for_a_given_share(lam: float) -> None:
    x, y = random_images(8), torch.arange(8)
    library = MixUp(num_classes=10)
    library.make_params = lambda inputs: {"lam": lam}  # type: ignore[method-assign]
    theirs, soft = library(x, y)
    drawn = Drawn(torch.zeros(8), torch.full((8,), lam), torch.zeros(8, 4, dtype=torch.int64))
    assert torch.equal(mix(x, x.roll(1, 0), drawn, cuts=False), theirs)
    assert torch.equal(mix(x, x.roll(1, 0), drawn, cuts=True), theirs)
    assert torch.equal(lam * torch.eye(10)[y] + (1 - lam) * torch.eye(10)[y.roll(1)], soft)


@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_cutmix_is_torchvisions_for_a_given_share_and_centre(size: tuple[int, int]) -> None:
    height, width = size
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    library = CutMix(num_classes=10)
    u = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)).double()
    boxes = boxes_of(u[:, 0], u[:, 1], u[:, 2], height, width)
    for i in range(200):
        lam, centre = float(u[i, 0]), [int(u[i, 2] * width), int(u[i, 1] * height)]  # torchvision asks for x first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library._dist, "sample", lambda shape, lam=lam: lam)
            patch.setattr(torch, "randint", lambda high, size, centre=centre: torch.tensor([centre.pop(0)]))
            params = library.make_params([x])
        x1, y1, x2, y2 = params["box"]
        assert boxes[i].tolist() == [y1, x1, y2 - y1, x2 - x1]
        share = 1 - float(boxes[i, 2] * boxes[i, 3]) / (height * width)
        assert share == params["lam_adjusted"]
        drawn = Drawn(torch.zeros(2), torch.full((2,), share), boxes[i].repeat(2, 1))
        theirs = library.transform(x, {**params, "labels": None, "batch_size": 2})
        assert torch.equal(mix(x, x.roll(1, 0), drawn, cuts=True), theirs)


def test_the_share_is_the_area_that_was_not_cut() -> None:
    asked = request(torch.arange(500))
    drawn = Mixing(cutmix=1.0).draws(asked, 10_000, SHAPE)
    mixed = mix(torch.ones(500, *SHAPE), torch.zeros(500, *SHAPE), drawn, cuts=True)
    assert torch.equal(mixed.mean((1, 2, 3)), drawn.share)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed_and_partners_uniform(alpha: float) -> None:
    n = 20_000
    drawn = Mixing(mixup=alpha).draws(request(torch.arange(n)), 50, SHAPE)
    # As float32 a share next to 1 is 1, which for alpha = 0.2 some are: the rest has the distribution below.
    below, law = drawn.share[drawn.share < 0.99].numpy(), beta(alpha, alpha)
    assert kstest(below, lambda x: law.cdf(x) / law.cdf(0.99)).pvalue > 1e-4
    assert abs(len(below) / n - law.cdf(0.99)) < 4 * 0.5 / n**0.5
    partners, share = drawn.partners[drawn.share < 1], drawn.share[drawn.share < 1]
    cells, expected = torch.bincount(partners, minlength=50).double(), len(partners) / 50
    assert ((cells - expected).square() / expected).sum() < 50 + 4 * 100**0.5
    assert abs(float(torch.corrcoef(torch.stack([partners.float(), share]))[0, 1])) < 4 / n**0.5


def test_both_switch_and_some_rows_stay_as_often_as_is_said() -> None:
    n, asked = 20_000, request(torch.arange(20_000))
    drawn = Mixing(1.0, 1.0, probability=0.6, switch=0.25).draws(asked, n, SHAPE)
    alone, cut = drawn.share == 1, drawn.boxes[:, 2] * drawn.boxes[:, 3] > 0
    whole = Mixing(1.0, 1.0, probability=0.6, switch=0.0).draws(asked, n, SHAPE)
    assert abs(float((whole.share == 1).float().mean()) - 0.4) < 4 * 0.5 / n**0.5
    assert abs(float(cut.float().mean()) - 0.6 * 0.25) < 0.015  # a few boxes have no area
    assert torch.equal(drawn.partners[alone], asked.positions[alone])  # so that its label counts once
    assert not Mixing(1.0, 1.0, probability=0.0).draws(asked, n, SHAPE).boxes.any()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.7}], ids=str)
def test_a_mixed_row_is_made_of_what_both_are_alone(settings: dict[str, float], resident: bool, tmp_path: Path) -> None:
    mixed, plain = pictures(tmp_path, resident=resident, **settings), pictures(tmp_path, resident=resident)
    assert isinstance(mixed.split("train"), MixedSplit)
    every, view = torch.arange(ROWS), torch.full((ROWS,), 3)
    found = mixed.rows("train", every, view, seed=5)
    drawn = mixed.split("train").storage.draws(mixed.split("train").request(every, view, 5, True))  # type: ignore[attr-defined]
    own = plain.rows("train", every, view, seed=5)
    partner = plain.rows("train", drawn.partners, view, seed=5)  # asked for alone, with the same view
    assert torch.equal(found.inputs, mix(own.inputs, partner.inputs, drawn, "cutmix" in settings))
    assert torch.equal(found.targets, own.targets)
    assert torch.equal(found.extra[PARTNER + "targets"], partner.targets)
    assert torch.equal(found.extra[OWN_SHARE], drawn.share)
    assert not torch.equal(found.inputs, own.inputs)


@pytest.mark.parametrize("where", [{"resident": True}, {"resident": False}, {"resident": False, "workers": 2}], ids=str)
@pytest.mark.parametrize("more", [{}, {"rand_augment": [2, 9], "erasing": 0.5, "lighting": 0.1}], ids=["mixed", "augmented"])
def test_a_mixed_row_is_a_function_of_seed_view_and_id(where: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    data = pictures(tmp_path, mixup=1.0, cutmix=1.0, mix_probability=0.8, **where, **more)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    whole = data.rows("train", torch.arange(ROWS), torch.full((ROWS,), 2), seed=1)
    plan = [(part, torch.full_like(part, 2)) for part in order.split([1, 7, 16])]
    for batches in (list(data.stream("train", plan, seed=1)), [data.rows("train", *piece, seed=1) for piece in plan]):
        assert torch.equal(torch.cat([b.inputs for b in batches]), whole.inputs[order])
        for row in (OWN_SHARE, PARTNER + "targets"):
            assert torch.equal(torch.cat([b.extra[row] for b in batches]), whole.extra[row][order])
    for view, seed in ((3, 1), (2, 2)):
        other = data.rows("train", torch.arange(ROWS), torch.full((ROWS,), view), seed=seed)
        assert (other.extra[OWN_SHARE] != whole.extra[OWN_SHARE]).float().mean() > 0.5


def test_evaluation_and_other_splits_are_never_mixed(tmp_path: Path) -> None:
    mixed, plain = pictures(tmp_path, mixup=1.0, validation=0.3), pictures(tmp_path, validation=0.3)
    for split in ("train", "validation", "test"):
        for a, b in zip(mixed.batches(split, 5), plain.batches(split, 5), strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert a.extra == {}
    index = torch.arange(3)
    for split in ("validation", "test"):
        assert torch.equal(mixed.rows(split, index, index, seed=1).inputs, plain.rows(split, index, index, seed=1).inputs)


def test_partners_of_some_rows_are_from_among_them(tmp_path: Path) -> None:
    data = pictures(tmp_path, mixup=1.0)
    some = torch.tensor([3, 4, 9, 20])
    part = taken(data.split("train"), some)
    asked = part.request(torch.arange(4), torch.zeros(4, dtype=torch.int64), 1, True)
    drawn = part.storage.draws(asked)  # type: ignore[attr-defined]
    assert drawn.partners.max() < 4
    batch = part.batch(asked, part.storage.fetch(asked, torch.device("cpu")), torch.device("cpu"))
    assert torch.equal(batch.extra[PARTNER + "targets"], data.split("train").targets[some][drawn.partners])
    plain = taken(pictures(tmp_path).split("train"), some)
    both = [
        plain.storage.fetch(plain.request(p, torch.zeros(4, dtype=torch.int64), 1, True), torch.device("cpu"))
        for p in (torch.arange(4), drawn.partners)
    ]
    assert torch.equal(batch.inputs, mix(*both, drawn, cuts=False))


def test_further_rows_of_the_partner_come_along(tmp_path: Path) -> None:
    data = pictures(tmp_path, mixup=1.0, columns={"image": "image", "again": "label"})
    batch = data.rows("train", torch.arange(8), torch.zeros(8, dtype=torch.int64), seed=1)
    assert torch.equal(batch.extra[PARTNER + "again"].flatten(), batch.extra[PARTNER + "targets"])


def test_vectors_are_mixed_too() -> None:
    own, partner = torch.ones(4, 5), torch.zeros(4, 5)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(mix(own, partner, Drawn(torch.zeros(4), share, torch.zeros(4, 4)), False), share[:, None].expand(4, 5))
