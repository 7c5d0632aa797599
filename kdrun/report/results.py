"""What came out: the leaderboard, what papers print, claims, learning curves, and what a result costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kdrun.ledger.leaderboard import Row
from kdrun.ledger.published import lookup
from kdrun.ledger.statistics import summary
from kdrun.report.boards import Arm, Board, over_seeds
from kdrun.report.parts import Chart, Point, Section, Series, Table

FEW = 2  # seeds, whose t-interval is 6 times as wide as that of many
MOST_SERIES = 8  # of a chart: as many colours can be told apart
TERM_COLOURS = 3  # where the colours of terms begin: apart from those of the first arms
MOST_POINTS = 200  # of a curve
MOST_TERMS = 6  # charts of single arms


def headline(board: Board) -> list[str]:
    """The result in a few sentences."""
    rows = [row for row in board.rows if math.isfinite(row.mean)]
    if not rows:
        return ["No run of it is finished: there is no number yet."]
    first, told = rows[0], board.kind
    better = "the direction of this metric is not known: the highest is first" if told is None else ""
    better = better or ("higher is better" if told is not None and told.higher_is_better else "lower is better")
    words = [f"{board.arm(first.arm).label} is first: {_measured(board, first)} ({better})."]
    tied = [row.arm for row in rows[1:] if row.tied_with(first)]
    untold = [row.arm for row in rows[1:] if row.p is None]
    real = [name for name in tied if name not in untold]
    if real:
        words.append(f"These cannot be told apart from it at 5 %: {', '.join(real)}.")
    if any(row.n == FEW for row in rows):
        words.append("Intervals of two seeds are very wide; `kdrun plan --detect GAP --sd SPREAD` says how many a difference needs.")
    if untold:
        words.append(f"A test needs two seeds of both: nothing is said of {', '.join(untold)}.")
    alone = board.alone
    if alone is not None and alone.name != first.arm:
        row = next((row for row in rows if row.arm == alone.name), None)
        if row is not None:
            words.append(f"The undistilled student is at {board.shown(row.mean)}; {first.arm} minus it: {_gap(board, row, flip=True)}.")
    teachers = _teachers(board)
    if teachers:
        words.append(f"The teacher itself: {', '.join(board.shown(v) for v in teachers)}, measured here.")
    return [*words, *_caveats(board)]


def _caveats(board: Board) -> list[str]:
    open_runs = [run for arm in board.arms for run in arm.runs.values() if run.summary is None]
    tainted = [run for arm in board.arms for run in arm.runs.values() if (run.summary or {}).get("tainted")]
    words = []
    if open_runs:
        words.append(f"{len(open_runs)} of {sum(len(arm.runs) for arm in board.arms)} runs are not finished and count in the curves alone.")
    if tainted:
        words.append(f"{len(tainted)} runs are tainted (limited or cut short for debugging): their numbers are no results.")
    if board.left_out:
        words.append(f"{len(board.left_out)} runs repeat an arm and seed that a later run has; the later one counts.")
    return words


def leaderboard_section(board: Board) -> Section:
    about = (
        "Mean over seeds with its 95 % t-interval. Arms that share a letter cannot be told apart at 5 %: every pair is tested, paired by "
        "seed where two share at least two seeds (else Welch), and the p-values are corrected for the number of pairs (Holm)."
    )
    columns = ("arm", board.with_unit, "95 % interval", "seeds", "minus the first", "95 % interval", "p, corrected", "letters")
    strong = tuple(i for i, row in enumerate(board.rows) if math.isfinite(row.mean) and (i == 0 or row.tied_with(board.rows[0])))
    strong = strong if len(strong) < len(board.rows) else ()  # nobody stands out
    table = Table(columns, [_cells(board, row) for row in board.rows], strong=strong)
    words = [] if board.rows else ["No run of it is finished."]
    words += [f"Without a number yet: {', '.join(arm.label for arm in board.arms if not arm.done)}."] * any(not a.done for a in board.arms)
    if any(row.paired is False for row in board.rows):
        words.append("Differences marked with * are not paired: these arms share fewer than two seeds with the first.")
    return Section("leaderboard", "Leaderboard", about, words, [table], [], [asdict(row) for row in board.rows])


def _cells(board: Board, row: Row) -> list[str]:
    gap = "" if row.gap is None else board.shown(row.gap, "+") + ("*" if row.paired is False else "")
    p = "" if row.gap is None else "needs 2 seeds" if row.p is None else p_text(row.p)
    between = _interval(board, row.gap_low, row.gap_high, "+")
    return [board.arm(row.arm).label, board.shown(row.mean), _interval(board, row.low, row.high), str(row.n), gap, between, p, row.mark]


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(board: Board, low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None else f"{board.shown(low, sign)} to {board.shown(high, sign)}"


def _measured(board: Board, row: Row) -> str:
    interval = f"95 % interval {_interval(board, row.low, row.high)}, " if row.low is not None else ""
    return f"{board.metric} {board.shown(row.mean)} ({interval}{row.n} seed{'' if row.n == 1 else 's'})"


def _gap(board: Board, row: Row, flip: bool) -> str:
    factor = -1 if flip else 1
    low, high = (row.gap_low, row.gap_high) if not flip or row.gap_low is None or row.gap_high is None else (-row.gap_high, -row.gap_low)
    interval = (
        f" (95 % interval {_interval(board, low, high, '+')}, corrected p {p_text(row.p)})" if low is not None and row.p is not None else ""
    )
    return f"{board.shown(factor * (row.gap or 0.0), '+')}{interval}"


def _teachers(board: Board) -> list[float]:
    """What teachers were measured at, each number once."""
    found = (told.get("teacher", {}).get(board.metric) for arm in board.arms for told in arm.done.values())
    return list(dict.fromkeys(value for value in found if isinstance(value, (int, float))))


# -- beside papers ------------------------------------------------------------------------------------------------


def published_section(board: Board, comparisons: Sequence[Mapping[str, Any]]) -> Section:
    about = "Numbers that papers print, beside those measured here. Only at scale 'paper' is it the same experiment."
    rows, words, data = [], [], []
    for arm in board.arms:
        tree, facts = arm.first.tree, arm.first.composed.facts()
        names = (
            [arm.first.arm]
            if arm.first.arm and not arm.first.of_sweep
            else [tree.get("method"), arm.first.composed.choices.get("objective")]
        )
        cell = next((c for name in names if name and (c := lookup(tree["published"], facts, name, board.metric))), None)
        values = list(arm.values(board.metric).values())
        if cell is None:
            continue
        same = tree["scale"] == "paper"
        mean = summary(values).mean if values else math.nan
        gap = board.shown(mean - cell.value, "+") if same else "another setting"
        spread = "" if cell.spread is None else f" +- {cell.spread}"
        runs = f"{cell.n} runs" if cell.n else "not said"
        measured = board.shown(mean) if values else "no number yet"
        rows.append([arm.label, f"{board.shown(cell.value)}{spread}", runs, measured, gap, f"{cell.table}, {cell.protocol}"])
        data.append({"arm": arm.name, "same_setting": same, "measured": mean, **asdict(cell)})
    columns = ("arm", "published", "over", "measured here", "here minus published", "where")
    if not rows:
        words.append("No published number belongs to these arms and this metric.")
    for told in comparisons:
        of = f" ({Path(told['folder']).name})" if len(comparisons) > 1 and told.get("folder") else ""
        words += [f"Claim {claim['text']}{of}: {_answer(claim['holds'])}; {claim['sentence']}." for claim in told.get("claims", [])]
        words += (
            [f"Verdict of {told['recipe']}{of}: {told['verdict']['name']}; {told['verdict']['reason']}."] if told.get("verdict") else []
        )
        words += [f"Note of {told['recipe']}: {note}" for note in told.get("notes", [])]
    paper = {p["title"]: p for arm in board.arms if (p := arm.first.tree.get("paper"))}
    words += [_citation(p) for p in paper.values()]
    return Section("published", "Beside the papers", about, list(dict.fromkeys(words)), [Table(columns, rows)] if rows else [], [], data)


def _answer(holds: bool | None) -> str:
    return {True: "shows", False: "does not show", None: "open"}[holds]


def _citation(paper: Mapping[str, Any]) -> str:
    where = " ".join(str(part) for part in (paper.get("venue"), paper.get("year")) if part)
    arxiv = f", https://arxiv.org/abs/{paper['arxiv']}" if paper.get("arxiv") else ""
    return f"Paper: {paper['title']}{f' ({where})' if where else ''}{arxiv}"


# -- curves -------------------------------------------------------------------------------------------------------


def curves_section(board: Board) -> Section:
    about = "Mean over seeds by epoch; the band is the 95 % t-interval where two or more seeds are there."
    charts, words = [], []
    arms = board.arms[:MOST_SERIES]
    if len(board.arms) > len(arms):
        words.append(f"Charts show the first {len(arms)} of {len(board.arms)} arms; the leaderboard has all.")
    for split in ("test", "validation"):
        series = [s for arm in arms if (s := _curve(arm, lambda r, s=split: r.get(board.metric) if r.get("split") == s else None)).points]
        if series:
            charts.append(Chart("lines", f"{board.metric} on {split}", "epoch", board.with_unit, series))
            end = _second_half(series)
            charts += [Chart("lines", f"{board.metric} on {split}, second half of training", "epoch", board.with_unit, end)] if end else []
    if not charts:
        words.append(f"No evaluation of {board.metric} by epoch was recorded.")
    losses = [s for arm in arms if (s := _curve(arm, lambda r: r.get("loss"))).points]
    if losses:
        charts.append(Chart("lines", "training loss (weighted sum; arms with other terms are not comparable)", "epoch", "loss", losses))
    charts += [chart for arm in arms[:MOST_TERMS] if (chart := _terms(arm)) is not None]
    return Section("curves", "Learning curves", about, words, [], charts)


def _second_half(series: Sequence[Series]) -> list[Series]:
    """The ends of curves whose beginnings leave too little of the axis to see a difference by; [] where they do not."""
    middle = max(p.x for s in series for p in s.points) / 2
    late = [replace(s, points=ends) for s in series if len(ends := [p for p in s.points if p.x >= middle]) > 1]
    spans = [max(ys) - min(ys) for kept in (series, late) if (ys := [p.y for s in kept for p in s.points])]
    return late if len(spans) == 2 and spans[1] < spans[0] / 3 else []


def _terms(arm: Arm) -> Chart | None:
    names = list(dict.fromkeys(name for run in arm.runs.values() for line in run.metrics for name in line.get("terms", {})))
    if len(names) < 2:
        return None
    made = [(name, _curve(arm, lambda r, n=name: r.get("terms", {}).get(n))) for name in names[:MOST_SERIES]]
    return Chart(
        "lines",
        f"loss terms of {arm.name}, not weighted",
        "epoch",
        "per item",
        [Series(n, s.points, i + TERM_COLOURS) for i, (n, s) in enumerate(made)],
    )


def _curve(arm: Arm, value: Any) -> Series:
    return Series(arm.label, by_epoch([run.metrics for run in arm.runs.values()], value), arm.colour)


def by_epoch(runs: Iterable[Sequence[Mapping[str, Any]]], value: Any) -> list[Point]:
    """Mean and interval over runs at each epoch at which any was recorded; what is not finite has no place on a chart."""
    found: dict[float, list[float]] = {}
    for lines in runs:
        for line in lines:
            got = value(line)
            if isinstance(got, (int, float)) and math.isfinite(got):
                found.setdefault(float(line.get("epoch") or 0), []).append(float(got))
    xs = sorted(found)
    if len(xs) > MOST_POINTS:
        xs = [xs[round(i * (len(xs) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    return [over_seeds(x, found[x]) for x in xs]


# -- cost ---------------------------------------------------------------------------------------------------------


def scatter(board: Board) -> Chart | None:
    """Result against what training it took, an arm a point."""
    series = []
    for row in board.rows:
        arm = board.arm(row.arm)
        seconds = [float(told["cost"]["seconds"]) for told in arm.done.values() if told.get("cost", {}).get("seconds") is not None]
        if seconds and math.isfinite(row.mean):
            point = Point(sum(seconds) / len(seconds), row.mean, row.low, row.high, 1.0, arm.label)
            series.append(Series(arm.label, [point], arm.colour))
    if not series:
        return None
    xs = [s.points[0].x for s in series]
    return Chart(
        "scatter",
        f"{board.metric} against training time",
        "seconds of a run",
        board.with_unit,
        series,
        min(xs) > 0 and max(xs) / min(xs) > 20,
    )
