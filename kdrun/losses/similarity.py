"""How alike two networks are at random initialisation: the scores of DisWOT (Dong, Li, Wei, CVPR 2023, arXiv 2303.15678).

A score is at most 0, higher is more alike, and the same network scores 0. It ranks architectures without training, so these
are single numbers and no loss terms. Everything is computed in float64: the scores of a space differ in the fourth digit.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def row_normalised_gram(rows: Tensor) -> Tensor:
    """x [N, ...] -> [N, N] float64: inner products of the flattened rows, every row of the matrix divided by its l2 norm.

    A row of zeros stays zero.
    """
    flat = rows.double().flatten(1)
    return F.normalize(flat @ flat.T, dim=1)


def relation_similarity(teacher: Tensor, student: Tensor) -> Tensor:
    """M_r = - |R_T - R_S|_F^2 / B^2 of the samples' relations R = row_normalised_gram(F).  R_T, R_S [B, B] -> scalar.

    The similarity-preserving loss (Tung and Mori, ICCV 2019, arXiv 1907.09682), negated. F [B, C, H, W] are the last feature
    maps before the global pooling; the networks' sizes may differ.
    """
    return -(teacher - student).square().sum() / teacher.numel()


def semantic_similarity(teacher: Tensor, student: Tensor) -> Tensor:
    """M_s = - (1 / CD) sum_c |E_c(T) - E_c(S)|_F^2 of the classifiers' gradients.  G_T, G_S [C, D] -> scalar.

    Row a of class c has E_c[i, :] = sign(a_i) a / |a|: the channel Gram matrix a a^T with rows of length 1 (the inter-channel
    correlation of Liu et al., ICCV 2021, arXiv 2202.03680, on a gradient). In closed form, without matrices [D, D]:

        |E_c(T) - E_c(S)|^2 = n_T + n_S - 2 cos(a_T, a_S) sum_i sign(a_Ti) sign(a_Si)

    with n the number of coordinates that are not 0 (a 0 gives a row of zeros); without zeros M_s = - (2 / C) sum_c (1 - rho_c cos_c).
    """
    teacher, student = teacher.double(), student.double()
    signs, others = teacher.sign(), student.sign()
    there = signs.abs().sum(1) + others.abs().sum(1)
    together = (signs * others).sum(1) * F.cosine_similarity(teacher, student, dim=1)
    return -(there - 2 * together).sum() / teacher.numel()


def semantic_similarity_by_matrices(teacher: Tensor, student: Tensor) -> Tensor:
    """`semantic_similarity` from its definition: the same number with C D^2 memory, and exactly 0 for equal gradients."""
    return -(channel_relations(teacher) - channel_relations(student)).square().sum() / teacher.numel()


def channel_relations(slopes: Tensor) -> Tensor:
    """G [C, D] -> E [C, D, D] float64: for each class a a^T with rows of length 1."""
    slopes = slopes.double()
    return F.normalize(slopes[:, :, None] * slopes[:, None, :], dim=2)


def class_similarity(teacher: Tensor, student: Tensor) -> Tensor:
    """- |E_T - E_S|_F^2 / C^2 of the classes' relations E = row_normalised_gram(G).  G_T [C, D], G_S [C, D'] -> scalar.

    Ours: M_s for networks whose features differ in width.
    """
    difference = row_normalised_gram(teacher) - row_normalised_gram(student)
    return -difference.square().sum() / difference.numel()
