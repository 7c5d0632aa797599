"""Finding the number that a paper prints for what is run."""

from __future__ import annotations

from typing import Any

import pytest

from kdrun.ledger.published import PublishedValue, lookup

TABLES: list[dict[str, Any]] = [
    {
        "table": "Table 1", "metric": "top1", "protocol": "best_test", "n": 5,
        "rows": [
            {"if": ["teacher=a", "student=b"], "teacher": 75.0, "ce": 70.0, "kd": [72.5, 0.25], "pld": 73},
            {"if": ["teacher=a", "student=c"], "teacher": 75.0, "ce": 60.0, "kd": [62.5]},
        ],
    },
    {"rows": [{"if": ["student.name=big"], "kd": 80.0}, {"kd": 50.0, "crd": 51.0}]},
]  # fmt: skip


def value(name: str, **facts: str) -> float | None:
    found = lookup(TABLES, facts, name)
    return None if found is None else found.value


def test_a_cell_comes_with_its_table_protocol_and_spread() -> None:
    found = lookup(TABLES, {"teacher": "a", "student": "b"}, "kd")
    assert found == PublishedValue(72.5, 0.25, 5, "top1", "Table 1", "best_test")


def test_a_cell_may_be_a_bare_number() -> None:
    assert lookup(TABLES, {"teacher": "a", "student": "b"}, "pld") == PublishedValue(73.0, None, 5, "top1", "Table 1", "best_test")
    assert lookup(TABLES, {"teacher": "a", "student": "c"}, "kd") == PublishedValue(62.5, None, 5, "top1", "Table 1", "best_test")


@pytest.mark.parametrize("teacher", ["a", "none", "anything"])
def test_a_student_from_labels_alone_is_found_whatever_the_teacher(teacher: str) -> None:
    assert value("ce", teacher=teacher, student="b") == 70.0
    assert value("ce", teacher=teacher, student="c") == 60.0
    assert value("ce", teacher=teacher, student="d") is None


def test_a_teacher_is_found_whatever_the_student() -> None:
    assert value("teacher", teacher="a", student="z") == 75.0
    assert value("teacher", teacher="b", student="b") is None


def test_every_condition_must_hold() -> None:
    assert value("pld", teacher="a", student="c") is None
    assert value("pld", teacher="x", student="b") is None
    assert value("pld", student="b") is None


def test_the_first_row_that_holds_and_has_the_method_wins() -> None:
    assert value("kd", teacher="a", student="b") == 72.5
    assert value("kd", teacher="x", student="y") == 50.0  # a row without conditions holds always
    assert value("crd", teacher="a", student="b") == 51.0  # the first rows do not have it


def test_a_condition_may_speak_of_a_leaf() -> None:
    assert lookup(TABLES, {"student.name": "big"}, "kd") == PublishedValue(80.0, None, None, "top1", "", "last")


def test_a_table_of_another_metric_is_passed_over() -> None:
    tables = [{"table": "Table 3", "metric": "nll", "rows": [{"kd": 1.25}]}, *TABLES]
    facts = {"teacher": "a", "student": "b"}
    found = {metric: lookup(tables, facts, "kd", metric) for metric in ("top1", "nll", "ece")}
    assert [cell and cell.value for cell in found.values()] == [72.5, 1.25, None]


def test_without_tables_there_is_no_number() -> None:
    assert lookup([], {"teacher": "a"}, "kd") is None
    assert lookup([{"table": "Table 2"}], {}, "kd") is None
