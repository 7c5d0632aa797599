"""Whether a point is like the points that one holds: estimators of a density ratio, and the filter that is built on them.

Every estimator is fitted to private points [m, D] and gives a score [N] to other points [N, D] that is SMALL where they are like
the private ones; all in float64.

KMeans-DRE: distance to the nearest centroid (Mujtaba et al., "Federated Distillation on Edge Devices", FLTA 2025, arXiv 2508.14769).
KuLSIF: minus the least-squares density ratio (Kanamori, Suzuki, Sugiyama, Machine Learning 86, 2012), as in Selective-FD (Shao, Wu,
Zhang, Nature Communications 2024, arXiv 2304.01731). The public code of Selective-FD multiplies by (K_aa / n + lambda I) where the
closed form has its inverse; here it is the inverse.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.spatial.distance import cdist, pdist
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import rbf_kernel

Points = NDArray[np.float64]

LLOYD_ITERATIONS = 30  # ours: the number that the small experiment was worked out with
MEDIAN_POINTS = 1000  # ours: the median distance of so many points is as good as that of all, and costs a square less


class Estimator(Protocol):
    def score(self, points: Points) -> Points:
        """[N, D] -> [N], small where a point is in-distribution."""


class KMeansRatio:
    """Distance to the nearest of J centroids (k-means++ start, Lloyd's iterations). Memory J x D."""

    def __init__(self, centroids: Points) -> None:
        self.centroids = centroids

    @staticmethod
    def fit(private: Points, centroids: int, seed: int) -> KMeansRatio:
        """As many centroids as there are points make each point one."""
        count = min(centroids, len(np.unique(private, axis=0)))
        found = KMeans(count, init="k-means++", n_init=1, max_iter=LLOYD_ITERATIONS, tol=0.0, random_state=seed, algorithm="lloyd")
        return KMeansRatio(found.fit(private).cluster_centers_)

    def score(self, points: Points) -> Points:
        return cdist(points, self.centroids).min(axis=1)


class KuLSIF:
    """Kernel unconstrained least-squares importance fitting with a Gaussian kernel k of width s and ridge lambda.

        r(x) = -1/(n m lambda) k(x, a) (K_aa / n + lambda I)^-1 K_ab 1_m + 1/(m lambda) sum_b k(x, b)

    over n auxiliary points a and m private points b: the minimiser of 1/2 E_a[r^2] - E_b[r] + lambda/2 |r|^2. Memory (n + m) x D.
    """

    def __init__(self, private: Points, auxiliary: Points, width: float, ridge: float) -> None:
        n, m = len(auxiliary), len(private)
        self.private, self.auxiliary, self.gamma, self.scale = private, auxiliary, 1 / (2 * width**2), 1 / (m * ridge)
        kernel = rbf_kernel(auxiliary, auxiliary, self.gamma) / n + ridge * np.eye(n)
        across = rbf_kernel(auxiliary, private, self.gamma).sum(axis=1)
        self.weights = solve(kernel, across, assume_a="pos") * self.scale / n

    @staticmethod
    def fit(private: Points, auxiliary: int, width: float | None, ridge: float, seed: int) -> KuLSIF:
        """Auxiliary points uniform in the box of the private ones; `width` None: the median distance of private points."""
        source = np.random.default_rng(seed)
        around = source.uniform(private.min(axis=0), private.max(axis=0), (auxiliary, private.shape[1]))
        if width is None:
            few = private[source.permutation(len(private))[:MEDIAN_POINTS]]
            width = float(np.median(pdist(few))) if len(few) > 1 else 0.0
        return KuLSIF(private, around, width or 1.0, ridge)  # points that are all one have no scale

    def ratio(self, points: Points) -> Points:
        """r [N] of points [N, D], large where they are like the private ones."""
        near = rbf_kernel(points, self.private, self.gamma).sum(axis=1) * self.scale
        return near - rbf_kernel(points, self.auxiliary, self.gamma) @ self.weights

    def score(self, points: Points) -> Points:
        return -self.ratio(points)


def threshold(private_scores: Points, quantile: float) -> float:
    """T^ID: the quantile of the private points' own scores, linearly interpolated."""
    return float(np.quantile(private_scores, quantile))


def in_distribution(scores: Points, own: NDArray[np.bool_], limit: float) -> NDArray[np.bool_]:
    """The two-stage client-side filter: samples that the client gave itself (`own` [N]), then those within the threshold; bool [N]."""
    return own | (scores <= limit)
