from __future__ import annotations

import pytest
import torch

from kdrun.losses.precision import widen, without_autocast


@pytest.mark.parametrize(
    ("given", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_is_raised_and_float64_stays(given: torch.dtype, wide: torch.dtype) -> None:
    assert widen(torch.ones(2, dtype=given)).dtype == wide


def test_products_keep_their_precision_under_autocast() -> None:
    x = torch.full((2, 2), 1 + 2**-20)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
