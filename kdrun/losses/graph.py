"""Divergences over the edges of a graph: one value per edge, from the logits of its two ends.

An edge list is int64 [2, E]; its edge e joins node i = edges[0, e] to node j = edges[1, e]. An undirected edge stands in it
twice, once in each direction. Nothing here divides by a number of edges: that belongs to the loop, which guards it.

Low and high frequency: Wu et al., "Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into
MLPs", AAAI 2023, arXiv 2305.10758.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.divergence import kl_between, kl_divergence
from kdrun.losses.precision import widen

# What an excluded class (-inf) counts as in a difference of logits: -inf minus -inf is NaN. A class that is excluded at both
# ends does not differ between them; one that is excluded at one end alone takes all of the mass.
EXCLUDED = -1e30


def with_self_loops(edges: Tensor, nodes: int) -> Tensor:
    """E+: the edges and one self loop of every node.  [2, E] -> [2, E + N]."""
    loops = torch.arange(nodes, device=edges.device).expand(2, nodes)
    return torch.cat([edges, loops], 1)


def low_frequency(student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """KL(softmax(teacher_j) || softmax(student_i)) of every edge (i, j) of E+, in nats.

    Logits [N, C] each, edges [2, E] without self loops -> [E + N]. LFD of FF-G2M: its temperature is 1, and its minimiser is
    the mean of the teacher's probabilities over a node and its neighbours.
    """
    i, j = with_self_loops(edges, len(student))
    return kl_divergence(student.index_select(0, i), teacher.index_select(0, j))


def high_frequency(student: Tensor, teacher: Tensor, edges: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(|teacher_i - teacher_j| / T) || softmax(|student_i - student_j| / T)) of every edge (i, j), in nats.

    Logits [N, C] each, edges [2, E] -> [E]. HFD of FF-G2M, which has no T^2: the absolute values are taken class by class, of
    logits and not of probabilities.
    """
    return kl_between(_log_difference(teacher, edges, temperature), _log_difference(student, edges, temperature))


def _log_difference(logits: Tensor, edges: Tensor, temperature: float) -> Tensor:
    """log softmax(|z_i - z_j| / T) of every edge, [E, C]."""
    finite = widen(logits).clamp(min=EXCLUDED)
    difference = finite.index_select(0, edges[0]) - finite.index_select(0, edges[1])
    return F.log_softmax(difference.abs() / temperature, -1)
