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
    "recipe": "pld_small", "family": "image", "chosen": {}, "paper": {"title": "A paper", "arxiv": "2506.12542"}, "scale": "paper",
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
        "family": "image",
        "published": "73.97 (Table 1, last)",
        "measured (95 % interval, n)": "pld 73.50 (73.00 to 74.00, 3)",
        "rivals": "dkd 72.50, kd 72.00",  # the best first; the student alone has a column of its own
        "student alone": "71.00",
        "teacher": "79.42",
        "claims": "1 of 2 show",
        "verdict": "reproduced",
        "cost": "2 min on 2 CPU cores (x86_64)",
        "commit": "0123abc",
    }


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("Table 1", "another setting: Table 1"),
        ("CIFAR-100, ResNet-32x4 to ResNet-8x4; two READMEs", "another setting: CIFAR-100, ResNet-32x4 to ResNet-8x4"),
        ("mean gain over student and teacher, " * 2, "another setting: mean gain over student and teacher, mean gain over ..."),
    ],
)  # fmt: skip
def test_a_bench_row_names_the_published_table_and_not_its_number(record: dict[str, Any], table: str, said: str) -> None:
    bench = {**record, "scale": "bench", "published": {**record["published"], "table": table}}
    assert shown(bench)["published"] == said
    assert shown({**bench, "published": None})["published"] == "-"


NLL = {"pld": {"nll": row(0.41234, 0.4, 0.4251)}, "ce": {"nll": row(0.9)}, "kd": {"nll": row(1.25)}, "dkd": {"nll": row(0.30001)}}
BYTES = {"pld": {"bytes_up": row(1234567.0)}, "kd": {"bytes_up": row(150.0)}, "dkd": {"bytes_up": row(2e9)}}


@pytest.mark.parametrize(
    ("metric", "arms", "measured", "rivals", "alone"),
    [
        ("nll", NLL, "pld nll 0.4123 nats (0.4 to 0.4251, 3)", "dkd 0.3, kd 1.25", "0.9"),  # the lower the better
        ("bytes_up", BYTES, "pld bytes_up 1.235e+06 bytes (n = 3)", "kd 150, dkd 2e+09", "-"),
        ("miou", {"pld": {"miou": row(70.123)}, "kd": {"miou": row(71.0)}}, "pld miou 70.12 (n = 3)", "kd 71.00", "-"),
        ("ours", {"pld": {"ours": row(3.0)}, "b": {"ours": row(1.0)}, "a": {"ours": row(2.0)}}, "pld ours 3 (n = 3)", "b 1, a 2", "-"),
    ],
)
def test_a_metric_has_its_own_unit_digits_and_direction(
    record: dict[str, Any], metric: str, arms: dict[str, Any], measured: str, rivals: str, alone: str
) -> None:
    told = shown({**record, "metric": metric, "arms": arms, "scale": "bench"})
    assert (told["measured (95 % interval, n)"], told["rivals"], told["student alone"]) == (measured, rivals, alone)


def test_what_diverged_comes_last_and_is_not_hidden(record: dict[str, Any]) -> None:
    record["arms"]["dkd"]["top1"]["mean"] = None  # as a record keeps it
    assert shown(record)["rivals"] == "kd 72.00, dkd NaN"
    record["arms"]["pld"]["top1"] |= {"mean": None, "low": None, "high": None}
    assert shown(record)["measured (95 % interval, n)"] == "pld NaN (n = 3)"


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


def test_a_commit_with_changes_around_it_is_marked(record: dict[str, Any]) -> None:
    record["code"] = {"commit": "0123abcdef", "dirty": True}
    assert shown(record)["commit"] == "0123abc+"
    assert flat(record)["dirty"] is True
    record["code"] = {"commit": None, "dirty": None}
    assert shown(record)["commit"] == "-"


def test_a_published_number_of_another_metric_names_it(record: dict[str, Any]) -> None:
    record["published"]["metric"] = "alpaca_eval"
    assert shown(record)["published"] == "alpaca_eval 73.97 (Table 1, last)"


@pytest.mark.parametrize(("name", "said"), [("not attempted", "not attempted"), ("impossible here", "impossible here: no GPU")])
def test_a_recipe_that_was_never_run_is_a_row_of_dashes_and_a_verdict(record: dict[str, Any], name: str, said: str) -> None:
    never = {**record, "arms": {}, "claims": [], "teacher": {}, "cost": None, "verdict": {"name": name, "reason": "no GPU"}}
    told = shown(never)
    assert (told["published"], told["verdict"]) == ("73.97 (Table 1, last)", said)
    assert {told[column] for column in COLUMNS[3:8]} == {"-"}
    assert (flat(never)["n"], flat(never)["measured"], flat(never)["verdict"]) == (0, None, name)


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
    assert "| pld_small | image | 73.97 (Table 1, last) |" in paper
    assert "pld_bench" not in paper
    assert "| pld_bench | image | another setting: Table 1 |" in bench
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
