"""kdrun ledger: what was measured beside what was published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from kdrun.cli.ledger import Family, Scale, Verdict
from kdrun.config import schema
from kdrun.config.paths import SearchPath
from kdrun.ledger.verdict import Name
from tests.conftest import Outcome

KEYS = {"recipe", "family", "paper", "scale", "metric", "published", "measured", "interval", "n", "verdict", "cost", "commit"}


@pytest.fixture
def root(compared: tuple[Path, Outcome], here: Path) -> Path:
    """A root whose ledger holds one record that a real comparison wrote."""
    shutil.copytree(compared[0].parent / "ledger", here / "outputs" / "ledger")
    return here / "outputs"


def test_json_gives_one_list_of_flat_records(kdrun: Callable[..., Outcome], root: Path) -> None:
    (record,) = kdrun("ledger", "--json").json
    assert record.keys() >= KEYS
    written = json.loads((root / "ledger" / "small.json").read_text())
    row = written["arms"]["pld"]["top1"]
    assert (record["recipe"], record["paper"], record["scale"], record["metric"]) == ("small", "0000.00000", "bench", "top1")
    assert (record["measured"], record["interval"], record["n"]) == (row["mean"], [row["low"], row["high"]], 3)
    assert record["published"]["value"] == 60.0
    assert record["verdict"] == written["verdict"]["name"]
    assert record["cost"]["seconds"] > 0


def test_the_table_shows_the_same(kdrun: Callable[..., Outcome], root: Path) -> None:
    row = json.loads((root / "ledger" / "small.json").read_text())["arms"]["pld"]["top1"]
    out = kdrun("ledger").out
    assert out.splitlines()[0].strip() == "bench scale"
    assert f"{row['mean']:.2f}" in out
    assert "another setting" in out  # a bench record does not stand beside the paper's number
    assert "60.00" not in out


def test_markdown_keeps_the_scales_apart(kdrun: Callable[..., Outcome], root: Path) -> None:
    paper, bench = kdrun("ledger", "--markdown").out.split("**Bench")
    assert "small" not in paper
    assert "Not attempted yet" in paper
    assert "| small | theory | another setting: Table 9 | pld " in bench


def test_an_empty_ledger_says_how_to_fill_it(kdrun: Callable[..., Outcome], here: Path) -> None:
    assert kdrun("ledger", "--json").json == []
    assert "run.ledger=true" in kdrun("ledger").out
    markdown = kdrun("ledger", "--markdown").out
    assert "|" not in markdown
    assert "run.ledger=true" in markdown
    assert not list(here.iterdir())


def test_the_list_can_be_narrowed(kdrun: Callable[..., Outcome], root: Path, own_recipes: Path) -> None:
    own = f"--config-dir={own_recipes}"
    verdict = kdrun("ledger", "--json").json[0]["verdict"]
    for words, count in (
        (["--scale", "bench"], 1),
        (["--scale", "paper"], 0),
        (["--verdict", verdict], 1),
        (["--verdict", "reproduced"], 0),
        (["--family", "theory"], 1),
        (["--family", "image"], 0),
    ):
        assert len(kdrun("ledger", *words, own, "--json").json) == count
    assert kdrun("ledger", "--scale", "paper").out.strip() == "none of the 1 records is of this kind"


def test_another_root_may_be_named(kdrun: Callable[..., Outcome], compared: tuple[Path, Outcome]) -> None:
    assert len(kdrun("ledger", "--root", str(compared[0].parent), "--json").json) == 1


def test_every_verdict_can_be_asked_for() -> None:
    """The verb's own list spares it the import of scipy; it must be the same."""
    assert [v.value for v in Verdict] == list(get_args(Name))
    assert [s.value for s in Scale] == ["paper", "bench"]
    assert [f.value for f in Family] == list(get_args(schema.Family))


def test_a_record_tells_rivals_student_alone_teacher_and_commit(kdrun: Callable[..., Outcome], root: Path) -> None:
    (told,) = kdrun("ledger", "--json").json
    written = json.loads((root / "ledger" / "small.json").read_text())
    assert told["student_alone"] == written["arms"]["ce"]["top1"]["mean"]
    assert told["rivals"] == {"kd": written["arms"]["kd"]["top1"]["mean"]}
    assert told["teacher_measured"] == written["teacher"]["top1"]
    assert (told["commit"], told["dirty"]) == (written["code"]["commit"], written["code"]["dirty"])
    assert [row["arm"] for row in told["leaderboard"]] == [row["arm"] for row in written["leaderboard"]]


def test_all_lists_every_recipe_once_with_its_published_number(kdrun: Callable[..., Outcome], root: Path, own_recipes: Path) -> None:
    told = kdrun("ledger", "--all", f"--config-dir={own_recipes}", "--json").json
    assert sorted(row["recipe"] for row in told) == sorted(SearchPath.of([own_recipes]).options("recipes"))
    rows = {row["recipe"]: row for row in told}
    assert rows["small"]["n"] == 3
    never = rows["pld_cifar100"]
    assert (never["verdict"], never["n"], never["measured"], never["interval"]) == ("not attempted", 0, None, [None, None])
    assert (never["published"]["value"], never["published"]["table"], never["family"]) == (73.97, "Table 1", "image")
    assert {row["verdict"] for name, row in rows.items() if name != "small"} <= {"not attempted", "impossible here"}


def test_what_was_never_run_stands_in_the_tables_only_if_asked_for(kdrun: Callable[..., Outcome], root: Path) -> None:
    assert "pld_cifar100" not in kdrun("ledger", "--markdown").out
    asked = kdrun("ledger", "--all", "--family", "image", "--scale", "paper", "--markdown").out
    assert "| pld_cifar100 | image | 73.97 (Table 1, last) | - | - | - | - | - | not attempted | - | - |" in asked
    assert "edgefd" not in asked


@pytest.mark.parametrize("words", [["--family", "imag"], ["--scale", "small"], ["--verdict", "fine"]])
def test_a_filter_that_there_is_not_is_refused(kdrun: Callable[..., Outcome], root: Path, words: list[str]) -> None:
    assert kdrun("ledger", *words).code == 2
