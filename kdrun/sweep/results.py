"""What a sweep found: arms ranked with intervals and ties, and its record for the ledger."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kdrun.config.compose import Composed
from kdrun.engine import compare
from kdrun.errors import CheckFailed
from kdrun.evaluation.metrics import kind
from kdrun.ledger import record as ledger
from kdrun.ledger.leaderboard import leaderboard
from kdrun.ledger.record import assess, other_choices, write_record
from kdrun.sweep.manifest import Sweep


def document(sweep: Sweep) -> dict[str, Any]:
    """The sweep as plain data: every job with its status and value, the arms ranked over their seeds."""
    jobs: list[dict[str, Any]] = []
    values: dict[str, dict[int, float]] = {}
    costs: dict[str, list[float]] = {}
    metric: str | None = None
    for job in sweep.jobs:
        status = sweep.status(job)
        entry: dict[str, Any] = {"id": job.id, "choices": job.choices, "arm": job.arm, "status": status, "folder": str(sweep.place(job))}
        if status == "done":
            summary = sweep.summary(job)
            metric = metric or summary["metric"]
            entry |= {"metric": summary["metric"], "value": summary["value"], "seconds": summary["cost"]["seconds"]}
            costs.setdefault(job.arm, []).append(summary["cost"]["cpu_seconds"])
            # Of recipes with other metrics there is no one table.
            if summary["metric"] == metric:
                values.setdefault(job.arm, {})[job.seed] = summary["value"]
        elif status == "failed":
            entry["message"] = sweep.failure_told(job)["message"]
            entry["tail"] = sweep.failure_told(job)["tail"]
        jobs.append(entry)
    told = kind(metric) if metric else None
    rows = leaderboard(values, told is None or told.higher_is_better) if values else []
    return {
        "sweep": sweep.folder.name,
        "folder": str(sweep.folder),
        "metric": metric,
        "jobs": jobs,
        "leaderboard": [{**dataclasses.asdict(row), "cpu_seconds": round(sum(costs[row.arm]) / len(costs[row.arm]), 1)} for row in rows],
        "stale": [str(sweep.place(job)) for job in sweep.stale],
    }


def base(sweep: Sweep) -> Composed:
    """What the record is of: the recipe's own objective, where the sweep has it, else the first job's."""
    composed = [job.composed for job in sweep.jobs if job.composed is not None]
    return next((c for c in composed if "objective" not in other_choices(c)), composed[0])


def arms(sweep: Sweep) -> list[compare.Job]:
    """The jobs as those of a comparison."""
    return [compare.Job(job.arm, job.seed, job.composed, sweep.place(job)) for job in sweep.jobs if job.composed is not None]


def must_be_recordable(sweep: Sweep) -> None:
    """Raise `CheckFailed`, before a job costs anything, for what keeps its record out of the ledger."""
    ledger.must_be_recordable(base(sweep))


def record(sweep: Sweep) -> Path:
    """Put the sweep into the ledger. Raises `CheckFailed` where a job is missing, or for what may not enter it."""
    missing = [job for job in sweep.jobs if sweep.status(job) != "done"]
    if missing:
        raise CheckFailed(
            f"{len(missing)} of {len(sweep.jobs)} jobs are not done, so there is no record: kdrun sweep --resume {sweep.folder.name}"
        )
    composed = base(sweep)
    return write_record(composed, assess(composed, arms(sweep), sweep.folder), suffix=sweep.folder.name)
