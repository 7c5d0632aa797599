"""Features for the density filter."""

from __future__ import annotations

import numpy as np
import torch

from kdrun.source.features import principal_components


def world(rows: int = 200, seed: int = 0) -> np.ndarray:
    """Points [N, 6] that lie, but for little noise, in a plane that does not go through the origin."""
    source = np.random.default_rng(seed)
    basis = np.linalg.qr(source.normal(size=(6, 2)))[0]
    return 5 + source.normal(size=(rows, 2)) * [3.0, 1.5] @ basis.T + 0.01 * source.normal(size=(rows, 6))


def test_principal_components_are_the_leading_singular_directions() -> None:
    rows, other = world(), world(40, 1)
    found = principal_components(rows, 2)(torch.from_numpy(other))
    directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
    expected = (other - rows.mean(0)) @ directions.T
    assert found.dtype == torch.float64
    np.testing.assert_allclose(np.abs(found.numpy()), np.abs(expected), rtol=1e-9, atol=1e-9)  # the sign of a direction is free


def test_distances_in_the_plane_of_the_data_are_kept() -> None:
    rows = torch.from_numpy(world())
    kept = principal_components(rows.numpy(), 2)(rows.view(-1, 2, 3))  # inputs of any shape are flattened
    torch.testing.assert_close(torch.cdist(kept, kept), torch.cdist(rows, rows), rtol=0, atol=0.1)


def test_there_are_no_more_components_than_rows_or_columns() -> None:
    rows = world(4)
    assert principal_components(rows, 50)(torch.from_numpy(rows)).shape == (4, 4)
    assert principal_components(world(), 50)(torch.from_numpy(rows)).shape == (4, 6)
