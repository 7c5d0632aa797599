"""What every recipe must say: its paper, its scale, published numbers, claims that can be judged, and where each value is from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import yaml

from kdrun.config.check import instantiate
from kdrun.config.compose import Composed, compose
from kdrun.config.files import load
from kdrun.config.paths import SearchPath, home
from kdrun.config.schema import Family
from kdrun.engine.compare import arm_names, jobs, method_name
from kdrun.evaluation.metrics import ELSEWHERE, KINDS
from kdrun.ledger.claims import claim_problems
from kdrun.ledger.published import lookup
from kdrun.ledger.table import ALONE

RECIPES = SearchPath.of().options("recipes")
OWN_PAIR = "lm_kd"  # for the user's own models and texts: no paper, no seeds
SAID = ("optim", "source", "dataset", "student", "teacher", "when")  # what must say where it comes from (law 9)
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^']|'')*'")


@pytest.fixture(scope="module", params=sorted({*RECIPES} - {OWN_PAIR}))
def recipe(request: pytest.FixtureRequest) -> Composed:
    return compose([f"recipe={request.param}", "run.rivals=true"])


def measured(recipe: Composed) -> list[str]:
    """The names of the metrics that the recipe's evaluation gives."""
    return list(instantiate(recipe.tree["evaluation"], "evaluation").names())


def commented(line: str) -> bool:
    """Whether a line of YAML ends in a comment that says something."""
    return re.search(r"(^|\s)#\s*\w", QUOTED.sub("", line)) is not None


def leaf_lines(node: yaml.Node, name: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every leaf, the entries of `when` included."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            inner = f"{name}.{key.value}" if name else str(key.value)
            if isinstance(value, (yaml.MappingNode, yaml.SequenceNode)) and value.value and name.partition(".")[0] != "when":
                yield from leaf_lines(value, inner)
            else:
                yield inner, key.start_mark.line
    elif isinstance(node, yaml.SequenceNode) and name == "when":
        for number, item in enumerate(node.value):
            yield from leaf_lines(item, f"{name}.{number}")
    else:
        yield name, node.start_mark.line


def unexplained(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), yaml.safe_load(text)
    claim = (tree.get("teacher") or {}).get("claim") or {}
    found = []
    for key, line in leaf_lines(yaml.compose(text) or yaml.MappingNode("", [])):
        if key.partition(".")[0] not in SAID or (key.startswith("teacher.claim") and claim.get("source")):
            continue
        if not commented(lines[line]):
            found.append(f"{file.name}:{line + 1} {key}")
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_hyper_parameter_says_where_it_comes_from(name: str) -> None:
    assert unexplained(RECIPES[name]) == []


def test_a_value_that_does_not_say_is_found(tmp_path: Path) -> None:
    """The law's own test can fail."""
    file = tmp_path / "x.yaml"
    file.write_text(
        'optim:\n  lr: 0.1  # Table 3\n  name: "a # b"\nteacher:\n  claim: {value: 1, source: Table 2}\nrun: {seeds: [1]}\n'
        "when:\n  - {if: [objective=kd], objective.temperature: 4}\n  - {if: [objective=dkd], objective.beta: 8}   # Sec. 4\n"
    )
    assert unexplained(file) == ["x.yaml:3 optim.name", "x.yaml:8 when.0.if", "x.yaml:8 when.0.objective.temperature"]


def test_it_names_its_paper_and_its_scale(recipe: Composed) -> None:
    paper = recipe.tree["paper"]
    assert all(paper[key] for key in ("title", "authors", "venue"))
    assert 2000 < paper["year"] < 2100
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper["arxiv"])
    assert recipe.origins["scale"].startswith("recipes/")
    assert recipe.tree["about"]


@pytest.mark.parametrize("name", RECIPES)
def test_it_says_to_which_family_it_belongs(name: str) -> None:
    assert load(RECIPES[name]).get("family") in get_args(Family)


def test_recipes_of_one_paper_are_of_one_family() -> None:
    found: dict[str, set[str]] = {}
    for file in RECIPES.values():
        tree = load(file)
        found.setdefault((tree.get("paper") or {}).get("arxiv", file.stem), set()).add(tree["family"])
    assert {paper: families for paper, families in found.items() if len(families) > 1} == {}


def test_its_name_tells_paper_data_and_scale(recipe: Composed) -> None:
    """pld_cifar100: the published setting; a bench recipe is never taken for one."""
    assert recipe.recipe is not None
    bench = bool({"bench", "digits"} & {*recipe.recipe.split("_")})
    assert recipe.tree["scale"] == ("bench" if bench else "paper")
    assert recipe.recipe.startswith(f"{method_name(recipe)}_")


def test_a_bench_recipe_ends_in_a_verdict(recipe: Composed) -> None:
    if recipe.tree["scale"] == "bench":
        own = compose([f"recipe={recipe.recipe}"])
        assert own.tree["run"]["rivals"] is True
        assert len(own.tree["run"]["seeds"]) >= 3


def says(recipe: Composed, words: str) -> bool:
    """Whether a note begins so: what a recipe lacks, it says."""
    return any(note.startswith(words) for note in recipe.tree["notes"])


def test_it_states_published_numbers(recipe: Composed) -> None:
    assert recipe.tree["published"] or says(recipe, "No published number")  # both: there are numbers, of other choices than its own
    for table in recipe.tree["published"]:
        assert table["table"]
        assert table["rows"]
        assert table["metric"] in {*measured(recipe), *ELSEWHERE}
        for row in table["rows"]:
            cells: dict[Any, Any] = {k: v for k, v in row.items() if k != "if"}
            assert cells
            assert all(isinstance(method, str) for method in cells)
            for method, cell in cells.items():
                value, *spread = cell if isinstance(cell, list) else [cell]
                assert 0 < value < (1000 if table["metric"] == "aurc" else 100), method
                assert not spread or 0 < spread[0] < 5, method
            for condition in row.get("if", []):
                key, option = condition.split("=")
                named = "/" in option or timm.is_model(option)  # of the hub, or of timm
                there = named if key.endswith(".name") else option in SearchPath.of().options(key)
                assert there, condition


def test_at_paper_scale_its_own_number_is_among_them(recipe: Composed) -> None:
    if recipe.tree["scale"] == "paper":
        found = lookup(recipe.tree["published"], recipe.facts(), method_name(recipe))
        if says(recipe, "No published number"):
            assert found is None
            return
        assert found is not None
        assert found.metric == recipe.tree["evaluation"]["primary"] or found.metric in ELSEWHERE
        alone = [lookup(recipe.tree["published"], recipe.facts(), arm) for arm in ALONE]
        assert says(recipe, "No arm of labels alone") or any(alone)


def test_the_recipe_for_an_own_pair_compares_with_labels_alone() -> None:
    own = compose([f"recipe={OWN_PAIR}"]).tree
    assert own["about"]
    assert "sft" in own["rivals"]
    assert own["claims"] == ["lm_kd < sft"]


def test_its_claims_can_be_judged(recipe: Composed) -> None:
    assert recipe.tree["claims"]
    assert claim_problems(recipe.tree["claims"], arm_names(recipe), [*measured(recipe), *KINDS], recipe.tree["evaluation"]["primary"]) == []


def test_labels_alone_are_among_its_rivals(recipe: Composed) -> None:
    assert bool({*ALONE} & {*recipe.tree["rivals"]}) is not says(recipe, "No arm of labels alone")


def test_every_rival_composes_to_an_experiment_of_its_own(recipe: Composed, tmp_path: Path) -> None:
    one_seed = compose([f"recipe={recipe.recipe}", "run.rivals=true", "run.seeds=[1]"])
    hashes = {job.arm: job.composed.hash() for job in jobs(one_seed, tmp_path)}
    assert list(hashes) == arm_names(recipe)
    assert len(set(hashes.values())) == len(hashes)


def test_recipes_are_short() -> None:
    assert {name: len(file.read_text().splitlines()) for name, file in RECIPES.items() if len(file.read_text().splitlines()) > 70} == {}
    assert all(file.is_relative_to(home()) for file in RECIPES.values())
