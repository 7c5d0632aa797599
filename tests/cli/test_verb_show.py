"""kdrun show: what a command line means, leaf by leaf, with its origin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.config.compose import compose, flatten
from tests.cli.told import Problem, only
from tests.conftest import Outcome

Refusal = Callable[..., list[Problem]]
CIFAR = ["recipe=pld_cifar100", "optim.lr=0.1"]


def test_every_leaf_is_shown_with_value_and_origin(kdrun: Callable[..., Outcome]) -> None:
    rows = kdrun("show", *CIFAR, "--json").json
    composed = compose(CIFAR)
    assert {key: row["value"] for key, row in rows.items()} == flatten(composed.tree)
    assert {key: row["origin"] for key, row in rows.items()} == composed.origins
    assert all(row["origin"] for row in rows.values())
    assert rows["optim.lr"] == {"value": 0.1, "origin": "command line"}
    assert rows["optim.epochs"]["origin"].startswith("recipes/pld_cifar100.yaml:")
    assert rows["objective.temperature"]["origin"] == "recipes/pld_cifar100.yaml (when objective=pld)"


def test_the_table_shows_the_same(kdrun: Callable[..., Outcome]) -> None:
    lines = [line.split() for line in kdrun("show", *CIFAR).out.splitlines()]
    assert ["optim.lr", "0.1", "command", "line"] in lines
    assert ["run.seeds", "null"] in [line[:2] for line in lines]
    assert ["hardware.deterministic", "false"] in [line[:2] for line in lines]


def test_a_newcomer_is_told_paper_equation_numbers_and_rivals(kdrun: Callable[..., Outcome]) -> None:
    out = kdrun("show", "recipe=pld_cifar100").out
    head = out.partition("\n\n")[0]
    assert "PLD: A Choice-Theoretic List-Wise Knowledge Distillation (NeurIPS 2025, arXiv 2506.12542)" in head
    assert "\nPLD (NeurIPS 2025): L = sum_k alpha_k (log sum_{j >= k} exp s[pi_j] - s[pi_k])" in head
    assert "published (Table 1; top1; teacher=resnet32x4, student=resnet8x4): " in head
    assert "pld 73.97 +- 0.05" in head
    assert "claim: pld > kd" in head
    assert "kd (objective=kd)" in head


def test_the_hash_alone(kdrun: Callable[..., Outcome]) -> None:
    assert kdrun("show", *CIFAR, "--hash").out.strip() == compose(CIFAR).hash()
    assert kdrun("show", *CIFAR, "run.root=elsewhere", "--hash").out == kdrun("show", *CIFAR, "--hash").out
    assert kdrun("show", *CIFAR, "seed=2", "--hash").out != kdrun("show", *CIFAR, "--hash").out


def test_the_difference_to_another_recipe(kdrun: Callable[..., Outcome]) -> None:
    here, other = (flatten(compose([f"recipe={name}"]).tree) for name in ("pld_cifar100", "kd_cifar100"))
    differences = kdrun("show", "recipe=pld_cifar100", "--diff", "kd_cifar100", "--json").json["differences"]
    assert differences["optim.name"] == ["adamw", "momentum"]
    assert differences["objective.weighting"] == ["pld", None]  # a key that the other does not have
    assert "dataset.name" not in differences
    assert not [key for key in differences if key.split(".")[0] in ("paper", "about", "claims", "published")]
    assert all(differences[key] == [here.get(key), other.get(key)] for key in differences)
    shown = kdrun("show", "recipe=pld_cifar100", "--diff", "recipe=kd_cifar100").out.splitlines()
    assert shown[0].split() == ["key", "pld_cifar100", "kd_cifar100"]
    assert ["optim.name", "adamw", "momentum"] in [line.split() for line in shown]


def test_no_difference_is_said(kdrun: Callable[..., Outcome]) -> None:
    out = kdrun("show", "recipe=pld_bench", "--diff", "pld_bench").out
    assert out.strip() == "pld_bench and pld_bench are the same experiment"


def test_overrides_hold_on_both_sides_of_a_difference(kdrun: Callable[..., Outcome]) -> None:
    differences = kdrun("show", "recipe=pld_cifar100", "optim.name=sgd", "--diff", "kd_cifar100", "--json").json["differences"]
    assert "optim.name" not in differences


@pytest.mark.parametrize("arguments", [["recipe=pld_cifar"], ["recipe=pld_cifar100", "--diff", "kd_cifar"]])
def test_an_unknown_recipe_is_refused_on_either_side(refusal: Refusal, arguments: list[str]) -> None:
    problem = only(refusal("show", *arguments))
    assert problem.key == "recipe"
    assert "cifar100" in problem.remedy


def test_mistakes_are_refused_without_building_anything(refusal: Refusal) -> None:
    assert len(refusal("show", "recipe=pld_cifar100", "optim.lrr=1", "seed=x", "student._target_=os.system")) == 3


def test_a_folder_of_ones_own_is_named_as_the_origin(kdrun: Callable[..., Outcome], own_recipes: Path) -> None:
    rows = kdrun("show", "recipe=small", f"--config-dir={own_recipes}", "--json").json
    assert rows["optim.epochs"]["origin"].startswith("recipes/small.yaml:")


def test_a_run_is_shown_with_its_number_and_what_it_was_expected_to_cost(
    kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]
) -> None:
    out = kdrun("show", f"run={finished[0]}").out
    assert out.splitlines()[1].startswith("top1 ")
    assert "peak memory" in out
    assert "objective.teacher_tap" in out
    told = kdrun("show", f"run={finished[0]}", "--json").json
    assert told["summary"].keys() >= {"predicted", "actual", "value"}
    shutil.copytree(finished[0], here / "outputs" / "run" / "mine")
    assert kdrun("show", "run=mine").out.splitlines()[0] == "outputs/run/mine: no recipe"


def test_a_comparison_is_shown_by_its_means(kdrun: Callable[..., Outcome], compared: tuple[Path, Outcome]) -> None:
    assert "top1: pld " in kdrun("show", f"run={compared[0]}").out


def test_a_run_that_there_is_not_and_one_with_other_settings_are_refused(
    kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]
) -> None:
    shutil.copytree(finished[0], here / "outputs" / "run" / "first")
    missing = kdrun("show", "run=frist")
    assert missing.code == 2
    assert "did you mean first" in missing.err
    assert kdrun("show", f"run={finished[0]}", "seed=3").code == 2
