"""Tables of results: what was measured, beside what was published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kdrun.ledger.table import ALONE, number, ranked, unit

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.config.compose import Composed

GOOD, BAD = "green", "yellow"


def show_run(console: Console, composed: Composed, summary: dict[str, Any]) -> None:
    """The end of a single run: teacher, student, published number, where things lie, what to do next."""
    from kdrun.ledger.published import lookup
    from kdrun.ledger.record import changed_from_recipe

    if not summary.get("test"):
        console.print(f"job {summary.get('job')} runs; its folder: {summary.get('folder')}")
        return
    tree, metric, facts = composed.tree, summary["metric"], composed.facts()
    paper = tree["scale"] == "paper"
    console.print(f"\n[bold]{composed.recipe or 'run'}[/], seed {summary['seed']}: {metric} ({summary['how']})", soft_wrap=True)
    table = Table()
    for heading in ("", "measured", *(["published", "difference", "from"] if paper else [])):
        table.add_column(heading, justify="left" if heading in ("", "from") else "right")
    rows = [("teacher", f"teacher ({composed.choices['teacher']})", summary["teacher"].get(metric))] if metric in summary["teacher"] else []
    method = composed.choices["objective"]
    rows.append((method, f"{composed.tree['method'] or method} ({composed.choices['student']})", summary["value"]))
    for name, label, value in rows:
        published = lookup(tree["published"], facts, name, metric)
        beside = ["-", "", ""]
        if published:
            source = f"{published.table}, {published.protocol}, n={published.n or '?'}"
            difference = None if value is None else value - published.value
            beside = [number(published.value, metric), number(difference, metric, "+"), escape(source)]
        table.add_row(label, number(value, metric), *(beside if paper else []))
    console.print(table)
    others = {k: v for k, v in summary["test"].items() if k != metric}
    console.print("  ".join(f"{k} {'NaN' if v is None else format(v, '.4g')}" for k, v in others.items()), soft_wrap=True)
    show_forecast(console, summary)
    changed = changed_from_recipe(composed)
    if changed and paper:
        console.print(f"[{BAD}]not the published setting[/]: {escape(', '.join(changed))} set on the command line", soft_wrap=True)
    if summary["tainted"]:
        console.print(f"[{BAD}]tainted[/] ({escape(', '.join(summary['tainted']))}): may not enter the ledger", soft_wrap=True)
    _published_elsewhere(console, composed)
    _next_commands(console, composed, summary)


def show_forecast(console: Console, summary: Mapping[str, Any]) -> None:
    """What the run was expected to cost beside what it cost."""
    from kdrun.ledger.forecasts import forecast_lines

    for line in forecast_lines(summary):
        console.print(line, soft_wrap=True)


def show_comparison(console: Console, composed: Composed, document: dict[str, Any]) -> None:
    """The end of a comparison: every arm with its interval, differences paired by seed, ties, claims, verdict."""
    n, metric = len(document["seeds"]), document["metric"]
    what = f"{_with_unit(metric)} over {n} seed{'s' if n > 1 else ''}"
    console.print(f"\n[bold]{document['recipe']}[/] ({document['scale']} scale): {what}", soft_wrap=True)
    _show_arms(console, document)
    _further_metrics(console, composed, document)
    words = {True: f"[{GOOD}]shows[/]", False: f"[{BAD}]does not show[/]", None: f"[{BAD}]open[/]"}
    for claim in document["claims"]:
        console.print(f"claim {escape(claim['text'])}: {words[claim['holds']]}; {escape(claim['sentence'])}", soft_wrap=True)
    shown = sum(c["holds"] is True for c in document["claims"])
    # At bench scale the verdict's reason is the claims' own sentences, which stand above.
    reason = (
        f"{shown} of {len(document['claims'])} claims show"
        if document["claims"] and document["scale"] == "bench"
        else document["verdict"]["reason"]
    )
    console.print(f"verdict: [bold]{document['verdict']['name']}[/]; {escape(reason)}", soft_wrap=True)
    for note in document["notes"]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if document["tainted"]:
        console.print(f"[{BAD}]tainted[/] ({escape(', '.join(document['tainted']))}): may not enter the ledger", soft_wrap=True)
    _published_elsewhere(console, composed)
    _next_commands(console, composed, document)


def _show_arms(console: Console, document: dict[str, Any]) -> None:
    """The arms, the best first: their means, the method's difference to each, and each one's to the first, with who is tied."""
    metric, method, arms = document["metric"], document["method"], document["arms"]
    rows = {row["arm"]: row for row in document.get("leaderboard", ())}
    ranking = len(rows) > 1  # one arm has nobody to be compared with
    table = Table()
    table.add_column("arm")
    for heading in ("mean", "sd", "95 % interval", f"{method} minus it", "95 % interval"):
        table.add_column(heading, justify="right")
    for heading in ("to the first", "p", "tied") if ranking else ():
        table.add_column(heading, justify="left" if heading == "tied" else "right")
    if metric in document["teacher"]:
        table.add_row("teacher", number(document["teacher"][metric], metric), style="dim")
    for arm in ranked(arms, metric):
        row, gap, place = arms[arm][metric], document["differences"].get(arm), rows.get(arm, {})
        spread = "" if row["sd"] is None else number(row["sd"], metric)
        cells = [arm_label(arm), number(row["mean"], metric), spread, _interval(row, metric)]
        cells += [number(gap["mean"], metric, "+"), _interval(gap, metric, "+")] if gap else ["", ""]
        if ranking:
            first = place.get("rank") == 1 and place.get("paired") is None
            cells += ["" if first else number(place.get("gap"), metric, "+"), _p(place.get("p")), place.get("ties", "")]
        table.add_row(*cells, style="bold" if arm == method else None)
    console.print(table)
    if ranking:
        console.print("tied: arms that share a letter cannot be told apart (every pair compared, p corrected by Holm's method)")


def _p(value: float | None) -> str:
    """A p-value for people; empty where the runs do not allow one."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _further_metrics(console: Console, composed: Composed, document: dict[str, Any]) -> None:
    """A line for each metric that a claim speaks of beside the primary one: its mean for every arm that has it."""
    from kdrun.ledger.claims import parse_claim

    primary = document["metric"]
    named = dict.fromkeys(m for text in composed.tree["claims"] for _, m in parse_claim(text, primary).sides if m != primary)
    for metric in named:
        arms = {arm: row for arm, row in document["arms"].items() if metric in row}
        if arms:
            means = ", ".join(f"{arm} {number(arms[arm][metric]['mean'], metric)}" for arm in ranked(arms, metric))
            console.print(f"{_with_unit(metric)}: {means}", soft_wrap=True)


def _with_unit(metric: str) -> str:
    return f"{metric} ({unit(metric)})" if unit(metric) else metric


def arm_label(arm: str) -> str:
    return f"{arm} (student alone)" if arm in ALONE else arm


def _published_elsewhere(console: Console, composed: Composed) -> None:
    """A bench run is not the published experiment; the paper's numbers are named apart, never in one table with it."""
    if composed.tree["scale"] == "paper":
        return
    for table in composed.tree["published"]:
        for row in table["rows"]:
            where = ", ".join([*(str(c).partition("=")[2] for c in row.get("if", [])), table["table"]])
            cells = " ".join(f"{k} {v[0] if isinstance(v, list) else v}" for k, v in row.items() if k != "if")
            console.print(f"published, another setting ({escape(where)}): {escape(cells)}", soft_wrap=True)


def _next_commands(console: Console, composed: Composed, document: dict[str, Any]) -> None:
    folder = relative(document["folder"])
    method = Path(folder) / "arms" / document["method"] / f"seed-{document['seeds'][0]}" if "arms" in document else Path(folder)
    console.print(f"\nrun      {folder}", soft_wrap=True)
    console.print(f"measure  kdrun eval {method}", soft_wrap=True)
    console.print(f"explain  kdrun show recipe={composed.recipe}" if composed.recipe else "explain  kdrun show", soft_wrap=True)
    if composed.recipe == "pld_digits":
        console.print("next     kdrun ls recipes; kdrun train recipe=pld_cifar100 (CIFAR-100, needs the data and hours)", soft_wrap=True)


def relative(folder: str | Path) -> str:
    path = Path(folder)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _interval(row: dict[str, Any], metric: str, sign: str = "") -> str:
    low, high = row["low"], row["high"]
    return "" if low is None or high is None else f"{number(low, metric, sign)} to {number(high, metric, sign)}"
