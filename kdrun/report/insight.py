"""Where a student is better, how far its confidence can be trusted, how far it follows its teacher, and what moves it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kdrun.engine.records import EVALUATION
from kdrun.ledger.statistics import paired, summary
from kdrun.report.boards import Arm, Board
from kdrun.report.parts import Chart, Point, Section, Series, Table
from kdrun.report.results import MOST_SERIES, TERM_COLOURS, by_epoch

RARE = 0.01  # `kdrun.engine.diagnosis` warns from the same share on
FEWEST = 10  # samples of a bin of confidence that is drawn
MOST_CLASSES = 24  # of a chart
CLASS_METRIC = "iou_"  # of segmentation: its metrics are by class already


def classes_section(board: Board) -> Section:
    """Accuracy (or IoU) of each class minus that of the undistilled student."""
    by_arm = {arm.name: _by_class(arm) for arm in board.arms}
    by_arm = {name: found for name, found in by_arm.items() if found}
    about = "Accuracy on the test samples of each class; gains are paired by seed against the same student without a teacher."
    if not by_arm:
        told = f"Not recorded: no run has written accuracy by class ({EVALUATION}, of classifiers; runs of an older kdrun lack it)."
        return Section("classes", "Class by class", about, [told])
    alone = board.alone
    base = by_arm.get(alone.name) if alone is not None else None
    shown = [arm for arm in board.arms if arm.name in by_arm][:MOST_SERIES]
    names = list(dict.fromkeys(name for found in by_arm.values() for name in found))
    tables = [_class_table(names, shown, by_arm, base)]
    words, charts, data = [], [], {name: {c: _mean(v) for c, v in found.items()} for name, found in by_arm.items()}
    if base is None:
        words.append("No undistilled student (an arm objective=ce) is among these runs, so there is no gain to speak of.")
    else:
        assert alone is not None
        rivals = [arm for arm in shown if arm is not alone]
        charts = [_gains(board, arm, by_arm[arm.name], base) for arm in rivals[:4]]
        words += [_gain_words(arm, by_arm[arm.name], base) for arm in rivals]
    return Section("classes", "Class by class", about, words, tables, charts, data)


def _by_class(arm: Arm) -> dict[str, dict[int, float]]:
    """Percent by class and seed."""
    found: dict[str, dict[int, float]] = {}
    for seed, run in arm.runs.items():
        told = run.evaluation
        rows = dict(zip(told.get("classes", []), told.get("top1", []), strict=False))
        if not rows and run.summary:
            rows = {k.removeprefix(CLASS_METRIC): v for k, v in (run.summary.get("test") or {}).items() if k.startswith(CLASS_METRIC)}
        for name, value in rows.items():
            if value is not None:
                found.setdefault(str(name), {})[seed] = float(value)
    return found


def _class_table(names: Sequence[str], arms: Sequence[Arm], by_arm: Mapping[str, Any], base: Any) -> Table:
    rows = []
    for name in names:
        cells = [name]
        for arm in arms:
            own = by_arm[arm.name].get(name)
            cell = "-" if own is None else f"{_mean(own):.1f}"
            gain = paired(own, base[name]).mean if own is not None and base is not None and name in base and not arm.alone else None
            cells.append(cell if gain is None else f"{cell} ({gain:+.1f})")
        rows.append(cells)
    title = "percent right of each class" + (", in brackets the gain in points over the student alone" if base is not None else "")
    return Table(("class", *(arm.label for arm in arms)), rows, title)


def _gains(board: Board, arm: Arm, own: Mapping[str, Any], base: Mapping[str, Any]) -> Chart:
    gaps = {name: paired(values, base[name]) for name, values in own.items() if name in base}
    ordered = sorted((name for name in gaps if gaps[name].n), key=lambda name: -gaps[name].mean)
    if len(ordered) > MOST_CLASSES:
        ordered = [*ordered[: MOST_CLASSES // 2], *ordered[-(MOST_CLASSES // 2) :]]
    points = [Point(i, gaps[n].mean, gaps[n].low, gaps[n].high, 1.0, n) for i, n in enumerate(ordered)]
    return Chart("bars", f"{arm.name} minus the student alone, by class", "points", "class", [Series(arm.label, points, arm.colour)])


def _gain_words(arm: Arm, own: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    gains = {name: gap for name, values in own.items() if name in base and (gap := paired(values, base[name])).n}
    better = sum(gap.mean > 0 for gap in gains.values())
    sure = [name for name, gap in gains.items() if gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)]
    said = f"; for {len(sure)} of them the 95 % interval, not corrected for their number, leaves out 0" if sure else ""
    best, worst = max(gains, key=lambda n: gains[n].mean), min(gains, key=lambda n: gains[n].mean)
    ends = f"most on class {best} ({gains[best].mean:+.1f}), least on {worst} ({gains[worst].mean:+.1f})"
    return f"{arm.name} is above the student alone on {better} of {len(gains)} classes: {ends}{said}."


# -- calibration --------------------------------------------------------------------------------------------------


def calibration_section(board: Board) -> Section:
    about = (
        "Of the test samples that a student holds for right with, say, 80 % confidence, how many are right? On the dashed line "
        "confidence is worth its word; below it the student is too sure. The seeds of an arm are pooled; larger dots hold more samples, "
        f"and bins of fewer than {FEWEST} are left out."
    )
    series = [s for arm in board.arms[:MOST_SERIES] if (s := _reliability(arm)).points]
    taught = _taught(board)
    if taught is not None and series:
        pooled = _pooled([run.evaluation.get("teacher", {}) for run in taught.runs.values()])
        series.append(Series(f"teacher of {taught.name}", pooled, len(board.arms)))
    charts = [Chart("reliability", "reliability on test", "confidence (%)", "right (%)", series)] if series else []
    rows = []
    for arm in board.arms:
        cells = [_mean_of(arm, metric) for metric in ("ece", "nll")]
        if any(cells):
            rows.append([arm.label, *(cell or "not measured" for cell in cells)])
    words = [] if series else [f"Not recorded: no run has written how right it is at each confidence ({EVALUATION}, of classifiers)."]
    tables = [Table(("arm", "ECE (%)", "NLL (nats)"), rows, "lower is better in both")] if rows else []
    return Section("calibration", "Calibration", about, words, tables, charts)


def _taught(board: Board) -> Arm | None:
    """The first arm whose teacher was laid beside it."""
    return next((arm for arm in board.arms if any("teacher" in run.evaluation for run in arm.runs.values())), None)


def _reliability(arm: Arm) -> Series:
    return Series(arm.label, _pooled([run.evaluation for run in arm.runs.values()]), arm.colour)


def _pooled(evaluations: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The bins of several runs as one set of samples."""
    pooled: dict[float, list[float]] = {}
    for told in evaluations:
        for row in told.get("bins", []):
            if row["count"]:
                total = pooled.setdefault(row["low"], [0.0, 0.0, 0.0])
                for i, value in enumerate((1.0, row["confidence"], row["accuracy"])):
                    total[i] += row["count"] * value
    return [Point(c / n, hits / n, weight=n, label=f"{n:.0f} samples") for _, (n, c, hits) in sorted(pooled.items()) if n >= FEWEST]


# -- the teacher --------------------------------------------------------------------------------------------------


def agreement_section(board: Board) -> Section:
    about = "How often student and teacher choose the same class. On training batches it is recorded where run.diagnose=true asks for it."
    rows, charts, words = [], [], []
    for arm in board.arms:
        test, distance = _mean_of(arm, "agreement"), _mean_of(arm, "kl_teacher")
        train = [run.diagnostics[-1]["agreement"] for run in arm.runs.values() if run.diagnostics and "agreement" in run.diagnostics[-1]]
        if test or train:
            logged = f"{statistics.fmean(train):.1f}" if train else "not logged"
            rows.append([arm.label, test or "not measured", logged, distance or "not measured"])
    arms = board.arms[:MOST_SERIES]
    on_test = [
        Series(arm.label, points, arm.colour)
        for arm in arms
        if (points := by_epoch([r.metrics for r in arm.runs.values()], lambda x: x.get("agreement") if x.get("split") == "test" else None))
    ]
    on_train = [
        Series(arm.label, points, arm.colour)
        for arm in arms
        if (points := by_epoch([r.diagnostics for r in arm.runs.values()], lambda x: x.get("agreement")))
    ]
    for title, series in (("agreement on test", on_test), ("agreement on training batches", on_train)):
        charts += [Chart("lines", title, "epoch", "%", series)] if series else []
    if not rows:
        words.append(
            "Not recorded: these students have no teacher that could be laid beside them, or what they say is no choice of a class."
        )
    columns = ("arm", "agreement on test (%)", "on the last training batch logged (%)", "KL(teacher || student) on test (nats)")
    return Section("agreement", "Following the teacher", about, words, [Table(columns, rows)] if rows else [], charts)


# -- gradients ----------------------------------------------------------------------------------------------------


def gradients_section(board: Board) -> Section:
    about = (
        "Which term of the loss moves the student? The norm of each weighted term's gradient at the student's logits, as a share of the "
        "sum of the norms. A term under 1 % hardly counts; terms whose cosine is negative pull apart."
    )
    rows: list[list[str]] = []
    charts: list[Chart] = []
    words: list[str] = []
    for arm in board.arms:
        lines = [line for run in arm.runs.values() for line in run.diagnostics if line.get("terms")]
        names = list(dict.fromkeys(name for line in lines for name in line["terms"]))
        series = []
        for i, name in enumerate(names):
            points = by_epoch([r.diagnostics for r in arm.runs.values()], lambda r, n=name: _share(r, n))
            if not points:
                rows.append([arm.label, name, "acts elsewhere", "acts elsewhere", "-"])
                continue
            series.append(Series(name, points, i + TERM_COLOURS))
            rows.append([arm.label, name, f"{points[0].y:.1f}", f"{points[-1].y:.1f}", f"{statistics.median(p.y for p in points):.1f}"])
        charts += [Chart("lines", f"gradient share of the terms of {arm.name}", "epoch", "%", series)] if len(series) > 1 else []
        words += [f"{arm.name}: {_cosines(lines)}"] if lines and any(line.get("cosines") for line in lines) else []
        words += [f"{arm.name}: {text}" for text in _unequal(lines, names)]
        words += dict.fromkeys(f"{arm.name}: {line['reason']}" for r in arm.runs.values() for line in r.diagnostics if line.get("reason"))
    if not rows and not words:
        words.append("Not recorded: run.diagnose=true writes it, on logging steps (a run with it is bit-equal to one without).")
    columns = ("arm", "term", "first (%)", "last (%)", "median (%)")
    return Section("gradients", "What moves the student", about, words[:40], [Table(columns, rows)] if rows else [], charts)


def _unequal(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Terms that hardly count, or count alone, and in how many of the logged steps."""
    found = []
    for name in names:
        shares = [line["terms"][name]["share"] for line in lines if line["terms"].get(name, {}).get("share") is not None]
        weak, alone = sum(s < RARE for s in shares), sum(s > 1 - RARE for s in shares)
        if weak:
            found.append(
                f"{name} has under 1 % of the gradient at the logits in {weak} of {len(shares)} logged steps: there it hardly counts."
            )
        if alone and len(names) > 1:
            found.append(f"{name} has over 99 % of it in {alone} of {len(shares)} logged steps.")
    return found


def _share(line: Mapping[str, Any], name: str) -> float | None:
    share = line.get("terms", {}).get(name, {}).get("share")
    return None if share is None else 100 * share


def _cosines(lines: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, list[float]] = {}
    for line in lines:
        for pair, value in line.get("cosines", {}).items():
            if value is not None:
                found.setdefault(pair, []).append(value)
    return "; ".join(f"cosine of {pair.replace('|', ' and ')}: median {statistics.median(v):+.2f}" for pair, v in found.items()) + "."


def _mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values())


def _mean_of(arm: Arm, metric: str) -> str:
    values = list(arm.values(metric).values())
    if not values:
        return ""
    told = summary(values)
    spread = "" if told.low is None or told.high is None else f" ({told.low:.4g} to {told.high:.4g})"
    return f"{told.mean:.4g}{spread}"
