"""Graph networks for node classification, on the layers of torch-geometric (the extra `kdrun[graph]`).

GCN: Kipf, Welling, ICLR 2017, arXiv 1609.02907. GraphSAGE: Hamilton, Ying, Leskovec, NeurIPS 2017, arXiv 1706.02216. GAT: Velickovic
et al., ICLR 2018, arXiv 1710.10903. In the shape of FF-G2M's teachers (AAAI 2023, arXiv 2305.10758, and its public code): ReLU
and then dropout after every layer but the last, no normalisation layer, self loops added by the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.losses.graph import with_self_loops


def geometric(module: str) -> Any:
    """A module of torch-geometric, e.g. "nn". Raises `Refused` with the remedy where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch-geometric's own code
            return import_module(f"torch_geometric.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch_geometric":
            raise
        what = "graphs need the package torch-geometric, which is not installed"
        raise Refused(Problem(what, remedy='pip install "kdrun[graph]"')) from error


class GNN(nn.Module):
    """conv1, relu1, drop1, conv2, ..., conv. forward: x [N, in_features], edge_index [2, E] -> logits [N, num_classes].

    `layer(inputs, outputs, last)` makes one layer. `loops`: self loops that are added to the edges before the layers see them,
    for layers that add none. `input_dropout` is that of the first layer's input.
    """

    takes = ("edge_index",)

    def __init__(
        self,
        widths: Sequence[int],
        layer: Callable[[int, int, bool], nn.Module],
        dropout: float,
        loops: int = 0,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.loops = loops
        self.depth = len(widths) - 1
        self.drop0 = nn.Dropout(input_dropout)
        for i in range(1, self.depth):
            self.add_module(f"conv{i}", layer(widths[i - 1], widths[i], False))
            self.add_module(f"relu{i}", nn.ReLU())
            self.add_module(f"drop{i}", nn.Dropout(dropout))
        self.conv = layer(widths[-2], widths[-1], True)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for _ in range(self.loops):
            edge_index = with_self_loops(edge_index, len(x))
        x = self.drop0(x)
        for i in range(1, self.depth):
            x = self.get_submodule(f"conv{i}")(x, edge_index)
            x = self.get_submodule(f"drop{i}")(self.get_submodule(f"relu{i}")(x))
        return self.conv(x, edge_index)

    def example(self, rows: int) -> dict[str, Tensor]:
        """Edges of a ring of so many nodes, for tracing shapes."""
        nodes = torch.arange(rows)
        return {"edge_index": torch.stack([nodes, nodes.roll(-1)])}


def gcn(num_classes: int, in_features: int, hidden: Sequence[int], dropout: float = 0.5) -> nn.Module:
    """GCN: D^-1/2 (A + I) D^-1/2 X W + b in every layer. `hidden`: units of each layer but the last.

    Raises `kdrun.errors.Refused` for a layer without units, a dropout that is no probability, or without torch-geometric.
    """
    layers = geometric("nn")
    widths = checked_widths(num_classes, in_features, hidden, dropout)
    return GNN(widths, lambda inputs, outputs, last: layers.GCNConv(inputs, outputs), dropout)


def sage(num_classes: int, in_features: int, hidden: Sequence[int], dropout: float = 0.5) -> nn.Module:
    """GraphSAGE with the "gcn" aggregator: W (sum of the neighbours + 2 x_i) / (degree + 2) + b in every layer.

    The node itself counts twice: FF-G2M's graph has self loops, and DGL's aggregator, which its code uses, adds the node once
    more. `hidden` and what is raised: as for `gcn`.
    """
    layers = geometric("nn")
    widths = checked_widths(num_classes, in_features, hidden, dropout)
    return GNN(widths, lambda inputs, outputs, last: layers.SAGEConv(inputs, outputs, aggr="mean", root_weight=False), dropout, loops=2)


def gat(
    num_classes: int,
    in_features: int,
    hidden: Sequence[int],
    dropout: float = 0.5,
    heads: int = 4,
    attention_dropout: float = 0.3,
    negative_slope: float = 0.2,
) -> nn.Module:
    """GAT: `hidden` is the width over all heads, which split it evenly; the last layer has one head.

    Dropout also acts on the raw input, as in DGL's layer (its feat_drop), which FF-G2M's code uses. Raises as `gcn`, and for a
    width that the heads cannot share.
    """
    layers = geometric("nn")
    widths = checked_widths(num_classes, in_features, hidden, dropout)
    if heads < 1 or any(width % heads for width in hidden):
        raise Refused(Problem(f"{heads} heads cannot share layers of {list(hidden)} units", "hidden", remedy="multiples of heads"))
    if not 0 <= attention_dropout < 1:
        raise Refused(Problem(f"{attention_dropout} is no probability below 1", "attention_dropout", remedy="attention_dropout=0.3"))

    def layer(inputs: int, outputs: int, last: bool) -> nn.Module:
        own = 1 if last else heads
        return layers.GATConv(inputs, outputs // own, heads=own, dropout=attention_dropout, negative_slope=negative_slope)

    return GNN(widths, layer, dropout, input_dropout=dropout)


def checked_widths(num_classes: int, in_features: int, hidden: Sequence[int], dropout: float) -> list[int]:
    """[in_features, *hidden, num_classes]."""
    if any(units < 1 for units in hidden):
        raise Refused(Problem(f"a hidden layer has at least one unit: {list(hidden)}", key="hidden", remedy="[64]"))
    if not 0 <= dropout < 1:
        raise Refused(Problem(f"{dropout} is no probability below 1", key="dropout", remedy="dropout=0.5"))
    return [in_features, *hidden, num_classes]
