"""The sampling game of RAD: Robust Active Distillation (Baykal, Trinh, Iliopoulos, Menghani, Vee, ICLR 2023, arXiv 2210.01213).

    V = max_p min_{|M| = m}  sum_{i not in M} p_i g_i - lam sum_{i in M} p_i g_i

The adversary places the teacher's m mistakes after seeing the sampling distribution p. With the gains sorted to fall and
H_k = sum_{i <= k} 1 / g_i, the equilibrium is uniform in p_i g_i over the k* most informative points,

    k* = argmax_k (k - (1 + lam) m) / H_k,   p_i = 1 / (g_i H_k*) for i <= k*, else 0,   V = (k* - (1 + lam) m) / H_k*

which is the optimum wherever V >= 0, so always for lam = 0. All in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_GAIN = 1e-6  # 1 / g must exist
TIE = 1e-12  # relative: values of the game so close are equal, and the larger support is taken


class Equilibrium(NamedTuple):
    """What the game says of n points."""

    p: Tensor  # [N] float64, sums to 1
    support: int  # k*
    value: float  # V


def margin_gain(probabilities: Tensor) -> Tensor:
    """1 - (largest - second largest), [N, C] -> [N] float64 in [SMALLEST_GAIN, 1]: 1 where two classes are level."""
    first, second = probabilities.double().topk(2, dim=1).values.unbind(1)
    return (1 - (first - second)).clamp(SMALLEST_GAIN, 1)


def entropy_gain(probabilities: Tensor) -> Tensor:
    """Entropy over log C, [N, C] -> [N] float64 in [SMALLEST_GAIN, 1]."""
    p = probabilities.double()
    entropy = -torch.special.xlogy(p, p).sum(1)
    return (entropy / torch.log(torch.tensor(float(p.shape[1]), dtype=torch.float64))).clamp(SMALLEST_GAIN, 1)


def equilibrium(gains: Tensor, mistakes: int, lam: float = 0.0) -> Equilibrium:
    """The sampling distribution against `mistakes` adversarial mistakes. gains [N], all above 0.

    Raises ValueError for mistakes outside 0 .. N - 1.
    """
    if not 0 <= mistakes < len(gains):
        raise ValueError(f"mistakes={mistakes}: from 0 to {len(gains) - 1}, one less than the points")
    ordered, order = gains.double().sort(descending=True, stable=True)
    harmonic = (1 / ordered).cumsum(0)
    sizes = torch.arange(1, len(gains) + 1, dtype=torch.float64)
    values = (sizes - (1 + lam) * mistakes) / harmonic
    best = values.max()
    level = values >= best - TIE * best.abs()
    support = int(level.nonzero().max()) + 1
    p = torch.zeros_like(ordered)
    p[order[:support]] = 1 / (ordered[:support] * harmonic[support - 1])
    return Equilibrium(p, support, float(values[support - 1]))
