"""Graph networks against the formulas of their papers, written with dense matrices."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.graph import undirected
from kdrun.errors import Refused
from kdrun.losses.graph import with_self_loops
from kdrun.student.gnn import gat, gcn, sage
from kdrun.student.mlp import mlp
from kdrun.student.taps import Tapped, ask, model_spec
from kdrun.types import Batch
from tests.student.composed import node

KINDS = [gcn, sage, gat]
NODES, WIDTH, CLASSES = 7, 5, 3
Factory = Callable[..., nn.Module]


def graph(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(features [N, D], edges [2, E]); the last node has no neighbour."""
    g = torch.Generator().manual_seed(seed)
    pairs = torch.randint(NODES - 1, (2, 9), generator=g)
    return torch.randn(NODES, WIDTH, generator=g), undirected(pairs, NODES)


def made(kind: Factory, **values: object) -> nn.Module:
    torch.manual_seed(0)
    network = kind(CLASSES, WIDTH, [8], **values).eval()
    for parameter in network.parameters():  # biases begin at 0, and would hide
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def dense(edges: Tensor) -> Tensor:
    """A [N, N]: row i has its neighbours."""
    return torch.zeros(NODES, NODES).index_put((edges[0], edges[1]), torch.ones(edges.shape[1]))


def layerwise(network: nn.Module, x: Tensor, mix: Tensor, linear: str, bias: str) -> Tensor:
    for name in ("conv1", "conv"):
        conv = network.get_submodule(name)
        x = mix @ x @ conv.get_submodule(linear).weight.T + conv.get_parameter(bias)
        x = x.relu() if name == "conv1" else x
    return x


def test_gcn_is_the_normalised_adjacency_with_self_loops() -> None:
    x, edges = graph()
    a = dense(edges) + torch.eye(NODES)
    d = a.sum(1).rsqrt()
    network = made(gcn)
    expected = layerwise(network, x, d[:, None] * a * d, "lin", "bias")
    torch.testing.assert_close(network(x, edges), expected, rtol=1e-5, atol=1e-6)


def test_sage_averages_the_neighbours_and_twice_the_node() -> None:
    x, edges = graph()
    a = dense(edges) + 2 * torch.eye(NODES)
    network = made(sage)
    expected = layerwise(network, x, a / a.sum(1, keepdim=True), "lin_l", "lin_l.bias")
    torch.testing.assert_close(network(x, edges), expected, rtol=1e-5, atol=1e-6)


def test_gat_attends_over_a_node_and_its_neighbours() -> None:
    x, edges = graph()
    network = made(gat, heads=4)
    mask = dense(edges) + torch.eye(NODES)
    for name, heads in (("conv1", 4), ("conv", 1)):
        conv = network.get_submodule(name)
        h = conv.get_submodule("lin")(x).view(NODES, heads, -1)
        score = lambda att, h=h: (h * att).sum(-1)  # noqa: E731
        logits = nn.functional.leaky_relu(score(conv.att_dst)[:, None] + score(conv.att_src)[None], 0.2)
        weight = logits.masked_fill(mask[..., None] == 0, -torch.inf).softmax(1)
        x = torch.einsum("ijh,jhd->ihd", weight, h).flatten(1) + conv.bias
        x = x.relu() if name == "conv1" else x
    torch.testing.assert_close(network(*graph()), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_numbering_of_the_nodes_does_not_matter(kind: Factory) -> None:
    x, edges = graph()
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))  # new node k was order[k]
    network = made(kind)
    torch.testing.assert_close(network(x[order], order.argsort()[edges]), network(x, edges)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_without_neighbours_sees_itself_alone(kind: Factory) -> None:
    x, edges = graph()
    network, moved = made(kind), x.clone()
    moved[:-1] += 1.0
    assert not (edges == NODES - 1).any()
    torch.testing.assert_close(network(moved, edges)[-1], network(x, edges)[-1], rtol=1e-5, atol=1e-6)
    assert (network(moved, edges)[:-1] - network(x, edges)[:-1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_every_layer_but_the_last(kind: Factory) -> None:
    torch.manual_seed(0)
    network = kind(CLASSES, WIDTH, [8, 12], dropout=0.25)
    assert [name for name, _ in network.named_children()][1:] == ["conv1", "relu1", "drop1", "conv2", "relu2", "drop2", "conv"]
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {"drop0": 0.25 if kind is gat else 0.0, "drop1": 0.25, "drop2": 0.25}
    x, edges = graph()
    assert not torch.equal(network(x, edges), network(x, edges))
    network.eval()
    assert torch.equal(network(x, edges), network(x, edges))


def test_the_heads_share_the_width() -> None:
    network = gat(CLASSES, WIDTH, [8, 12], heads=4)
    shapes = [(c.heads, c.out_channels, c.dropout, c.negative_slope) for c in (network.conv1, network.conv2, network.conv)]
    assert shapes == [(4, 2, 0.3, 0.2), (4, 3, 0.3, 0.2), (1, CLASSES, 0.3, 0.2)]


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_an_option_has_the_taps_it_names_and_is_asked_with_its_edges(name: str) -> None:
    chosen = node("student", name)
    kind: Factory = {"gcn": gcn, "sage": sage, "gat": gat}[name]
    network = kind(CLASSES, WIDTH, chosen["hidden"], chosen["dropout"]).eval()
    spec = model_spec(network, (WIDTH,), chosen["taps"])
    assert (spec.classes, spec.taps) == (CLASSES, dict.fromkeys(("f1", "p1", "pooled"), (64,)))
    x, edges = graph()
    batch = Batch(x, torch.zeros(NODES, dtype=torch.int64), torch.arange(NODES), torch.zeros(NODES), {"edge_index": edges})
    logits, taps = Tapped(network, chosen["taps"], chosen["taps"])(x, batch.extra)
    assert torch.equal(logits, ask(network, batch))
    assert torch.equal(taps["p1"].relu(), taps["f1"])


@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_cannot_be_are_refused(kind: Factory) -> None:
    for values in ({"hidden": [0]}, {"hidden": [8], "dropout": 1.0}, *([{"hidden": [6]}] if kind is gat else [])):
        with pytest.raises(Refused, match=r"unit|probability|heads"):
            kind(CLASSES, WIDTH, **values)


def test_without_torch_geometric_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(Refused) as refused:
        gcn(CLASSES, WIDTH, [8])
    (problem,) = refused.value.problems
    assert problem.remedy == 'pip install "kdrun[graph]"'


def test_self_loops_are_one_of_each_node() -> None:
    _, edges = graph()
    looped = with_self_loops(edges, NODES)
    assert looped.shape[1] == edges.shape[1] + NODES
    assert looped[:, edges.shape[1] :].tolist() == [list(range(NODES))] * 2


def test_an_mlp_drops_after_every_hidden_layer() -> None:
    names = [name for name, _ in mlp(CLASSES, WIDTH, [8, 4], dropout=0.6).named_children()]
    assert names == ["fc1", "relu1", "drop1", "fc2", "relu2", "drop2", "fc"]
    assert [name for name, _ in mlp(CLASSES, WIDTH, [8]).named_children()] == ["fc1", "relu1", "fc"]
    with pytest.raises(Refused, match="probability"):
        mlp(CLASSES, WIDTH, [8], dropout=1.0)
