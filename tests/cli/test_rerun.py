"""From a number back to what made it, and the same number again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdrun as package
from kdrun.engine import provenance
from tests.cli.told import Problem, only
from tests.conftest import Outcome

Refusal = Callable[..., list[Problem]]


@pytest.fixture
def ledger(compared: tuple[Path, Outcome], here: Path) -> Path:
    """outputs/ledger/small.json of the current folder, as a real comparison wrote it."""
    shutil.copytree(compared[0].parent / "ledger", here / "outputs" / "ledger")
    return here / "outputs" / "ledger" / "small.json"


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    return record


# -- kdrun ledger rerun -----------------------------------------------------------------------------------------------


def test_a_record_comes_out_bit_for_bit_and_stays_as_it_is(kdrun: Callable[..., Outcome], ledger: Path, own_recipes: Path) -> None:
    before = ledger.read_bytes()
    outcome = kdrun("ledger", "rerun", "small", f"--config-dir={own_recipes}")
    assert outcome.code == 0, outcome.err
    record = json.loads(before)
    means = sum(len(metrics) for metrics in record["arms"].values())
    assert f"of {means} means: {means} equal bit for bit" in outcome.out
    assert "configuration: the same" in outcome.out
    assert ledger.read_bytes() == before
    (told,) = (json.loads(file.read_text()) for file in Path("outputs").glob("small/*/rerun.json"))
    assert {row["match"] for row in told["means"]} == {"equal bit for bit"}
    assert told["commit"] == record["code"]["commit"]


def test_a_mean_outside_its_prediction_interval_ends_in_exit_code_3(kdrun: Callable[..., Outcome], ledger: Path, own_recipes: Path) -> None:
    def spoil(record: dict[str, Any]) -> None:
        row = record["arms"]["kd"]["top1"]
        row.update({"mean": 5.0, "sd": 0.1, "low": 4.8, "high": 5.2, "by_seed": {"1": 4.9, "2": 5.0, "3": 5.1}})

    changed(ledger, spoil)
    outcome = kdrun("ledger", "rerun", "small", "--seeds=[1,2]", f"--config-dir={own_recipes}")
    assert outcome.code == 3
    assert "1 of " in outcome.err
    assert "means differ from the record 'small'" in outcome.err
    assert "different" in next(line for line in outcome.out.splitlines() if "kd" in line and "top1" in line and "│" in line)
    assert "by chance alone one independent mean in twenty" in outcome.out


def test_a_number_of_seeds_means_the_first_ones_and_json_has_it_all(kdrun: Callable[..., Outcome], ledger: Path, own_recipes: Path) -> None:
    told = kdrun("ledger", "rerun", "small", "--seeds=1", f"--config-dir={own_recipes}", "--json").json
    assert {row["n"] for row in told["means"]} == {1}
    assert {row["match"] for row in told["means"]} == {"equal bit for bit"}
    assert told["config_hash"]["record"] == told["config_hash"]["now"]


def test_what_is_no_repetition_is_refused(refusal: Refusal, ledger: Path, own_recipes: Path) -> None:
    own = f"--config-dir={own_recipes}"
    assert only(refusal("ledger", "rerun", "smal", own)).remedy == "did you mean small?"
    assert [p.key for p in refusal("ledger", "rerun", "small", "optim.lr=1", "run.seeds=[4]", own)] == ["optim.lr", "run.seeds"]
    assert only(refusal("ledger", "rerun", "small", "--seeds=some", own)).key == "--seeds"
    assert only(refusal("ledger", "rerun", "small", "--seeds=0", own)).key == "run.seeds"


def test_a_record_whose_arms_the_recipe_does_not_have_is_refused(refusal: Refusal, ledger: Path, own_recipes: Path) -> None:
    changed(ledger, lambda record: record["arms"].update({"lr_0.1": record["arms"]["kd"]}))
    assert "no arm named lr_0.1" in only(refusal("ledger", "rerun", "small", f"--config-dir={own_recipes}")).head


def test_the_difference_of_the_code_is_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    for folder in ("kdrun", "conf", "recipes", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("one\n")
    (tmp_path / "kdrun" / "__init__.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    monkeypatch.setattr(package, "__file__", str(tmp_path / "kdrun" / "__init__.py"))
    assert provenance.changes_since(first) == f"the same as at {first[:7]}"
    (tmp_path / "recipes" / "a.txt").write_text("two\n")
    (tmp_path / "docs" / "a.txt").write_text("not code\n")
    git("commit", "-qam", "second")
    assert provenance.changes_since(first) == f"since {first[:7]}: 1 file changed, 1 insertion(+), 1 deletion(-)"
    (tmp_path / "conf" / "a.txt").write_text("three\n")
    assert provenance.changes_since(first).endswith("1 deletion(-); 1 uncommitted changes")
    assert provenance.changes_since("f" * 40) == "commit fffffff is not in this checkout"
    assert provenance.changes_since(None) == "the commit is not known"


# -- kdrun show --provenance ------------------------------------------------------------------------------------------


def test_the_number_of_a_run_leads_to_code_data_teacher_and_environment(
    kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]
) -> None:
    told = kdrun("show", f"run={finished[0]}", "--provenance", "--json").json
    written = json.loads((finished[0] / "provenance.json").read_text())
    assert told["value"] == json.loads((finished[0] / "summary.json").read_text())["value"]
    for key in ("code", "config_hash", "data", "teacher", "seed", "initial_student_sha256", "environment"):
        assert told[key] == written[key]
    shutil.copytree(finished[0], here / "outputs" / "run" / "mine")
    out = kdrun("show", "run=mine", "--provenance").out
    for value in (
        written["data"]["fingerprint"],
        written["teacher"]["sha256"],
        written["code"]["commit"],
        written["environment"]["python"],
    ):
        assert value in out


def test_the_number_of_a_comparison_leads_to_every_run_of_it(kdrun: Callable[..., Outcome], compared: tuple[Path, Outcome]) -> None:
    told = kdrun("show", f"run={compared[0]}", "--provenance", "--json").json
    assert [(run["arm"], run["seed"]) for run in told["runs"]] == [(arm, seed) for seed in (1, 2, 3) for arm in ("pld", "ce", "kd")]
    one = json.loads((compared[0] / told["runs"][4]["folder"] / "summary.json").read_text())
    assert told["runs"][4]["value"] == one["value"]
    assert told["code"].keys() >= {"commit", "dirty"}
    assert told["data"][0]["runs"] == 9


def test_the_number_of_a_record_leads_back_as_far_as_it_was_kept(kdrun: Callable[..., Outcome], ledger: Path) -> None:
    told = kdrun("show", "ledger=small", "--provenance", "--json").json
    record = json.loads(ledger.read_text())
    assert told["value"] == record["arms"]["pld"]["top1"]["mean"]
    assert (told["code"], told["config_hash"], told["data"]) == (record["code"], record["config_hash"], record["provenance"]["data"])
    out = kdrun("show", "ledger=small").out
    assert record["provenance"]["data"][0]["fingerprint"] in out
    assert "measure it again: kdrun ledger rerun small" in out
    changed(ledger, lambda r: [r.pop(key) for key in ("provenance", "overrides")])  # as records were
    lines = dict(line.split(maxsplit=1) for line in kdrun("show", "ledger=small", "--provenance").out.splitlines())
    assert lines["data"].strip() == "not kept"


def test_provenance_of_nothing_is_refused(refusal: Refusal, here: Path) -> None:
    assert only(refusal("show", "--provenance")).key == "--provenance"
    assert only(refusal("show", "ledger=nothing")).key == "ledger"
    assert only(refusal("show", "ledger=nothing", "seed=2")).key == "seed=2"
