"""Every recipe really runs: two optimiser steps on the real path, over small data in the schema of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kdrun.config.compose import compose
from kdrun.config.paths import SearchPath
from tests.conftest import run_cli
from tests.dataset.connections import write_connections
from tests.recipes.standins import (
    fewer_queries,
    stand_in,
    write_graphs,
    write_imagenet,
    write_labelled,
    write_models,
    write_pairs,
    write_texts,
)

RECIPES = list(SearchPath.of().options("recipes"))
DRY = ["run.dry=true", "run.rivals=false", "run.seeds=null"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture(scope="session")
def folders(tiny_cifar100: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    graphs, pairs = write_graphs(tmp_path_factory.mktemp("graphs")), write_pairs(tmp_path_factory.mktemp("pairs"))
    plain = write_labelled(tmp_path_factory.mktemp("labelled"))
    plain |= {"nsl_kdd": write_connections(tmp_path_factory.mktemp("nsl_kdd")), **write_texts(tmp_path_factory.mktemp("texts"))}
    plain |= write_models(tmp_path_factory.mktemp("models"))
    return {"cifar100": tiny_cifar100, "imagenet": write_imagenet(tmp_path_factory.mktemp("imagenet")), **graphs, **pairs, **plain}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all recipes: those that agree on a teacher share it."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_two_steps(name: str, folders: dict[str, Path], root: Path) -> None:
    composed = compose([f"recipe={name}"])
    small = [*stand_in(composed.tree["dataset"]["name"], folders, composed.choices["plan"]), *fewer_queries(composed.tree)]
    outcome = run_cli("train", f"recipe={name}", *DRY, *small, f"run.root={root}", f"run.dir={root / name / 'run'}")
    assert outcome.code == 0, outcome.err
    summary = json.loads((root / name / "run" / "summary.json").read_text())
    assert summary["steps"] == (2 if composed.tree["plan"].get("train", True) else 0)
    assert summary["tainted"]  # a dry run is no result
    assert isinstance(summary["value"], float)
    assert summary["choices"]["objective"] == composed.choices["objective"]
    assert bool(summary["teacher"]) == (composed.tree["teacher"]["kind"] != "none")
    stages = sorted((root / name / "run").rglob("metrics.jsonl"))
    assert stages or not composed.tree["plan"].get("train", True)
    for stage in stages:
        steps = [line for line in map(json.loads, stage.read_text().splitlines()) if "loss" in line]
        assert {line["step"] for line in steps} == {1, 2}
        assert all(math.isfinite(line["loss"]) and abs(line["loss"]) < 1e4 for line in steps)
