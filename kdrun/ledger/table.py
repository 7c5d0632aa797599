"""The ledger as tables: for the terminal, for README, for machines."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun.evaluation.metrics import kind

COLUMNS = (
    "recipe",
    "family",
    "published",
    "measured (95 % interval, n)",
    "rivals",
    "student alone",
    "teacher",
    "claims",
    "verdict",
    "cost",
    "commit",
)
ALONE = ("ce", "sft")  # arms without a teacher: labels alone
SHORT = 60  # letters of a published table's name that a row of another setting has room for

SCALES = (
    ("paper", "At the published setting", "Not attempted yet: these need a GPU and hours."),
    (
        "bench",
        "Bench: small honest experiments; the claim is the direction",
        "No record yet: `kdrun train recipe=pld_bench run.ledger=true` adds one.",
    ),
)


def read_ledger(root: Path) -> list[dict[str, Any]]:
    """All records of <root>/ledger, by recipe."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((root / "ledger").glob("*.json"))]


def cells(record: Mapping[str, Any]) -> list[str]:
    """One row, as text, in the order of COLUMNS. A recipe that was never run has no arms, and its verdict says why."""
    head = [
        " ".join([record["recipe"], *(f"{group}={option}" for group, option in record.get("chosen", {}).items())]),
        record.get("family") or "-",
        _published(record),
    ]
    if not record["arms"]:
        verdict = record["verdict"]
        said = verdict["name"] if verdict["name"] == "not attempted" else f"{verdict['name']}: {verdict['reason']}"
        return [*head, "-", "-", "-", "-", "-", said, "-", "-"]
    metric, method, arms = record["metric"], record["method"], record["arms"]
    alone = next((arm for arm in ALONE if arm in arms), None)
    rivals = ", ".join(f"{arm} {number(arms[arm][metric]['mean'], metric)}" for arm in ranked(arms, metric) if arm not in (method, alone))
    shown = [c for c in record["claims"] if c["holds"] is True]
    cost = record["cost"]
    return [
        *head,
        f"{method} {_measured(arms[method][metric], metric)}",
        rivals or "-",
        number(arms[alone][metric]["mean"], metric) if alone else "-",
        number(record["teacher"][metric], metric) if metric in record["teacher"] else "-",
        f"{len(shown)} of {len(record['claims'])} show",
        record["verdict"]["name"],
        f"{cost['seconds'] / 60:.0f} min on {cost['hardware'].split(',')[0]}",
        commit(record["code"]),
    ]


def commit(code: Mapping[str, Any]) -> str:
    """The commit in short; with a + where the work tree had changes of the code, a configuration or a recipe."""
    return "-" if not code.get("commit") else code["commit"][:7] + ("+" if code.get("dirty") else "")


def number(value: float | None, metric: str, sign: str = "") -> str:
    """A value of a metric, or a difference of two, for people: percentages with two decimals, all others with four significant digits.
    None is how records keep what was not finite."""
    told = kind(metric)
    if value is None or math.isnan(value):
        return "NaN"
    return format(value, sign + (".2f" if told is not None and told.unit == "percent" else ".4g"))


def unit(metric: str) -> str:
    """The unit of a metric, "" for percentages, which need none, and for what has none or is not known."""
    told = kind(metric)
    return "" if told is None or told.unit == "percent" else told.unit


def ranked(arms: Mapping[str, Any], metric: str) -> list[str]:
    """The arms by the metric's own direction, the best first and what diverged last; as they stand where the direction is not known."""
    told = kind(metric)
    if told is None:
        return list(arms)

    def distance(arm: str) -> float:
        mean = arms[arm][metric]["mean"]
        return math.inf if mean is None or math.isnan(mean) else -mean if told.higher_is_better else mean

    return sorted(arms, key=distance)


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record for machines: recipe, paper, scale, metric, published, measured, interval, n, verdict, cost, commit and all arms."""
    arms, metric = record["arms"], record["metric"]
    row = arms[record["method"]][metric] if arms else {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    alone = next((arm for arm in ALONE if arm in arms and arm != record["method"]), None)
    paper = record["paper"] or {}
    return {
        "recipe": record["recipe"],
        "chosen": record.get("chosen", {}),
        "family": record.get("family"),
        "paper": paper.get("arxiv") or paper.get("title"),
        "scale": record["scale"],
        "metric": metric,
        "method": record["method"],
        "published": record["published"],
        "measured": row["mean"],
        "sd": row["sd"],
        "interval": [row["low"], row["high"]],
        "n": row["n"],
        "verdict": record["verdict"]["name"],
        "reason": record["verdict"]["reason"],
        "claims": record["claims"],
        "student_alone": arms[alone][metric]["mean"] if alone else None,
        "teacher_measured": record["teacher"].get(metric),
        "rivals": {arm: arms[arm][metric]["mean"] for arm in ranked(arms, metric) if arm not in (record["method"], alone)},
        "arms": arms,
        "leaderboard": record.get("leaderboard", []),
        "teacher": record["teacher"],
        "cost": record["cost"],
        "commit": record["code"]["commit"],
        "dirty": record["code"].get("dirty"),
        "config_hash": record["config_hash"],
    }


def to_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one table per scale: experiments of different size never share one."""
    parts = []
    for scale, title, nothing in SCALES:
        chosen = [r for r in records if r["scale"] == scale]
        lines = [f"**{title}**", ""]
        if chosen:
            lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
            lines += ["| " + " | ".join(cells(r)) + " |" for r in chosen]
        else:
            lines.append(nothing)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _measured(row: Mapping[str, Any], metric: str) -> str:
    """The metric is named where it is not the usual one."""
    interval = f"n = {row['n']}" if row["low"] is None else f"{number(row['low'], metric)} to {number(row['high'], metric)}, {row['n']}"
    words = ["" if metric == "top1" else metric, number(row["mean"], metric), unit(metric), f"({interval})"]
    return " ".join(filter(None, words))


def _published(record: Mapping[str, Any]) -> str:
    """The published number; a bench row, which is another experiment, names its table only."""
    published = record["published"]
    if not published:
        return "-"
    if record["scale"] == "paper":
        where = "" if published["metric"] == record["metric"] else f"{published['metric']} "
        return f"{where}{number(published['value'], published['metric'])} ({published['table']}, {published['protocol']})"
    return f"another setting: {textwrap.shorten(published['table'].partition(';')[0], SHORT, placeholder=' ...')}"
