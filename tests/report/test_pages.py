"""The page: whole, by itself, and with every number that it should hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdrun.engine.records import read_json
from kdrun.ledger.leaderboard import leaderboard
from kdrun.ledger.statistics import paired
from kdrun.ledger.table import number
from kdrun.report.build import build_report
from kdrun.report.collect import find
from kdrun.report.page import to_html
from kdrun.report.parts import Report
from kdrun.report.text import to_latex, to_markdown
from tests.conftest import Outcome

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; keeps the text and every reference."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [(tag, value or "") for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def made(*folders: Path) -> Report:
    return build_report(find(folders), folders)


def by_arm(folder: Path, metric: str = "top1") -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for file in folder.glob("arms/*/seed-*/summary.json"):
        found.setdefault(file.parts[-3], {})[int(file.parts[-2].removeprefix("seed-"))] = read_json(file)["test"][metric]
    return found


def assert_alone(text: str) -> Page:
    """No script, nothing from the network: links are within the page, or to papers and code."""
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all(tag == "a" and (ref[0] == "#" or re.match(r"https://(arxiv\.org|github\.com)/", ref)) for tag, ref in page.references)
    assert {ref[1:] for _, ref in page.references if ref[0] == "#"} <= set(page.ids)
    assert "@import" not in text
    assert "url(" not in text
    return page


def test_the_page_is_whole_and_needs_nothing_else(compared: Path) -> None:
    page = assert_alone(to_html(made(compared)))
    assert page.tags.count("svg") > 5
    assert "prefers-color-scheme: dark" in page.text


def test_the_page_holds_the_leaderboards_numbers(compared: Path) -> None:
    text = Page(to_html(made(compared))).text
    for row in leaderboard(by_arm(compared), True):
        cells = [number(v, "top1") for v in (row.mean, row.low, row.high)]
        cells += [number(row.gap, "top1", "+")] if row.gap is not None else []
        assert all(cell in text for cell in cells), row.arm
    for arm in ("kd", "ce"):
        assert all(f"{read_json(f)['config_hash']}" in text for f in compared.glob(f"arms/{arm}/*/summary.json"))


def test_gains_by_class_are_paired_by_seed(compared: Path) -> None:
    told = {arm: [read_json(f) for f in sorted(compared.glob(f"arms/{arm}/*/evaluation.json"))] for arm in ("kd", "ce")}
    name = told["kd"][0]["classes"][2]
    values = {arm: {seed: found["top1"][2] for seed, found in enumerate(each)} for arm, each in told.items()}
    gap = paired(values["kd"], values["ce"]).mean
    section = next(s for s in made(compared).boards[0].sections if s.key == "classes")
    row = next(r for r in section.tables[0].rows if r[0] == name)
    assert f"({gap:+.1f})" in " ".join(row)
    chart = section.charts[0]
    assert next(p.y for p in chart.series[0].points if p.label == name) == pytest.approx(gap)


def test_curves_are_means_over_seeds(compared: Path) -> None:
    chart = next(c for s in made(compared).boards[0].sections if s.key == "curves" for c in s.charts if c.title == "top1 on test")
    last = {s.name: s.points[-1] for s in chart.series}
    values = list(by_arm(compared)["kd"].values())
    assert last["kd"].y == pytest.approx(sum(values) / 3)
    assert last["kd"].low < last["kd"].y < last["kd"].high  # type: ignore[operator]
    assert last.keys() == {"kd", "ce (student alone)"}


def test_calibration_pools_the_seeds(compared: Path) -> None:
    section = next(s for s in made(compared).boards[0].sections if s.key == "calibration")
    for series, arm in ((s, s.name.split()[0]) for s in section.charts[0].series if not s.name.startswith("teacher")):
        files = [read_json(f)["bins"] for f in compared.glob(f"arms/{arm}/*/evaluation.json")]
        pooled = [sum(bins[i]["count"] for bins in files) for i in range(15)]
        assert [p.weight for p in series.points] == [n for n in pooled if n >= 10]


def test_what_was_not_recorded_is_said(compared: Path) -> None:
    words = " ".join(w for s in made(compared / "arms" / "ce" / "seed-1").boards[0].sections for w in s.words)
    assert "run.diagnose=true" in words
    assert "no teacher" in words
    assert "There is one arm" in words


def test_settings_in_which_arms_differ(compared: Path) -> None:
    section = next(s for s in made(compared).boards[0].sections if s.key == "differences")
    rows = {row[0]: list(row[1:]) for row in section.tables[0].rows}
    assert sorted(rows["objective"]) == ["ce", "kd"]
    assert "4.0" in rows["objective.temperature"]
    assert "seed" not in rows


def test_markdown_and_latex_hold_the_same_rows(compared: Path) -> None:
    report = made(compared)
    table = report.boards[0].sections[0].tables[0]
    markdown, latex = to_markdown(report), to_latex(report)
    for row in table.rows:
        assert all(cell in markdown for cell in row)
        assert row[1] in latex
    assert latex.count(r"\\") == len(table.rows) + 1
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(body))


def test_a_folder_without_a_run_is_refused(kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    for folder, word in ((tmp_path, "holds no run"), (tmp_path / "gone", "is not there")):
        told = kdrun("report", str(folder))
        assert told.code == 2
        assert word in told.err


def test_the_verb_writes_what_the_files_name_says(kdrun: Callable[..., Outcome], compared: Path, tmp_path: Path) -> None:
    for name, start in (("a.html", "<!DOCTYPE html>"), ("a.md", "# kdrun report"), ("a.tex", "% ")):
        assert kdrun("report", str(compared), "--out", str(tmp_path / name)).code == 0
        assert (tmp_path / name).read_text().startswith(start)
    assert kdrun("report", str(compared), "--out", str(tmp_path / "a.pdf")).code == 2


def test_piped_output_is_plain_and_json_is_one_object(kdrun: Callable[..., Outcome], compared: Path) -> None:
    told = kdrun("report", str(compared))
    assert told.code == 0
    assert "\x1b" not in told.out
    assert "Leaderboard" in told.out
    document = kdrun("report", str(compared), "--json").json
    rows = document["boards"][0]["sections"]["leaderboard"]["data"]
    assert {row["arm"]: row["mean"] for row in rows} == pytest.approx({a: sum(v.values()) / 3 for a, v in by_arm(compared).items()})
    assert len(document["runs"]) == 6
    json.dumps(document, allow_nan=False)
