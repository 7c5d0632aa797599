"""From runs to a report: a board for each way of measuring, with its sections in the order in which people ask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from kdrun.report.boards import Board, to_boards
from kdrun.report.collect import Found
from kdrun.report.facts import cost_section, differences_section, provenance_section
from kdrun.report.insight import agreement_section, calibration_section, classes_section, gradients_section
from kdrun.report.parts import BoardReport, Report, Table
from kdrun.report.results import curves_section, headline, leaderboard_section, published_section


def build_report(found: Found, asked: Sequence[Path]) -> Report:
    """Everything that can be said of the runs that were found."""
    boards = to_boards(found.runs)
    recipes = ", ".join(dict.fromkeys(str(run.composed.recipe or "runs without a recipe") for run in found.runs))
    what = f"{recipes} ({', '.join(folder.resolve().name for folder in asked)})" if asked else "all runs"
    label = {run.folder: f"{arm.label}" for board in boards for arm in board.arms for run in arm.runs.values()}
    rows = [
        [label.get(run.folder, "a repeated run"), str(run.seed), str(run.composed.recipe or "-"), run.state, str(run.folder)]
        for run in found.runs
    ]
    remarks = []
    if len(boards) > 1:
        remarks.append(f"These runs were measured in {len(boards)} ways (data set, metric, protocol): a board for each.")
    made = time.strftime("%Y-%m-%d %H:%M")
    table = Table(("arm", "seed", "recipe", "state", "folder"), rows, numbers=False)
    return Report(what, made, [_report(board, found) for board in boards], table, remarks)


def _report(board: Board, found: Found) -> BoardReport:
    recipes = {run.composed.recipe for arm in board.arms for run in arm.runs.values()}
    told = [c for c in found.comparisons if c.get("recipe") in recipes and c.get("metric") == board.metric]
    sections = [
        leaderboard_section(board),
        curves_section(board),
        published_section(board, told),
        classes_section(board),
        calibration_section(board),
        agreement_section(board),
        gradients_section(board),
        cost_section(board),
        differences_section(board),
        provenance_section(board),
    ]
    reported = {"last": "of the last epoch", "best_val": "of the epoch that validation chose", "best_test": "of the epoch that TEST chose"}
    title = f"{board.data}: {board.with_unit}, {reported.get(board.protocol, board.protocol)}"
    return BoardReport(title, headline(board), sections)
