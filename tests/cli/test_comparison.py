"""A method beside its rivals over seeds: the table, the claims, the verdict, the record; interrupted and resumed."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pytest
from rich.console import Console

from kdrun.cli import session
from kdrun.cli.tables import show_comparison
from kdrun.config.compose import compose
from kdrun.engine.records import write_json
from kdrun.engine.stage import StageRun
from kdrun.ledger.leaderboard import leaderboard
from tests.conftest import Outcome

ARMS = ("pld", "ce", "kd")


def summaries(folder: Path) -> dict[str, dict[int, float]]:
    """arm -> seed -> the number of that run."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("arms/*/seed-*/summary.json")):
        found.setdefault(file.parts[-3], {})[int(file.parent.name.removeprefix("seed-"))] = json.loads(file.read_text())["value"]
    return found


def test_every_arm_is_run_for_every_seed(compared: tuple[Path, Outcome]) -> None:
    found = summaries(compared[0])
    assert found.keys() == set(ARMS)
    assert all(list(by_seed) == [1, 2, 3] for by_seed in found.values())
    jobs = json.loads((compared[0] / "comparison.json").read_text())["jobs"]
    assert [(j["seed"], j["arm"]) for j in jobs] == [(seed, arm) for seed in (1, 2, 3) for arm in ARMS]  # whole rows first
    assert all(j["done"] for j in jobs)


def test_arms_differ_in_what_the_rival_says_and_in_nothing_else(compared: tuple[Path, Outcome]) -> None:
    trees = {arm: json.loads((compared[0] / "arms" / arm / "seed-2" / "run.json").read_text())["tree"] for arm in ARMS}
    for arm, own in (("ce", {"objective", "teacher"}), ("kd", {"objective"})):
        assert {key for key in trees["pld"] if trees["pld"][key] != trees[arm][key]} == own
    starts = {json.loads((compared[0] / "arms" / arm / "seed-2" / "provenance.json").read_text())["initial_student_sha256"] for arm in ARMS}
    assert len(starts) == 1


def test_the_summary_holds_means_and_differences_paired_by_seed(compared: tuple[Path, Outcome]) -> None:
    values, summary = summaries(compared[0]), json.loads((compared[0] / "summary.json").read_text())
    for arm in ARMS:
        row = summary["arms"][arm]["top1"]
        assert row["mean"] == pytest.approx(mean(values[arm].values()))
        assert row["sd"] == pytest.approx(stdev(values[arm].values()))
        assert row["n"] == 3
        assert row["low"] <= row["mean"] <= row["high"]
    for rival in ("ce", "kd"):
        gap = [values["pld"][seed] - values[rival][seed] for seed in (1, 2, 3)]
        assert summary["differences"][rival]["mean"] == pytest.approx(mean(gap))
    assert [c["text"] for c in summary["claims"]] == ["pld > ce", "pld ~ kd"]
    assert (summary["runs"], summary["planned_runs"], summary["tainted"], summary["changed"]) == (9, 9, [], [])
    assert summary["cost"]["seconds"] > 0


def test_the_table_the_claims_and_the_verdict_are_printed(compared: tuple[Path, Outcome]) -> None:
    summary, out = json.loads((compared[0] / "summary.json").read_text()), compared[1].out
    assert "small (bench scale): top1 over 3 seeds" in out
    labels = {"ce": r"ce \(student alone\)"}
    for arm in ARMS:
        row = summary["arms"][arm]["top1"]
        assert re.search(rf"{labels.get(arm, arm)}\W+{row['mean']:.2f}\W+{row['sd']:.2f}\W+{row['low']:.2f} to {row['high']:.2f}", out)
    for claim in summary["claims"]:
        word = {True: "shows", False: "does not show", None: "open"}[claim["holds"]]
        assert f"claim {claim['text']}: {word}; {claim['sentence']}" in out
    shown = sum(c["holds"] is True for c in summary["claims"])
    assert f"verdict: {summary['verdict']['name']}; {shown} of {len(summary['claims'])} claims show" in out
    assert "note: a world of this size shows nothing" in out


def test_the_table_ranks_the_arms_and_says_who_is_tied(compared: tuple[Path, Outcome]) -> None:
    """As the leaderboard of the runs' own numbers does, which the summary holds."""
    summary, out = json.loads((compared[0] / "summary.json").read_text()), compared[1].out
    rows = leaderboard(summaries(compared[0]), higher_is_better=True)
    assert [(r["rank"], r["arm"], r["ties"], r["gap"]) for r in summary["leaderboard"]] == [(r.rank, r.arm, r.mark, r.gap) for r in rows]
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")][
        1:
    ]  # without the teacher
    assert [row[0].split()[0] for row in table] == [r.arm for r in rows]
    assert [row[-1] for row in table] == [r.mark for r in rows]
    assert [row[6] for row in table] == ["", *(f"{r.gap:+.2f}" for r in rows[1:])]
    assert "tied: arms that share a letter cannot be told apart" in out


LOWER = {
    "recipe": "small", "scale": "bench", "metric": "nll", "method": "pld", "seeds": [1, 2], "teacher": {"nll": 0.1},
    "arms": {
        "pld": {"nll": {"mean": 0.61234, "sd": 0.01, "low": 0.6, "high": 0.625}, "top1": {"mean": 60.0}, "mine": {"mean": 0.25}},
        "ce": {"nll": {"mean": 1.9, "sd": None, "low": None, "high": None}, "top1": {"mean": 50.0}},
        "kd": {"nll": {"mean": None, "sd": None, "low": None, "high": None}, "top1": {"mean": 55.123}},
    },
    "differences": {"ce": {"mean": -1.28766, "low": -1.4, "high": -1.2}, "kd": {"mean": None, "low": None, "high": None}},
    "leaderboard": [
        {"rank": 1, "arm": "pld", "gap": None, "p": None, "paired": None, "ties": "a"},
        {"rank": 2, "arm": "ce", "gap": 1.28766, "p": 0.0121, "paired": True, "ties": "b"},
        {"rank": 3, "arm": "kd", "gap": None, "p": None, "paired": True, "ties": ""},
    ],
    "claims": [], "verdict": {"name": "underpowered", "reason": "2 runs measured"}, "notes": [], "tainted": [], "folder": "run",
}  # fmt: skip


def test_a_metric_of_which_less_is_better_is_told_in_its_unit_and_direction(own_recipes: Path) -> None:
    """And a run that diverged, whose mean is null in the record, is shown as what it is."""
    composed = compose(["recipe=small"], [own_recipes])
    composed.tree["claims"] = ["pld < ce", "pld.top1 > ce.top1", "pld.mine < 0.5", "pld.top5 > ce.top5"]
    told = Console(file=io.StringIO(), width=200)
    show_comparison(told, composed, LOWER)
    lines = told.file.getvalue().splitlines()
    assert "small (bench scale): nll (nats) over 2 seeds" in lines
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert table == [
        ["teacher", "0.1", "", "", "", "", "", "", ""],
        ["pld", "0.6123", "0.01", "0.6 to 0.625", "", "", "", "", "a"],
        ["ce (student alone)", "1.9", "", "", "-1.288", "-1.4 to -1.2", "+1.288", "0.012", "b"],
        ["kd", "NaN", "", "", "NaN", "", "NaN", "", ""],
    ]
    # A line for each further metric that a claim names, the best arm first; of top5 no arm has a number.
    assert "top1: pld 60.00, kd 55.12, ce 50.00" in lines
    assert "mine: pld 0.25" in lines
    assert not [line for line in lines if line.startswith("top5")]


def test_a_run_that_diverged_is_listed(kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]) -> None:
    shutil.copytree(finished[0], here / "runs" / "one")
    file = here / "runs" / "one" / "summary.json"
    write_json(file, {**json.loads(file.read_text()), "value": math.nan})
    assert kdrun("ls", "runs", "--root=runs", "--json").json[0]["result"] == "top1 NaN"


def test_the_published_numbers_of_another_setting_stand_apart(compared: tuple[Path, Outcome]) -> None:
    """A bench run is not the published experiment: its table must not hold the paper's numbers."""
    table, _, after = compared[1].out.partition("└")
    assert "60.0" not in table
    assert "published, another setting (Table 9): ce 50.0 pld 60.0" in after


def test_the_progress_counts_the_runs(compared: tuple[Path, Outcome]) -> None:
    lines = compared[1].out.splitlines()
    assert [line for line in lines if re.match(r"\[\d/9\]", line)] == [
        f"[{3 * (seed - 1) + i}/9] {arm}, seed {seed}" for seed in (1, 2, 3) for i, arm in enumerate(ARMS, 1)
    ]


def test_the_record_is_written(compared: tuple[Path, Outcome]) -> None:
    record = json.loads((compared[0].parent / "ledger" / "small.json").read_text())
    summary = json.loads((compared[0] / "summary.json").read_text())
    assert record["arms"] == summary["arms"]
    assert f"ledger record: {compared[0].parent / 'ledger' / 'small.json'}" in compared[1].out


def test_a_finished_comparison_is_shown_again_without_a_run(compared: tuple[Path, Outcome], kdrun: Callable[..., Outcome]) -> None:
    before = {file: file.stat().st_mtime_ns for file in compared[0].glob("arms/*/*/summary.json")}
    outcome = kdrun("resume", str(compared[0]), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["arms"] == json.loads((compared[0] / "summary.json").read_text())["arms"]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_an_interrupted_comparison_keeps_what_is_finished_and_ends_the_same(
    kdrun: Callable[..., Outcome], here: Path, compared: tuple[Path, Outcome], own_recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = session.launch, iter(range(100))

    def killed(*args: object, **kwargs: object) -> object:
        if next(count) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(session, "launch", killed)
        outcome = kdrun("train", "recipe=small", f"--config-dir={own_recipes}", "run.dir=run", "-q")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert kdrun("ls", "runs", "--root=.", "--json").json[0]["state"] == "resumable"
    kept = {file: file.stat().st_mtime_ns for file in (here / "run").glob("arms/*/*/summary.json")}
    assert len(kept) == 4
    resumed = kdrun("resume", "run")
    assert resumed.code == 0, resumed.err
    assert [line for line in resumed.out.splitlines() if line.startswith("kept: ")] == [
        "kept: pld, seed 1", "kept: ce, seed 1", "kept: kd, seed 1", "kept: pld, seed 2",
    ]  # fmt: skip
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert summaries(here / "run") == summaries(compared[0])


def test_a_stopped_arm_goes_on_where_it_was_and_names_the_comparison(
    kdrun: Callable[..., Outcome], here: Path, compared: tuple[Path, Outcome], own_recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "stop_requested", lambda self: self.stage.step >= 2)
        outcome = kdrun("train", "recipe=small", f"--config-dir={own_recipes}", "run.seeds=[1]", "run.dir=run", "-q")
    assert outcome.code == 75
    assert outcome.err.strip() == f"stopped: stopped at step 2 of 6; go on with: kdrun resume {here / 'run'}"
    resumed = kdrun("resume", "run")
    assert "student: goes on at step 2 of 6" in resumed.out
    assert summaries(here / "run") == {arm: {1: by_seed[1]} for arm, by_seed in summaries(compared[0]).items()}


def test_an_arm_killed_before_its_first_checkpoint_starts_anew_with_clean_metrics(
    kdrun: Callable[..., Outcome], here: Path, compared: tuple[Path, Outcome], own_recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: StageRun, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "save", killed)
        kdrun("train", "recipe=small", f"--config-dir={own_recipes}", "run.seeds=[1]", "run.dir=run", "-q")
    first = here / "run" / "arms" / "pld" / "seed-1" / "metrics.jsonl"
    assert first.read_text()
    assert kdrun("resume", "run", "-q").code == 0
    assert first.read_text() == (compared[0] / "arms" / "pld" / "seed-1" / "metrics.jsonl").read_text()


def test_seeds_alone_compare_a_method_with_nothing(kdrun: Callable[..., Outcome], here: Path, own_recipes: Path) -> None:
    outcome = kdrun("train", "recipe=small", f"--config-dir={own_recipes}", "run.rivals=false", "run.seeds=[4,5]", "--json")
    assert list(outcome.json["arms"]) == ["pld"]
    assert (outcome.json["seeds"], outcome.json["claims"], outcome.json["differences"]) == ([4, 5], [], {})
    assert outcome.json["verdict"]["name"] == "underpowered"


def test_a_comparison_of_limited_runs_is_tainted(kdrun: Callable[..., Outcome], here: Path, own_recipes: Path) -> None:
    outcome = kdrun("train", "recipe=small", f"--config-dir={own_recipes}", "run.dry=true", "run.seeds=[1]", "run.dir=run")
    assert "tainted (run.dry" in outcome.out
    assert json.loads((here / "run" / "summary.json").read_text())["tainted"]
    assert kdrun("ls", "runs", "--root=.", "--json").json[0]["state"] == "tainted"


def test_the_command_line_s_choice_is_the_method_and_rivals_keep_theirs(
    kdrun: Callable[..., Outcome], here: Path, own_recipes: Path
) -> None:
    chosen = ["objective=dkd", "objective.beta=2", "optim.lr=0.1"]
    outcome = kdrun("train", "recipe=small", f"--config-dir={own_recipes}", *chosen, "run.seeds=[1]", "run.dir=run", "-q")
    assert outcome.code == 0, outcome.err
    trees = {p.parts[-3]: json.loads(p.read_text())["tree"] for p in (here / "run").glob("arms/*/*/run.json")}
    assert trees.keys() == {"dkd", "ce", "kd"}
    assert trees["dkd"]["objective"]["beta"] == 2
    assert "beta" not in trees["kd"]["objective"]
    assert {tree["optim"]["lr"] for tree in trees.values()} == {0.1}  # the budget is shared
