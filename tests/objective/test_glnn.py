"""GLNN: node-to-node distillation, whatever the graph; the graph's own terms are tested with FF-G2M, whose switches it reverses."""

from __future__ import annotations

import torch

from kdrun.losses.divergence import kl_divergence
from kdrun.types import Batch, Output, Signal
from tests.objective.toy import ZS, ZT, Y, make


def test_it_is_the_divergence_of_each_node_and_reads_no_edge() -> None:
    objective, ids = make("glnn", weight=0.3), torch.arange(2)
    assert objective.needs().extra == ()
    batch = Batch(ZS, Y, ids, ids, {})
    terms = objective.terms(Output(ZS, {}, {}), Signal(ZT, {}), batch, "student", torch.nn.ModuleDict())
    assert {name: term.unit for name, term in terms.items()} == {"ce": "label", "node": "sample"}
    torch.testing.assert_close(terms["node"].sum, kl_divergence(ZS, ZT).sum(), rtol=1e-14, atol=0)


def test_without_weight_on_labels_no_label_is_read() -> None:
    objective, ids = make("glnn", weight=0.0), torch.arange(2)
    unlabelled = Batch(ZS, torch.full_like(Y, -1), ids, ids, {})
    assert set(objective.terms(Output(ZS, {}, {}), Signal(ZT, {}), unlabelled, "student", torch.nn.ModuleDict())) == {"node"}
