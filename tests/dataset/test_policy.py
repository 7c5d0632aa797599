from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode, autoaugment

from kdrun import rng
from kdrun.dataset.augment import Augmented, Normalise, PadCropFlip, ResizedCropFlip, local_rng
from kdrun.dataset.policy import LEVELS, RAND_LEVELS, RAND_OPERATIONS, SIGNED, AutoAugment, Learned, RandAugment, apply, magnitude
from tests.dataset.test_augment import MEAN, STD, request
from tests.dataset.test_colour import smooth

POLICIES: tuple[Learned, ...] = ("imagenet", "cifar10", "svhn")


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_magnitudes_are_torchvisions(size: tuple[int, int]) -> None:
    learned = T.AutoAugment()._augmentation_space(LEVELS, size)
    drawn = T.RandAugment()._augmentation_space(RAND_LEVELS, size)
    assert tuple(drawn) == RAND_OPERATIONS
    for space, levels in ((learned, LEVELS), (drawn, RAND_LEVELS)):
        for name, (values, signed) in space.items():
            assert signed == (name in SIGNED)
            for level in range(levels):
                assert magnitude(name, level, levels, size) == (float(values[level]) if values.ndim else 0.0)


def library(image: torch.Tensor, operation: tuple[str, float] | None) -> torch.Tensor:
    return image if operation is None else autoaugment._apply_op(image, *operation, InterpolationMode.NEAREST, None)


@pytest.mark.parametrize("policy", [*map(AutoAugment, POLICIES), RandAugment(2, 9), RandAugment(3, 30)], ids=str)
@pytest.mark.parametrize("channels", [3, 1])
def test_a_batch_is_torchvisions_image_by_image(policy: Any, channels: int) -> None:
    x = smooth(200, 20)[:, :channels]
    before, asked = x.clone(), request(torch.arange(200))
    out = policy.batch(x, asked)
    assert torch.equal(x, before)
    steps = policy.operations(asked, (20, 20))
    for i in range(200):
        reference = x[i]
        for step in steps:
            reference = library(reference, step[i])
        # Of several operations a later one may make much of a grey level that an earlier one got otherwise.
        off = (out[i].int() - reference.int()).abs()
        assert float((off > 1).float().mean()) < 0.02
        assert torch.equal(out[i], apply(x[i : i + 1], [[step[i]] for step in steps])[0])
    names = {step[i][0] for step in steps for i in range(200) if step[i]}
    assert len(names) > 8


def test_every_operation_alone_is_torchvisions_to_a_grey_level() -> None:
    x, exact = smooth(12, 20), 0
    for name in (*RAND_OPERATIONS[1:], "Invert"):
        for sign in (1, -1) if name in SIGNED else (1,):
            drawn = (name, sign * magnitude(name, 7, LEVELS, (20, 20)))
            out = apply(x, [[drawn if i % 2 else None for i in range(12)]])
            assert torch.equal(out[::2], x[::2])
            reference = torch.stack([library(x[i], drawn) for i in range(1, 12, 2)])
            assert int((out[1::2].int() - reference.int()).abs().max()) <= 1
            exact += torch.equal(out[1::2], reference)
    assert exact >= 20  # of 24


@pytest.mark.parametrize("name", POLICIES)
def test_pairs_are_equally_likely_and_operations_have_their_probability_and_both_signs(name: Learned) -> None:
    n = 50_000
    steps = AutoAugment(name).operations(request(torch.arange(n)), (32, 32))
    pairs = T.AutoAugment(autoaugment.AutoAugmentPolicy(name)).policies
    expected: list[Counter[tuple[str, float] | None]] = [Counter(), Counter()]
    for pair in pairs:
        for place, (operation, probability, level) in enumerate(pair):
            by = magnitude(operation, level or 0, LEVELS, (32, 32))
            signs = (1, -1) if operation in SIGNED else (1,)
            for sign in signs:
                expected[place][operation, sign * by] += probability / len(pairs) / len(signs)
            expected[place][None] += (1 - probability) / len(pairs)
    for step, shares in zip(steps, expected, strict=True):
        found = Counter(step)
        assert set(found) <= {key for key, share in shares.items() if share > 0}
        chi2 = sum((found[key] - n * share) ** 2 / (n * share) for key, share in shares.items() if share > 1e-9)
        assert chi2 < len(shares) + 4 * (2 * len(shares)) ** 0.5


def test_randaugments_operations_are_uniform_and_independent() -> None:
    n = 30_000
    first, second = RandAugment(2, 9).operations(request(torch.arange(n)), (32, 32))
    kinds = sum(2 if name in SIGNED else 1 for name in RAND_OPERATIONS)
    assert len(set(first)) == kinds
    for step in (first, second):
        found = Counter(name for name, _ in step)  # type: ignore[misc]
        share = n / len(RAND_OPERATIONS)
        assert sum((count - share) ** 2 / share for count in found.values()) < 14 + 4 * 28**0.5
    together = sum(a[0] == b[0] for a, b in zip(first, second, strict=True)) / n  # type: ignore[index]
    assert abs(together - 1 / 14) < 4 * (1 / 14 / n) ** 0.5


@pytest.mark.parametrize("policy", [AutoAugment("cifar10"), RandAugment(2, 14)], ids=str)
def test_a_view_belongs_to_its_sample_however_a_batch_is_cut(policy: Any) -> None:
    x, ids = smooth(32), torch.randperm(500, generator=torch.Generator().manual_seed(3))[:32]
    transform = Augmented(PadCropFlip(Normalise(MEAN, STD), 2, 0.5), (policy,))
    whole = transform.batch(x, request(ids, view=2))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    parts = torch.cat([transform.batch(x[part], request(ids[part], view=2)) for part in order.split([1, 7, 24])])
    assert torch.equal(whole[order], parts)
    for other in (request(ids, view=3), request(ids, view=2, seed=2), request(ids + 500, view=2)):
        assert not torch.equal(policy.batch(x, other), policy.batch(x, request(ids, view=2)))


@pytest.mark.parametrize("policy", [AutoAugment("imagenet"), RandAugment(2, 9)], ids=str)
def test_in_workers_it_is_torchvisions_own(policy: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    crop = ResizedCropFlip(Normalise(MEAN, STD), (16, 16))
    own = T.AutoAugment() if isinstance(policy, AutoAugment) else T.RandAugment(2, 9)
    for key in range(8):
        with local_rng(rng.key(key, "colours")):
            expected = own(crop.sample(image, key))
        assert Augmented(crop, (policy,)).sample(image, key) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", [AutoAugment("cifar10"), RandAugment(1, 9)], ids=str)
def test_the_device_changes_few_pixels(policy: Any) -> None:
    x, asked = smooth(200), request(torch.arange(200))
    here, there = (policy.batch(x.to(device), asked).cpu().int() for device in ("cpu", "cuda"))
    assert float(((here - there).abs() > 1).float().mean()) < 5e-3
