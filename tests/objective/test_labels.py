"""The label's term of mixed rows, and which objectives may have them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from kdrun.dataset.mix import OWN_SHARE, PARTNER
from kdrun.engine.mixing import TAKERS
from kdrun.objective._labels import label_cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Batch, Output, Signal

CONF = Path(__file__).parents[2] / "conf" / "objective"
CLASSES = 5


def batch(share: Tensor | None, rows: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(2)
    targets, partners = torch.randint(0, CLASSES, (2, rows), generator=generator)
    ids = torch.arange(rows)
    soft = torch.eye(CLASSES)
    extra = {} if share is None else {OWN_SHARE: share, PARTNER + "targets": partners, PARTNER + "soft_targets": soft[partners]}
    return Batch(torch.zeros(rows, 1), targets, ids, ids * 0, {**extra, "soft_targets": soft[targets]})


def logits(rows: int = 12) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(3))


def mixing_objectives() -> dict[str, type[Objective]]:
    found = {}
    for file in sorted(CONF.glob("*.yaml")):
        module, _, name = yaml.safe_load(file.read_text())["_target_"].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        if cls.mixes:
            found[file.stem] = cls
    return found


def test_a_mixed_label_is_the_cross_entropy_on_the_mixed_distribution() -> None:
    share = torch.rand(12, generator=torch.Generator().manual_seed(1))
    mixed, z = batch(share), logits()
    soft = share[:, None] * torch.eye(CLASSES)[mixed.targets] + (1 - share[:, None]) * torch.eye(CLASSES)[mixed.extra[PARTNER + "targets"]]
    torch.testing.assert_close(label_cross_entropy(z, mixed), F.cross_entropy(z, soft, reduction="none"))


def test_a_share_of_one_and_unmixed_rows_are_plain_cross_entropy() -> None:
    plain = F.cross_entropy(logits(), batch(None).targets, reduction="none")
    assert torch.equal(label_cross_entropy(logits(), batch(None)), plain)
    assert torch.equal(label_cross_entropy(logits(), batch(torch.ones(12))), plain)


def test_the_remedy_names_exactly_the_objectives_that_take_mixed_labels() -> None:
    assert TAKERS.replace(" or ", ", ").split(", ") == sorted(mixing_objectives())


@pytest.mark.parametrize("name", sorted(mixing_objectives()))
def test_labels_of_every_such_objective_count_by_their_share(name: str) -> None:
    """Its terms of a mixed batch are those of own and partner's labels, each by its share; what says nothing of labels is unmoved."""
    share = torch.full((12,), 0.3)
    mixed = batch(share)
    objective = mixing_objectives()[name]()
    own, theirs = (Batch(mixed.inputs, y, mixed.ids, mixed.view, {"soft_targets": soft}) for y, soft in _both(mixed))
    taps = {"pooled": logits()[:, :4], "f2": logits()[:, :4, None, None]}
    signal = Signal(logits().flip(0), {name: tap.flip(0) for name, tap in taps.items()})
    connectors = nn.ModuleDict({"regressor": nn.Identity()})
    found, a, b = (objective.terms(Output(logits(), taps, {}), signal, part, "student", connectors) for part in (mixed, own, theirs))
    assert any(not torch.equal(a[term].sum, b[term].sum) for term in a)
    for term in found:
        torch.testing.assert_close(found[term].sum, 0.3 * a[term].sum + 0.7 * b[term].sum)


def _both(mixed: Batch) -> list[tuple[Tensor, Tensor]]:
    return [(mixed.targets, mixed.extra["soft_targets"]), (mixed.extra[PARTNER + "targets"], mixed.extra[PARTNER + "soft_targets"])]
