"""The ledger as tables: for the terminal, for README, for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("recipe", "published", "measured (95 % interval, n)", "rivals", "student alone", "teacher", "claims", "verdict", "cost")

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
    """One row, as text, in the order of COLUMNS."""
    metric, method = record["metric"], record["method"]
    arms = record["arms"]
    published = record["published"]
    rivals = ", ".join(
        f"{arm} {row[metric]['mean']:.2f}"
        for arm, row in sorted(arms.items(), key=lambda a: -a[1][metric]["mean"])
        if arm not in (method, "ce")
    )
    shown = [c for c in record["claims"] if c["holds"] is True]
    cost = record["cost"]
    at_paper_scale = f"{published['value']:.2f} ({published['table']})" if published else "-"
    return [
        " ".join([record["recipe"], *(f"{group}={option}" for group, option in record.get("chosen", {}).items())]),
        at_paper_scale if record["scale"] == "paper" else "another setting",
        f"{method} {_measured(arms[method][metric])}",
        rivals or "-",
        f"{arms['ce'][metric]['mean']:.2f}" if "ce" in arms else "-",
        f"{record['teacher'][metric]:.2f}" if metric in record["teacher"] else "-",
        f"{len(shown)} of {len(record['claims'])} show",
        record["verdict"]["name"],
        f"{cost['seconds'] / 60:.0f} min on {cost['hardware'].split(',')[0]}",
    ]


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record for machines: recipe, paper, scale, metric, published, measured, interval, n, verdict, cost, commit and all arms."""
    row = record["arms"][record["method"]][record["metric"]]
    paper = record["paper"] or {}
    return {
        "recipe": record["recipe"],
        "chosen": record.get("chosen", {}),
        "paper": paper.get("arxiv") or paper.get("title"),
        "scale": record["scale"],
        "metric": record["metric"],
        "published": record["published"],
        "measured": row["mean"],
        "sd": row["sd"],
        "interval": [row["low"], row["high"]],
        "n": row["n"],
        "verdict": record["verdict"]["name"],
        "reason": record["verdict"]["reason"],
        "claims": record["claims"],
        "arms": record["arms"],
        "teacher": record["teacher"],
        "cost": record["cost"],
        "commit": record["code"]["commit"],
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


def _measured(row: Mapping[str, Any]) -> str:
    interval = f" ({row['low']:.2f} to {row['high']:.2f}, {row['n']})" if row["low"] is not None else f" (n = {row['n']})"
    return f"{row['mean']:.2f}{interval}"
