from __future__ import annotations

import torch

from kdrun.losses.feature import mean_squared_error


def test_mean_is_over_the_elements_of_each_sample() -> None:
    fs = torch.tensor([[[1, 0], [0, 1]], [[0, 2], [1, 0]]])
    ft = torch.tensor([[[2, 0], [1, 1]], [[0, 1], [1, 1]]])
    assert mean_squared_error(fs, ft).tolist() == [0.5, 0.5]
    assert mean_squared_error(torch.tensor([[3.0], [0.0]]), torch.zeros(2, 1)).tolist() == [9.0, 0.0]


def test_half_precision_maps_are_compared_in_float32() -> None:
    fs = torch.full((1, 4), 60000.0, dtype=torch.float16, requires_grad=True)
    value = mean_squared_error(fs, torch.zeros(1, 4, dtype=torch.float16))
    assert value.dtype == torch.float32
    assert value.item() == 60000.0**2
