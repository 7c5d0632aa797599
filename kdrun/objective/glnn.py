"""GLNN: Graph-less Neural Networks, Teaching Old MLPs New Tricks via Distillation (Zhang, Liu, Sun, Shah, ICLR 2022, arXiv 2110.08727).

    L = weight * CE(h_L, y_L) + (1 - weight) * mean_i KL(softmax(z_i) || softmax(h_i))

Node-to-node distillation from a graph network into an MLP: what FF-G2M adds its edges to, and hence the same class with its
parts switched the other way. `use_high` beside it is GLNN + HFD.

Units: nats per labelled node (CE), nats per node. Constants: weight 0.4 is FF-G2M's for Cora with a GCN, whose code runs GLNN
under the same weight; GLNN's own is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdrun.objective.ff_g2m import FFG2M


@dataclass(eq=False)
class GLNN(FFG2M):
    use_node: bool = True
    use_low: bool = False
    use_high: bool = False
