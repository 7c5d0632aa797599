from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrun.losses.divergence import cross_entropy, kl_divergence
from kdrun.losses.spatial import Dice, Norm, channel_masked_error, mask_overlap, pixel_kl_divergence, spatial_masked_error

# The hand-computed example: two channels, two positions, two masks.
DIFFERENCE = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]], dtype=torch.float64) - torch.tensor(
    [[[[0.0, 1.0]], [[1.0, 1.0]]]], dtype=torch.float64
)
CHANNEL = torch.tensor([[[0.5, 1.0], [-0.5, -1.0]]], dtype=torch.float64).sigmoid()
SPATIAL = torch.tensor([[[0.5, 0.5], [1.0, 1.0]]], dtype=torch.float64).sigmoid()

examples = settings(derandomize=True, max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)


def draw(seed: int, masks: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A difference [2, 4, 3, 5] and masks of its channels and of its positions."""
    g = torch.Generator().manual_seed(seed)
    difference = torch.randn(2, 4, 3, 5, generator=g, dtype=torch.float64)
    channel, spatial = (torch.rand(2, masks, k, generator=g, dtype=torch.float64) for k in (4, 15))
    return difference, channel, spatial


def errors(difference: Tensor, channel: Tensor, spatial: Tensor, norm: Norm = "mask_sum") -> tuple[Tensor, Tensor]:
    return channel_masked_error(difference, channel, norm), spatial_masked_error(difference, spatial, norm)


@pytest.mark.parametrize(("norm", "expected"), [("mask_sum", (0.506739119, 0.676758955)), ("literal", (0.693359267, 1.263774341))])
def test_masked_errors_of_the_example(norm: Norm, expected: tuple[float, float]) -> None:
    for value, number in zip(errors(DIFFERENCE, CHANNEL, SPATIAL, norm), expected, strict=True):
        assert value.item() == pytest.approx(number, abs=1e-9)


@pytest.mark.parametrize("form", ["pairwise", "pooled"])
def test_overlap_of_the_example(form: Dice) -> None:
    assert mask_overlap(CHANNEL, form).item() == pytest.approx(0.759372847, abs=1e-9)
    assert mask_overlap(SPATIAL, form).item() == pytest.approx(0.987207108, abs=1e-9)


@pytest.mark.parametrize("constant", [1.0, 0.5, 0.013])
def test_a_constant_mask_gives_that_constant_times_the_mean_square(constant: float) -> None:
    difference, channel, spatial = draw(0)
    expected = constant * difference.square().mean((1, 2, 3))
    for value in errors(difference, torch.full_like(channel, constant), torch.full_like(spatial, constant)):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_plain_mean_square_of_the_example_is_one() -> None:
    ones = torch.ones_like(CHANNEL)
    assert [v.item() for v in errors(DIFFERENCE, ones, ones)] == [1.0, 1.0]


@examples
@given(seeds, st.sampled_from(["mask_sum", "literal"]))
def test_errors_are_nonnegative_and_vanish_without_a_difference(seed: int, norm: Norm) -> None:
    difference, channel, spatial = draw(seed)
    for value, nothing in zip(errors(difference, channel, spatial, norm), errors(0 * difference, channel, spatial, norm), strict=True):
        assert (value > 0).all()
        assert not nothing.any()


@examples
@given(seeds, st.floats(0.1, 1.0))
def test_the_normalised_error_is_of_degree_one_in_the_mask(seed: int, factor: float) -> None:
    difference, channel, spatial = draw(seed)
    scaled = errors(difference, factor * channel, factor * spatial)
    for value, other in zip(errors(difference, channel, spatial), scaled, strict=True):
        torch.testing.assert_close(other, factor * value, rtol=1e-10, atol=0)


@examples
@given(seeds)
def test_errors_match_the_formulas_entry_by_entry(seed: int) -> None:
    difference, channel, spatial = draw(seed)
    flat = difference.flatten(2)
    for b in range(2):
        by_channel = [(channel[b, m, :, None] * flat[b]).square().sum() / (15 * channel[b, m].sum()) for m in range(3)]
        by_place = [(spatial[b, m] * flat[b]).square().sum() / (4 * spatial[b, m].sum()) for m in range(3)]
        expected = (torch.stack(by_channel).mean(), torch.stack(by_place).mean())
        for value, number in zip(errors(difference, channel, spatial), expected, strict=True):
            torch.testing.assert_close(value[b], number, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_masks_that_are_zero_give_a_finite_error_and_gradient(dtype: torch.dtype) -> None:
    difference, channel, spatial = (x.to(dtype) for x in draw(1))
    channel, spatial = (torch.zeros_like(m).requires_grad_() for m in (channel, spatial))
    values = [*errors(difference, channel, spatial), mask_overlap(channel), mask_overlap(spatial, "pooled")]
    assert all(not v.any() for v in values)
    torch.stack([v.sum() for v in values]).sum().backward()
    for masks in (channel, spatial):
        assert masks.grad is not None
        assert masks.grad.isfinite().all()


@pytest.mark.parametrize(("form", "expected"), [("pairwise", 1.0), ("pooled", 3.0)])
def test_identical_masks_overlap_wholly(form: Dice, expected: float) -> None:
    masks = draw(2)[2][:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(mask_overlap(masks, form), torch.full((2,), expected, dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize("form", ["pairwise", "pooled"])
def test_disjoint_masks_do_not_overlap(form: Dice) -> None:
    masks = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 1)[None] * torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)[:, None]
    assert mask_overlap(masks, form).item() == 0


@pytest.mark.parametrize("form", ["pairwise", "pooled"])
@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_one_factor_on_all_masks_changes_no_overlap(form: Dice, factor: float) -> None:
    masks = draw(3)[1]
    torch.testing.assert_close(mask_overlap(factor * masks, form), mask_overlap(masks, form), rtol=1e-9, atol=0)


@examples
@given(seeds, st.integers(2, 5))
def test_pairwise_overlap_is_the_mean_over_pairs(seed: int, count: int) -> None:
    masks = draw(seed, count)[2]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    dice = lambda a, b: 2 * (a * b).sum() / (a.square().sum() + b.square().sum())  # noqa: E731
    expected = torch.stack([torch.stack([dice(sample[i], sample[j]) for i, j in pairs]).mean() for sample in masks])
    torch.testing.assert_close(mask_overlap(masks), expected, rtol=1e-10, atol=0)
    assert (mask_overlap(masks) <= 1).all()


@pytest.mark.parametrize("form", ["pairwise", "pooled"])
def test_a_single_mask_overlaps_with_nothing(form: Dice) -> None:
    assert mask_overlap(draw(4, masks=1)[1], form).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_also_under_autocast(dtype: torch.dtype) -> None:
    half = [x.to(dtype) for x in draw(5)]
    difference, channel, spatial = (x.float() for x in half)
    with torch.autocast("cpu", dtype):
        values = [*errors(*half), mask_overlap(half[1])]
    for value, expected in zip(values, [*errors(difference, channel, spatial), mask_overlap(channel)], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def pixels(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher [2, 4, 3, 5] and targets [2, 3, 5], a third of them without a label."""
    g = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(2, 4, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(4, (2, 3, 5), generator=g)
    return s, t, targets.masked_fill(torch.rand(2, 3, 5, generator=g) < 1 / 3, -1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_pixel_divergence_is_the_sum_over_labelled_pixels(temperature: float) -> None:
    s, t, targets = pixels(0)
    labelled = targets >= 0
    rows = [x.permute(0, 2, 3, 1)[labelled] for x in (s, t)]
    assert 0 < labelled.sum() < labelled.numel()
    torch.testing.assert_close(
        pixel_kl_divergence(s, t, labelled, temperature), kl_divergence(*rows, temperature).sum(), rtol=1e-12, atol=0
    )


def test_pixels_without_a_label_get_no_gradient() -> None:
    s, t, targets = pixels(1)
    s.requires_grad_()
    (pixel_kl_divergence(s, t, targets >= 0) + cross_entropy(s, targets).sum()).backward()
    assert s.grad is not None
    touched = s.grad.abs().sum(1) > 0
    assert torch.equal(touched, targets >= 0)


def test_pixel_losses_of_an_image_without_labels_are_zero() -> None:
    s, t, targets = pixels(2)
    nothing = torch.full_like(targets, -1)
    assert pixel_kl_divergence(s, t, nothing >= 0).item() == 0
    assert cross_entropy(s, nothing).sum().item() == 0


def test_pixel_cross_entropy_is_the_sum_over_labelled_pixels() -> None:
    s, _, targets = pixels(3)
    rows, labels = s.permute(0, 2, 3, 1)[targets >= 0], targets[targets >= 0]
    torch.testing.assert_close(cross_entropy(s, targets).sum(), F.cross_entropy(rows, labels, reduction="sum"), rtol=1e-12, atol=0)


def test_a_divergence_that_is_infinite_where_there_is_no_label_leaves_all_finite() -> None:
    s, t, targets = pixels(4)
    s[:, 0, 0, 0] = -torch.inf
    targets[:, 0, 0] = -1
    s.requires_grad_()
    value = pixel_kl_divergence(s, t, targets >= 0)
    value.backward()
    assert value.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()
