"""The filter of EdgeFD: KMeans-DRE, KuLSIF, threshold, the two stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import special_ortho_group
from sklearn.metrics.pairwise import rbf_kernel

from kdrun.source.density import KMeansRatio, KuLSIF, Points, in_distribution, threshold


def cloud(seed: int, rows: int, centre: float = 0.0, dimension: int = 3) -> Points:
    return np.random.default_rng(seed).normal(centre, 1.0, (rows, dimension))


def test_the_masks_of_the_hand_example() -> None:
    proxy, nobody = np.array([[0.5], [9.5], [5.0], [1.9]]), np.zeros(4, dtype=bool)
    a, b = KMeansRatio(np.array([[0.0]])), KMeansRatio(np.array([[10.0]]))
    assert in_distribution(a.score(proxy), nobody, 2.0).tolist() == [True, False, False, True]
    assert in_distribution(b.score(proxy), nobody, 2.0).tolist() == [False, True, False, False]


def test_the_threshold_interpolates_linearly() -> None:
    distances = np.array([0.1, 0.2, 0.3, 0.4, 1.0])
    assert threshold(distances, 0.95) == pytest.approx(0.88, abs=1e-12)
    assert threshold(distances, 0.90) == pytest.approx(0.76, abs=1e-12)


def test_own_samples_are_always_in_distribution_and_the_threshold_decides_on_the_rest() -> None:
    scores, own = np.array([0.0, 3.0, 1.0, 7.0]), np.array([False, True, False, False])
    assert in_distribution(scores, own, 1.0).tolist() == [True, True, True, False]
    assert in_distribution(scores, own, math.inf).all()
    assert in_distribution(scores, own, -1e-9).tolist() == own.tolist()


def test_with_a_centroid_per_point_the_score_is_the_distance_to_the_nearest_neighbour() -> None:
    private, others = cloud(0, 30), cloud(1, 50)
    expected = cdist(others, private).min(1)
    for count in (30, 1000):
        np.testing.assert_allclose(KMeansRatio.fit(private, count, seed=0).score(others), expected, rtol=1e-12)
    assert KMeansRatio.fit(private, 30, seed=0).score(private).max() < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_the_score_is_invariant_to_a_common_rotation_and_translation(seed: int) -> None:
    private, others = cloud(seed, 40), cloud(seed + 10, 20)
    turn, shift = special_ortho_group.rvs(3, random_state=seed), np.array([5.0, -2.0, 1.0])
    estimator = KMeansRatio.fit(private, 4, seed=0)
    moved = KMeansRatio(estimator.centroids @ turn.T + shift)
    np.testing.assert_allclose(moved.score(others @ turn.T + shift), estimator.score(others), rtol=1e-10)


def test_k_means_finds_the_modes_and_is_its_seed() -> None:
    private = np.concatenate([cloud(0, 200, -8.0), cloud(1, 200, 8.0)])
    found = KMeansRatio.fit(private, 2, seed=3)
    np.testing.assert_allclose(np.sort(found.centroids[:, 0]), [private[:200, 0].mean(), private[200:, 0].mean()], rtol=1e-9)
    assert np.array_equal(found.centroids, KMeansRatio.fit(private, 2, seed=3).centroids)
    assert KMeansRatio.fit(np.ones((5, 2)), 3, seed=0).centroids.tolist() == [[1.0, 1.0]]  # one distinct point, one centroid


def test_the_quantile_is_the_share_of_private_points_within() -> None:
    private = cloud(0, 400)
    for estimator in (KMeansRatio.fit(private, 4, seed=0), KuLSIF.fit(private, 100, None, 0.1, seed=0)):
        own = estimator.score(private)
        assert (own <= threshold(own, 0.95)).mean() == pytest.approx(0.95, abs=1 / 400)


@pytest.mark.parametrize(("width", "ridge"), [(1.0, 0.1), (2.0, 0.5), (0.7, 0.01)])
def test_kulsif_is_the_minimiser_of_its_objective(width: float, ridge: float) -> None:
    """The functional derivative of 1/2 E_a[r^2] - E_b[r] + ridge/2 |r|^2 vanishes at every x."""
    private, auxiliary, x = cloud(0, 30), cloud(1, 40, 0.5), cloud(2, 25)
    fitted = KuLSIF(private, auxiliary, width, ridge)
    gamma = 1 / (2 * width**2)
    slope = rbf_kernel(x, auxiliary, gamma) @ fitted.ratio(auxiliary) / 40 - rbf_kernel(x, private, gamma).mean(1) + ridge * fitted.ratio(x)
    assert np.abs(slope).max() < 1e-9


def test_kulsif_is_the_closed_form() -> None:
    private, auxiliary, x = cloud(0, 6), cloud(1, 5), cloud(2, 4)
    n, m, width, ridge = 5, 6, 1.5, 0.1

    def kernel(a: Points, b: Points) -> Points:
        return np.exp(-(cdist(a, b) ** 2) / (2 * width**2))

    inverse = np.linalg.inv(kernel(auxiliary, auxiliary) / n + ridge * np.eye(n))
    expected = -kernel(x, auxiliary) @ inverse @ kernel(auxiliary, private).sum(1) / (n * m * ridge)
    expected += kernel(x, private).sum(1) / (m * ridge)
    np.testing.assert_allclose(KuLSIF(private, auxiliary, width, ridge).ratio(x), expected, rtol=1e-9)


def test_kulsif_scores_private_looking_points_lower_and_has_the_median_width() -> None:
    private = cloud(0, 200)
    fitted = KuLSIF.fit(private, 100, None, 0.1, seed=0)
    assert np.median(fitted.score(cloud(1, 100))) < fitted.score(cloud(1, 100, 4.0)).min()
    assert 1 / math.sqrt(2 * fitted.gamma) == pytest.approx(np.median(cdist(private, private)[np.triu_indices(200, 1)]), rel=1e-9)
    box = fitted.auxiliary
    assert (box >= private.min(0)).all()
    assert (box <= private.max(0)).all()
