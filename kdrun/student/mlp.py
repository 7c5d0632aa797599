"""A multi-layer perceptron with ReLU, for vectors and flattened images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdrun.errors import Problem, Refused


class MLP(nn.Sequential):
    """fc1, relu1, fc2, relu2, ..., fc; with dropout a drop after every relu. forward: [B, ...] with `in_features` entries a row
    -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, in_features: int, hidden: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        width = in_features
        for i, units in enumerate(hidden, start=1):
            self.add_module(f"fc{i}", nn.Linear(width, units))
            self.add_module(f"relu{i}", nn.ReLU())
            if dropout:
                self.add_module(f"drop{i}", nn.Dropout(dropout))
            width = units
        self.add_module("fc", nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def mlp(num_classes: int, in_features: int, hidden: Sequence[int], dropout: float = 0.0) -> nn.Module:
    """`hidden`: units of each hidden layer, [] for a linear classifier. Initialised as torch does by default.

    Raises `kdrun.errors.Refused` for a layer without units and a dropout that is no probability below 1.
    """
    if any(units < 1 for units in hidden):
        raise Refused(Problem(f"a hidden layer has at least one unit: {list(hidden)}", key="hidden", remedy="[512, 512]"))
    if not 0 <= dropout < 1:
        raise Refused(Problem(f"{dropout} is no probability below 1", key="dropout", remedy="dropout=0.5"))
    return MLP(num_classes, in_features, hidden, dropout)
