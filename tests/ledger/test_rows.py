"""The rows of the ledger, with the recipes that were never run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.config.compose import compose
from kdrun.config.paths import SearchPath
from kdrun.ledger.rows import impossible, never_run, rows


def write(root: Path, **record: Any) -> None:
    (root / "ledger").mkdir(parents=True, exist_ok=True)
    (root / "ledger" / f"{record['recipe']}.json").write_text(json.dumps(record))


def test_the_family_is_that_of_the_recipe_and_else_the_record_s_own(tmp_path: Path) -> None:
    write(tmp_path, recipe="ff_g2m_bench")  # written before records had a family
    write(tmp_path, recipe="gone", family="theory")
    write(tmp_path, recipe="gone_too")
    assert {r["recipe"]: r["family"] for r in rows(tmp_path)} == {"ff_g2m_bench": "graph", "gone": "theory", "gone_too": None}


def test_every_recipe_without_a_record_has_one_row() -> None:
    some = [{"recipe": name} for name in SearchPath.of().options("recipes") if name not in ("pld_cifar100", "edgefd_mnist")]
    found = {row["recipe"]: row for row in never_run(some)}
    assert list(found) == ["edgefd_mnist", "pld_cifar100"]
    assert found["pld_cifar100"]["published"]["value"] == 73.97
    assert found["pld_cifar100"]["arms"] == {}
    assert found["edgefd_mnist"]["family"] == "federated"


def test_what_asks_for_a_gpu_is_impossible_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = copy.deepcopy(compose(["recipe=pld_cifar100"]).tree)
    gpu, ranks = ({**tree, "hardware": compose(["recipe=pld_cifar100", f"hardware={h}"]).tree["hardware"]} for h in ("gpu", "multi_gpu"))
    two = {**tree, "hardware": {**ranks["hardware"], "device": "cpu", "procs": 2}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert impossible(tree) is None  # slow, not impossible
    assert impossible(two) is None
    assert "no usable GPU" in str(impossible(gpu))
    assert "no GPU" in str(impossible(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [impossible(t) for t in (tree, gpu, ranks, two)] == [None] * 4
