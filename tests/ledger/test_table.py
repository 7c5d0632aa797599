"""The ledger for people, for README and for machines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kdrun.ledger.table import COLUMNS, cells, flat, read_ledger, to_markdown


def row(mean: float, low: float | None = None, high: float | None = None, n: int = 3) -> dict[str, Any]:
    return {"n": n, "mean": mean, "sd": None if low is None else 1.0, "low": low, "high": high, "by_seed": {}}


RECORD: dict[str, Any] = {
    "recipe": "pld_small", "chosen": {}, "paper": {"title": "A paper", "arxiv": "2506.12542"}, "scale": "paper",
    "metric": "top1", "method": "pld",
    "published": {"value": 73.97, "spread": 0.05, "n": 3, "metric": "top1", "table": "Table 1", "protocol": "last"},
    "arms": {"pld": {"top1": row(73.5, 73.0, 74.0)}, "ce": {"top1": row(71.0)}, "kd": {"top1": row(72.0)}, "dkd": {"top1": row(72.5)}},
    "teacher": {"top1": 79.42, "sha256": "ab"}, "claims": [{"text": "pld > ce", "holds": True}, {"text": "pld > kd", "holds": None}],
    "verdict": {"name": "reproduced", "reason": "because"},
    "cost": {"seconds": 150.0, "cpu_seconds": 150.0, "peak_memory_bytes": 1, "hardware": "2 CPU cores (x86_64), 1 threads"},
    "code": {"commit": "0123abc", "dirty": False}, "config_hash": "77",
}  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    return copy.deepcopy(RECORD)


def shown(record: dict[str, Any]) -> dict[str, str]:
    return dict(zip(COLUMNS, cells(record), strict=True))


def test_a_row_holds_published_measured_rivals_student_and_teacher(record: dict[str, Any]) -> None:
    assert shown(record) == {
        "recipe": "pld_small",
        "published": "73.97 (Table 1)",
        "measured (95 % interval, n)": "pld 73.50 (73.00 to 74.00, 3)",
        "rivals": "dkd 72.50, kd 72.00",  # the best first; the student alone has a column of its own
        "student alone": "71.00",
        "teacher": "79.42",
        "claims": "1 of 2 show",
        "verdict": "reproduced",
        "cost": "2 min on 2 CPU cores (x86_64)",
    }


def test_a_bench_row_does_not_stand_beside_the_paper_s_number(record: dict[str, Any]) -> None:
    assert shown({**record, "scale": "bench"})["published"] == "another setting"


def test_what_is_not_there_is_a_dash(record: dict[str, Any]) -> None:
    bare = {**record, "published": None, "teacher": {}, "arms": {"pld": {"top1": row(73.5, n=1)}}}
    assert {name for name, text in shown(bare).items() if text == "-"} == {"published", "rivals", "student alone", "teacher"}
    assert shown(bare)["measured (95 % interval, n)"] == "pld 73.50 (n = 1)"


def test_another_pair_of_a_recipe_is_told_apart(record: dict[str, Any]) -> None:
    assert (
        shown({**record, "chosen": {"teacher": "resnet56", "student": "resnet20"}})["recipe"]
        == "pld_small teacher=resnet56 student=resnet20"
    )
    del record["chosen"]
    assert shown(record)["recipe"] == "pld_small"


def test_machines_get_flat_keys(record: dict[str, Any]) -> None:
    told = flat(record)
    assert told.keys() >= {"recipe", "paper", "scale", "metric", "published", "measured", "interval", "n", "verdict", "cost", "commit"}
    assert (told["paper"], told["measured"], told["interval"], told["n"]) == ("2506.12542", 73.5, [73.0, 74.0], 3)
    assert (told["verdict"], told["reason"], told["commit"]) == ("reproduced", "because", "0123abc")
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("paper", "name"), [({"title": "A paper"}, "A paper"), ({"title": "A paper", "arxiv": None}, "A paper"), (None, None)]
)
def test_a_paper_without_a_number_goes_by_its_title(record: dict[str, Any], paper: dict[str, Any] | None, name: str | None) -> None:
    assert flat({**record, "paper": paper})["paper"] == name


def test_markdown_has_one_table_per_scale(record: dict[str, Any]) -> None:
    text = to_markdown([record, {**record, "recipe": "pld_bench", "scale": "bench"}])
    paper, bench = text.split("**Bench")
    assert "| pld_small | 73.97 (Table 1) |" in paper
    assert "pld_bench" not in paper
    assert "| pld_bench | another setting |" in bench
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {len(COLUMNS) + 1}
    assert tables[1] == "|" + "---|" * len(COLUMNS)


def test_an_empty_scale_says_why_or_how(record: dict[str, Any]) -> None:
    paper, bench = to_markdown([]).split("**Bench")
    assert "Not attempted yet: these need a GPU and hours." in paper
    assert "run.ledger=true" in bench
    assert "|" not in paper + bench
    assert "Not attempted" not in to_markdown([record])


def test_records_are_read_in_the_order_of_their_names(tmp_path: Path, record: dict[str, Any]) -> None:
    assert read_ledger(tmp_path) == []
    (tmp_path / "ledger").mkdir()
    for name in ("b", "a"):
        (tmp_path / "ledger" / f"{name}.json").write_text(json.dumps({**record, "recipe": name}))
    (tmp_path / "ledger" / "notes.txt").write_text("no record")
    assert [r["recipe"] for r in read_ledger(tmp_path)] == ["a", "b"]
