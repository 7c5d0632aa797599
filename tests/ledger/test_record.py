"""From finished runs to one record, and what may not become one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kdrun.config.compose import Composed, compose
from kdrun.engine.compare import Job
from kdrun.errors import CheckFailed
from kdrun.ledger.record import assess, changed_from_recipe, must_be_recordable, other_choices, portable, record_file, write_record
from kdrun.ledger.table import cells, flat, read_ledger

RECIPE = """# @package _global_
defaults:
  - override /dataset: gaussians
  - override /teacher: truth
  - override /student: mlp
  - override /objective: pld
  - _self_
paper: {title: "A small world", year: 2025, arxiv: "0000.00000"}
scale: SCALE
run: {rivals: true, seeds: [1, 2, 3]}
published:
  - {table: Table 9, metric: top1, n: 3, rows: [{if: [student=mlp], ce: 50.0, pld: [61.0, 0.5], dkd: 58.0}]}
rivals: {ce: [objective=ce], kd: [objective=kd]}
claims: ["pld > ce", "pld > ce + 8", "pld ~ kd", "dkd > ce"]
notes: ["a note"]
"""
# top1 by arm for seeds 1, 2, 3. pld minus ce is 10, 9, 11: mean 10, sd 1; t(2) at 97.5 % is 4.302653.
RUNS = {"pld": (60.0, 62.0, 64.0), "ce": (50.0, 53.0, 53.0), "kd": (60.0, 63.0, 63.0)}
MACHINE = "2 CPU cores (x86_64), 1 threads"
HALF = 4.302653 / 3**0.5


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with the recipes `small` (bench) and `large` (paper)."""
    (tmp_path / "own" / "recipes").mkdir(parents=True)
    for name, scale in (("small", "bench"), ("large", "paper")):
        (tmp_path / "own" / "recipes" / f"{name}.yaml").write_text(RECIPE.replace("SCALE", scale))
    return tmp_path / "own"


def composed_of(recipes: Path, *overrides: str, recipe: str = "small") -> Composed:
    return compose([f"recipe={recipe}", f"run.root={recipes.parent / 'outputs'}", *overrides], [recipes])


def finish(composed: Composed, folder: Path, runs: Mapping[str, Sequence[float]] = RUNS, tainted: Sequence[str] = ()) -> list[Job]:
    """The jobs of a comparison whose runs have left these numbers; a missing number is a run that is not done."""
    jobs = [Job(arm, seed, composed, folder / "arms" / arm / f"seed-{seed}") for seed in (1, 2, 3) for arm in runs]
    for job in jobs:
        if job.seed > len(runs[job.arm]):
            continue
        value = runs[job.arm][job.seed - 1]
        summary = {
            "metric": "top1", "value": value, "test": {"top1": value - 1, "nll": 1 + job.seed / 10}, "tainted": list(tainted),
            "teacher": {"from": "/home/somebody/teacher", "sha256": "ab", "top1": 99.0},
            "cost": {"seconds": 30.0, "cpu_seconds": 60.0, "peak_memory_bytes": 1000 * job.seed, "hardware": MACHINE},
            "student": {"parameters": 318, "flops": 608},
        }  # fmt: skip
        job.folder.mkdir(parents=True)
        (job.folder / "summary.json").write_text(json.dumps(summary))
    return jobs


@pytest.fixture
def document(recipes: Path, tmp_path: Path) -> dict[str, Any]:
    composed = composed_of(recipes)
    return assess(composed, finish(composed, tmp_path / "run"), tmp_path / "run")


def test_means_are_of_the_number_by_protocol(document: dict[str, Any]) -> None:
    """The protocol's number, not the last epoch's, which is one point lower here."""
    row = document["arms"]["pld"]["top1"]
    assert (row["n"], row["mean"], row["sd"]) == (3, 62.0, pytest.approx(2.0))
    assert (row["low"], row["high"]) == (pytest.approx(62 - 2 * HALF, abs=1e-5), pytest.approx(62 + 2 * HALF, abs=1e-5))
    assert row["by_seed"] == {"1": 60.0, "2": 62.0, "3": 64.0}
    assert document["arms"]["kd"]["nll"]["mean"] == pytest.approx(1.2)


def test_differences_are_paired_by_seed(document: dict[str, Any]) -> None:
    gap = document["differences"]["ce"]
    assert (gap["mean"], gap["n"]) == (pytest.approx(10.0), 3)
    assert (gap["low"], gap["high"]) == (pytest.approx(10 - HALF, abs=1e-5), pytest.approx(10 + HALF, abs=1e-5))
    assert document["differences"].keys() == {"ce", "kd"}


def test_claims_are_held_against_the_interval_and_those_of_missing_arms_left_out(document: dict[str, Any]) -> None:
    assert {c["text"]: c["holds"] for c in document["claims"]} == {"pld > ce": True, "pld > ce + 8": None, "pld ~ kd": True}


def test_a_bench_verdict_is_of_the_direction_and_looks_at_no_published_number(document: dict[str, Any]) -> None:
    assert document["published"]["value"] == 61.0
    assert document["verdict"]["name"] == "underpowered"  # one claim is open
    assert "61" not in document["verdict"]["reason"]


def test_a_paper_verdict_compares_with_the_published_mean(recipes: Path, tmp_path: Path) -> None:
    composed = composed_of(recipes, recipe="large")
    near = assess(composed, finish(composed, tmp_path / "near"), tmp_path / "near")
    assert near["verdict"]["name"] == "reproduced"
    far = assess(composed, finish(composed, tmp_path / "far", {"pld": (70.0, 70.1, 70.2)}), tmp_path / "far")
    assert far["verdict"]["name"] == "better"


def test_less_may_be_better(recipes: Path, tmp_path: Path) -> None:
    """Runs whose NLL lies below the published one are better, and an accuracy is not compared with an NLL."""
    composed = composed_of(recipes, "evaluation.primary=nll", recipe="large")
    jobs = finish(composed, tmp_path / "run", {"pld": (0.5, 0.51, 0.52)})
    for job in jobs:
        file = job.folder / "summary.json"
        file.write_text(file.read_text().replace('"metric": "top1"', '"metric": "nll"'))
    assert assess(composed, jobs, tmp_path / "run")["published"] is None
    composed.tree["published"] = [{"table": "Table 9", "metric": "nll", "n": 3, "rows": [{"pld": [0.9, 0.01]}]}]
    assert assess(composed, jobs, tmp_path / "run")["verdict"]["name"] == "better"


def test_a_claim_about_a_metric_that_an_arm_does_not_have_is_left_out(recipes: Path, tmp_path: Path) -> None:
    """The student alone has no agreement with a teacher."""
    composed = composed_of(recipes)
    composed.tree["claims"] = ["pld.agreement > ce.agreement", "pld > ce"]
    document = assess(composed, finish(composed, tmp_path / "run"), tmp_path / "run")
    assert [c["text"] for c in document["claims"]] == ["pld > ce"]


def test_the_cost_is_that_of_all_runs(document: dict[str, Any]) -> None:
    assert document["cost"] == {
        "seconds": 270.0,
        "cpu_seconds": 540.0,
        "peak_memory_bytes": 3000,
        "hardware": MACHINE,
    }
    assert (document["runs"], document["planned_runs"], document["seeds"]) == (9, 9, [1, 2, 3])


def test_it_says_what_made_it(document: dict[str, Any], recipes: Path) -> None:
    composed = composed_of(recipes)
    assert document["config_hash"] == composed.hash()
    assert document["choices"]["objective"] == "pld"
    assert document["code"].keys() >= {"commit", "dirty"}
    assert document["teacher"]["top1"] == 99.0
    assert document["notes"] == ["a note"]


def test_the_arms_are_ranked_with_who_is_tied(document: dict[str, Any]) -> None:
    """pld minus kd is 0, -1, 1: not to be told apart; both are some ten points above ce."""
    assert [(r["rank"], r["arm"], r["ties"]) for r in document["leaderboard"]] == [(1, "pld", "a"), (1, "kd", "a"), (3, "ce", "b")]
    assert document["leaderboard"][2]["gap"] == pytest.approx(-10.0)


def test_a_record_may_stand_beside_the_recipe_s_own(document: dict[str, Any], recipes: Path) -> None:
    composed = composed_of(recipes, "objective=dkd")
    assert write_record(composed, document, suffix="many").name == "small-objective_dkd-many.json"


def test_single_runs_are_kept_to_the_last_bit(recipes: Path, tmp_path: Path) -> None:
    """A repetition is held against them."""
    value = 61.23456789012345
    document = assess(
        composed_of(recipes), finish(composed_of(recipes), tmp_path / "run", {"pld": (value, value, value)}), tmp_path / "run"
    )
    assert document["arms"]["pld"]["top1"]["by_seed"] == {"1": value, "2": value, "3": value}


def test_the_command_line_is_kept_without_what_belongs_to_one_machine(document: dict[str, Any], recipes: Path) -> None:
    said = ["teacher=mlp", "objective=dkd", "hardware.threads=1", "run.seeds=[1,2]", "run.dir=/home/x", "dataset.path=/data", "seed=3"]
    assert portable(["recipe=small", *said, "run.ledger=true", "run.rivals=false"]) == [
        "teacher=mlp", "objective=dkd", "hardware.threads=1", "seed=3", "run.rivals=false",
    ]  # fmt: skip
    composed = composed_of(recipes, "hardware.threads=1")
    record = json.loads(write_record(composed, document).read_text())
    assert record["overrides"] == ["hardware.threads=1"]
    assert record_file(composed).name == "small.json"


@pytest.mark.parametrize("dirty", [True, False])
def test_uncommitted_changes_do_not_keep_a_record_out_but_are_told(document: dict[str, Any], recipes: Path, dirty: bool) -> None:
    composed = composed_of(recipes)
    code = {"commit": "0123abcdef", "dirty": dirty, "changed": ["M kdrun/x.py"] if dirty else []}
    record = json.loads(write_record(composed, {**document, "code": code}).read_text())
    assert record["code"] == code
    assert cells(record)[-1] == ("0123abc+" if dirty else "0123abc")


def test_a_record_is_written_without_what_belongs_to_one_machine(document: dict[str, Any], recipes: Path) -> None:
    composed = composed_of(recipes)
    file = write_record(composed, document)
    assert file == recipes.parent / "outputs" / "ledger" / "small.json"
    text = file.read_text()
    assert str(recipes.parent) not in text
    assert "/home/somebody" not in text
    (record,) = read_ledger(recipes.parent / "outputs")
    assert record["teacher"] == {"sha256": "ab", "top1": 99.0}
    assert record["arms"] == document["arms"]
    assert flat(record)["measured"] == 62.0


def test_the_same_experiment_again_replaces_its_record(document: dict[str, Any], recipes: Path) -> None:
    composed = composed_of(recipes)
    write_record(composed, document)
    write_record(composed, {**document, "notes": ["again"]})
    assert [r["notes"] for r in read_ledger(recipes.parent / "outputs")] == [["again"]]


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        (["objective=dkd"], "small-objective_dkd"),
        (["teacher=mlp", "objective=dkd"], "small-teacher_mlp-objective_dkd"),
        (["objective=pld"], "small"),  # the recipe's own, said again
    ],
)
def test_another_pair_or_method_is_a_record_of_its_own(recipes: Path, tmp_path: Path, choices: list[str], name: str) -> None:
    composed = composed_of(recipes, *choices)
    runs = {composed.choices["objective"]: (60.0, 62.0, 64.0), "ce": (50.0, 53.0, 53.0)}
    document = assess(composed, finish(composed, tmp_path / "run", runs), tmp_path / "run")
    assert document["changed"] == []
    file = write_record(composed, document)
    assert file.stem == name
    assert json.loads(file.read_text())["chosen"] == {k: v for k, v in (c.split("=") for c in choices) if name != "small"}


def test_its_published_number_is_that_of_the_method(recipes: Path, tmp_path: Path) -> None:
    composed = composed_of(recipes, "objective=dkd")
    document = assess(composed, finish(composed, tmp_path / "run", {"dkd": (60.0, 62.0, 64.0)}), tmp_path / "run")
    assert document["published"]["value"] == 58.0


# -- what may not become a record -------------------------------------------------------------------------------------

CHANGES = [
    ("optim.lr=0.3", "optim.lr"),
    ("objective.temperature=3", "objective.temperature"),
    ("dataset.sigma=1.0", "dataset.sigma"),
    ("teacher.extra=other_logits", "teacher.extra"),
    ("source.batch_size=16", "source.batch_size"),
    ("evaluation.primary=nll", "evaluation.primary"),
    ("plan.start_from=x", "plan.start_from"),
    ("optim=adamw", "optim"),
    ("dataset=digits", "dataset"),
]


@pytest.mark.parametrize(("override", "key"), CHANGES)
def test_a_setting_that_is_not_the_recipe_s_is_refused(document: dict[str, Any], recipes: Path, override: str, key: str) -> None:
    composed = composed_of(recipes, override)
    assert changed_from_recipe(composed) == [key]
    for refuse in (lambda: must_be_recordable(composed), lambda: write_record(composed, {**document, "changed": [key]})):
        with pytest.raises(CheckFailed, match=f"{key} is set on the command line, not by the recipe"):
            refuse()
    assert not (recipes.parent / "outputs").exists()


@pytest.mark.parametrize(
    "override", ["seed=7", "run.seeds=[4,5]", "run.rivals=false", "hardware=cpu", "hardware.threads=1", "objective=dkd", "student=resnet8"]
)
def test_what_is_the_recipe_s_own_freedom_is_not_a_change(recipes: Path, override: str) -> None:
    composed = composed_of(recipes, override)
    assert changed_from_recipe(composed) == []
    must_be_recordable(composed)


def test_where_the_data_lie_is_not_a_change() -> None:
    composed = compose(["recipe=pld_cifar100", "dataset.path=/data"])
    assert changed_from_recipe(composed) == []


@pytest.mark.parametrize("limit", ["run.dry=true", "run.max_steps=5"])
def test_a_limited_run_is_refused_before_and_after(recipes: Path, tmp_path: Path, limit: str) -> None:
    composed = composed_of(recipes, limit)
    with pytest.raises(CheckFailed, match=limit.partition("=")[0]):
        must_be_recordable(composed)
    document = assess(composed, finish(composed, tmp_path / "run", tainted=[limit]), tmp_path / "run")
    assert document["tainted"] == [limit]
    with pytest.raises(CheckFailed, match=limit):
        write_record(composed, document)


def test_one_tainted_run_taints_the_comparison(recipes: Path, tmp_path: Path) -> None:
    composed = composed_of(recipes)
    jobs = finish(composed, tmp_path / "run")
    file = jobs[4].folder / "summary.json"
    file.write_text(file.read_text().replace('"tainted": []', '"tainted": ["dataset.subset from the command line"]'))
    with pytest.raises(CheckFailed, match=r"dataset\.subset from the command line"):
        write_record(composed, assess(composed, jobs, tmp_path / "run"))


def test_missing_runs_are_refused(recipes: Path, tmp_path: Path) -> None:
    composed = composed_of(recipes)
    jobs = finish(composed, tmp_path / "run", {**RUNS, "kd": (60.0,)})
    with pytest.raises(CheckFailed, match="2 of 9 runs are missing"):
        write_record(composed, assess(composed, jobs, tmp_path / "run"))
    assert read_ledger(recipes.parent / "outputs") == []


def test_a_record_needs_a_recipe() -> None:
    with pytest.raises(CheckFailed, match="recipe=NAME"):
        must_be_recordable(compose(["dataset=gaussians"]))


def test_all_reasons_come_at_once(recipes: Path) -> None:
    with pytest.raises(CheckFailed) as caught:
        must_be_recordable(composed_of(recipes, "run.dry=true", "optim.lr=3", "optim=adamw"))
    assert all(reason in str(caught.value) for reason in ("run.dry", "optim.lr is set", "optim is set", "remedy"))


def test_other_choices_are_those_that_differ_from_the_recipe_s(recipes: Path) -> None:
    assert other_choices(composed_of(recipes, "teacher=mlp", "hardware=cpu", "objective=pld")) == {"teacher": "mlp", "hardware": "cpu"}


def test_where_every_seed_has_a_teacher_of_its_own_their_mean_is_told(recipes: Path, tmp_path: Path) -> None:
    composed = composed_of(recipes)
    jobs = finish(composed, tmp_path / "run")
    for job in jobs:
        file = job.folder / "summary.json"
        summary = json.loads(file.read_text())
        summary["teacher"] |= {"sha256": f"seed {job.seed}", "top1": 90.0 + job.seed}
        file.write_text(json.dumps(summary))
    assert assess(composed, jobs, tmp_path / "run")["teacher"] == {"from": "3 teachers, one for each seed", "top1": 92.0}
