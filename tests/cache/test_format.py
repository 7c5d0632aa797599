"""What an item costs in bytes, and what comes back of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdrun.cache.format import Format
from kdrun.cache.store import fields, record_of
from kdrun.errors import RunFailed
from kdrun.losses.sparse import rest_bucket
from kdrun.losses.token import forward_kl
from kdrun.teacher.cached import difference

CLASSES = 100


def logits(rows: int = 40, scale: float = 5.0) -> Tensor:
    return scale * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(0))


def through(form: Format, said: Tensor, **taps: Tensor) -> object:
    return form.decode(form.encode(said, taps), "cpu")


@pytest.mark.parametrize(
    ("form", "size"),
    [
        (Format("dense", (CLASSES,), {}, "fp32"), 400),
        (Format("dense", (CLASSES,), {}, "fp16"), 200),
        (Format("int8", (CLASSES,), {}), 108),
        (Format("topk", (CLASSES,), {}, k=10), 44),
        (Format("topk", (200_000,), {}, k=10), 64),  # ids above 65,535 take four bytes
        (Format("dense", (CLASSES,), {"pooled": (64,)}), 328),
    ],
)
def test_an_item_takes_so_many_bytes(form: Format, size: int) -> None:
    assert form.record.itemsize == size
    assert record_of(fields(form.record)) == form.record  # the manifest's description is the layout


def test_single_precision_is_exact_and_half_rounds() -> None:
    said = logits()
    assert torch.equal(through(Format("dense", (CLASSES,), {}, "fp32"), said).logits, said)
    assert torch.equal(through(Format("dense", (CLASSES,), {}), said).logits, said.half().float())


def test_pixels_are_one_item() -> None:
    said = torch.randn(3, 5, 4, 6)
    for name in ("dense", "int8"):
        found = through(Format(name, (5, 4, 6), {}), said).logits
        assert found.shape == said.shape
        torch.testing.assert_close(found, said, rtol=0, atol=0.02)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    said = logits()
    found = through(Format("int8", (CLASSES,), {}), said).logits
    reach = said.amax(1) - said.amin(1)
    assert ((found - said).abs().amax(1) <= reach / 510 + 1e-5).all()
    assert ((found - said).abs().amax(1) > reach / 2000).all()  # and it does round
    assert torch.equal(through(Format("int8", (3,), {}), torch.full((2, 3), 4.0)).logits, torch.full((2, 3), 4.0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_largest_are_kept_at_the_objectives_temperature(temperature: float) -> None:
    said = logits()
    kept = through(Format("topk", (CLASSES,), {}, "fp32", 10, temperature), said).kept
    whole = torch.log_softmax(said.double() / temperature, -1)
    largest, ids = whole.topk(10, -1)
    assert torch.equal(kept.ids, ids)
    torch.testing.assert_close(kept.log_probs.double(), largest, rtol=1e-5, atol=1e-5)
    rest = whole.scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(kept.log_rest.double(), rest, rtol=1e-4, atol=1e-5)
    student = logits(scale=2.0).flip(0)
    bound = rest_bucket(student, *kept, temperature=temperature)
    full = forward_kl(student, said, temperature=temperature)
    assert (bound <= full + 1e-5).all()
    assert (bound > 0.3 * full).all()
    all_but_one = through(Format("topk", (CLASSES,), {}, "fp32", CLASSES - 1, temperature), said).kept
    torch.testing.assert_close(rest_bucket(student, *all_but_one, temperature=temperature), full, rtol=1e-4, atol=1e-5)


def test_a_rest_that_is_next_to_nothing_is_kept() -> None:
    said = torch.tensor([[60.0, 0.0, -1.0, -2.0]])
    kept = through(Format("topk", (4,), {}, k=1), said).kept
    assert float(kept.log_rest) == pytest.approx(-60 + np.log(1 + np.exp(-1) + np.exp(-2)), rel=1e-5)


def test_features_come_back_beside_any_format() -> None:
    pooled = torch.randn(40, 8, 2)
    for form in (Format("topk", (CLASSES,), {"pooled": (8, 2)}, k=3), Format("dense", None, {"pooled": (8, 2)})):
        assert torch.equal(through(form, logits(), pooled=pooled).taps["pooled"], pooled.half().float())


def test_what_half_precision_cannot_hold_is_an_error_not_an_infinity() -> None:
    with pytest.raises(RunFailed, match=r"cache\.dtype=fp32"):
        Format("dense", (2,), {}).encode(torch.tensor([[1e5, 0.0]]), {})
    assert float(through(Format("dense", (2,), {}, "fp32"), torch.tensor([[1e5, 0.0]])).logits.max()) == 1e5


def test_the_difference_is_a_share_of_the_range() -> None:
    form = Format("dense", (CLASSES,), {}, "fp32")
    said = logits()
    one, other = through(form, said), through(form, said + 0.1 * (said.max() - said.min()) * torch.eye(40, CLASSES))
    assert difference(one, one) == 0
    assert difference(other, one) == pytest.approx(0.1, rel=1e-4)
    top = Format("topk", (CLASSES,), {}, k=10)
    assert difference(through(top, said), through(top, said.flip(1))) == 1  # other classes altogether
