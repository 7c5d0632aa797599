"""kdrun reproduce: the plan first, then every arm and seed, then the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.cli import session
from tests.cli.told import Problem, only
from tests.conftest import Outcome

Refusal = Callable[..., list[Problem]]
SHORT = ["run.root=here", "run.dir=here/run"]


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be started."""

    def launched(*args: object, **kwargs: object) -> object:
        raise AssertionError("a run was started")

    monkeypatch.setattr(session, "launch", launched)


def test_it_plans_runs_all_arms_over_the_seeds_and_adds_the_record(kdrun: Callable[..., Outcome], here: Path, own_recipes: Path) -> None:
    outcome = kdrun("reproduce", "small", *SHORT, "--seeds=2", f"--config-dir={own_recipes}")
    assert outcome.code == 0, outcome.err
    plan, _, rest = outcome.out.partition("[1/6]")
    assert "runs     6 (3 arms, 2 seeds)" in plan
    assert "memory" in plan
    assert f"ledger   adds {Path('here') / 'ledger' / 'small.json'}" in plan
    assert "verdict: underpowered" in rest
    record = json.loads((here / "here" / "ledger" / "small.json").read_text())
    assert (list(record["arms"]), record["seeds"], record["runs"]) == (["pld", "ce", "kd"], [1, 2], 6)
    assert record["family"] == "theory"
    assert record["overrides"] == ["run.rivals=true"]
    assert [row["arm"] for row in record["leaderboard"]]


def test_the_record_keeps_what_its_runs_say_of_data_and_packages(compared: tuple[Path, Outcome]) -> None:
    record = json.loads((compared[0].parent / "ledger" / "small.json").read_text())
    one = json.loads((compared[0] / "arms" / "pld" / "seed-1" / "provenance.json").read_text())
    kept = record["provenance"]
    assert one["data"]["fingerprint"] in [row["fingerprint"] for row in kept["data"]]
    assert sum(row["runs"] for row in kept["data"]) == 9
    assert kept["environments"][0]["packages"] == one["environment"]["packages"]
    assert "command" not in kept["environments"][0]
    assert [row["commit"] for row in kept["codes"]] == [record["code"]["commit"]]


def test_dry_shows_the_plan_and_starts_nothing(kdrun: Callable[..., Outcome], here: Path, own_recipes: Path, untouched: None) -> None:
    told = kdrun("reproduce", "small", "--dry", f"--config-dir={own_recipes}")
    assert "runs     9 (3 arms, 3 seeds)" in told.out  # the recipe's own seeds
    plan = kdrun("reproduce", "small", "--dry", "--json", "--seeds=4", f"--config-dir={own_recipes}").json
    assert (plan["runs"], plan["arms"]) == (12, ["pld", "ce", "kd"])
    assert not list(here.iterdir())


@pytest.mark.parametrize(("answer", "started"), [("n\n", False), ("y\n", True)])
def test_a_terminal_is_asked(
    kdrun: Callable[..., Outcome], here: Path, own_recipes: Path, monkeypatch: pytest.MonkeyPatch, answer: str, started: bool
) -> None:
    asked, begun = [], []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text: asked.append(text) or answer.startswith("y"))
    monkeypatch.setattr(session, "run_session", lambda composed, json, quiet: begun.append(composed.recipe))
    assert kdrun("reproduce", "small", f"--config-dir={own_recipes}").code == 0
    assert (asked, begun) == (["start?"], ["small"] if started else [])
    assert kdrun("reproduce", "small", "--yes", f"--config-dir={own_recipes}").code == 0
    assert asked == ["start?"]
    assert begun[-1] == "small"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.dry=true", "run.dry=True"),
        ("run.max_steps=2", "run.max_steps=2"),
        ("dataset.subset=50", "dataset.subset from the command line"),
        ("optim.lr=0.3", "optim.lr is set on the command line, not by the recipe"),
    ],
)
def test_a_limited_run_is_refused_with_the_reason_before_anything(
    kdrun: Callable[..., Outcome], here: Path, own_recipes: Path, untouched: None, override: str, reason: str
) -> None:
    recipe = "kd_digits" if "subset" in override else "small"
    outcome = kdrun("reproduce", recipe, override, f"--config-dir={own_recipes}")
    assert outcome.code == 3
    assert reason in outcome.err
    assert not list(here.iterdir())


def test_uncommitted_changes_are_announced_and_an_older_record_is_named(
    kdrun: Callable[..., Outcome],
    here: Path,
    own_recipes: Path,
    untouched: None,
    compared: tuple[Path, Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdrun.engine.provenance.code", lambda: {"commit": "0123abc", "dirty": True, "changed": ["M kdrun/x.py"]})
    out = kdrun("reproduce", "small", "--dry", f"run.root={compared[0].parent}", f"--config-dir={own_recipes}").out
    assert "1 uncommitted changes: the record will say so (dirty)" in out
    assert f"ledger   replaces {compared[0].parent / 'ledger' / 'small.json'} (" in out
    assert ", n = 3, " in out


def test_what_the_verb_sets_itself_is_not_set_twice(refusal: Refusal, own_recipes: Path) -> None:
    assert only(refusal("reproduce", "small", "recipe=kd_digits", f"--config-dir={own_recipes}")).key == "recipe=kd_digits"
    assert "small" in only(refusal("reproduce", "smal", f"--config-dir={own_recipes}")).remedy
