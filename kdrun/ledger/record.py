"""From the runs of a comparison to one record: means, intervals, paired differences, claims, verdict, cost."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun.config.check import instantiate
from kdrun.config.compose import COMMAND_LINE, NOT_SEMANTIC, Composed, compose
from kdrun.config.paths import SearchPath
from kdrun.config.targets import allowed
from kdrun.engine import compare, provenance
from kdrun.engine.compare import Job
from kdrun.engine.records import write_json
from kdrun.engine.summary import taints
from kdrun.errors import CheckFailed, Refused
from kdrun.evaluation.metrics import KINDS, kind
from kdrun.ledger import lineage
from kdrun.ledger.claims import ClaimResult, claim_problems, judge_claim, parse_claim
from kdrun.ledger.leaderboard import leaderboard
from kdrun.ledger.published import lookup
from kdrun.ledger.statistics import paired, summary
from kdrun.ledger.table import read_ledger
from kdrun.ledger.verdict import judge

FREE_CHOICES = ("teacher", "student", "objective")  # of a recipe: every pair and method is a record of its own


def assess(composed: Composed, listed: Sequence[Job], folder: Path) -> dict[str, Any]:
    """Everything that can be said of a finished comparison, as plain data."""
    tree, method = composed.tree, compare.method_name(composed)
    table = compare.results(list(listed))
    done = list(compare.finished(list(listed)))
    primary = tree["evaluation"]["primary"]
    claims = [judge_claim(text, table, primary) for text in tree["claims"] if _answerable(text, table, primary)]
    claimed = {metric for text in tree["claims"] for _, metric in parse_claim(text, primary).sides}
    kept = {primary, *claimed, *instantiate(tree["evaluation"], "evaluation", allowed(tree)).names()}
    published = lookup(tree["published"], composed.facts(), method, primary)
    measured = list(table.get(method, {}).get(primary, {}).values())
    told = kind(primary)
    verdict = judge(
        measured,
        dataclasses.asdict(published) if published else None,
        scale=tree["scale"],
        claims=claims,
        higher_is_better=told is None or told.higher_is_better,
    )
    tainted = sorted({t for _, s in done for t in s["tainted"]})
    changed = changed_from_recipe(composed)
    return {
        "recipe": composed.recipe,
        "paper": tree["paper"],
        "family": tree["family"],
        "scale": tree["scale"],
        "metric": primary,
        "method": method,
        "arms": {arm: {m: _row(v) for m, v in metrics.items() if m in kept} for arm, metrics in table.items()},
        "differences": {
            arm: dataclasses.asdict(paired(table[method][primary], table[arm][primary]))
            for arm in table
            if arm != method and method in table
        },
        "leaderboard": _board(table, primary),
        "claims": [_clean(dataclasses.asdict(c)) for c in claims],
        "published": dataclasses.asdict(published) if published else None,
        "teacher": _teacher([s["teacher"] for job, s in done if job.arm == method]),
        "verdict": dataclasses.asdict(verdict),
        "notes": tree["notes"],
        "choices": composed.choices,
        "changed": changed,
        "tainted": tainted,
        "config_hash": composed.hash(),
        "seeds": sorted({j.seed for j in listed}),
        "runs": len(done),
        "planned_runs": len(listed),
        "cost": {
            "seconds": round(sum(s["cost"]["seconds"] for _, s in done), 1),
            "cpu_seconds": round(sum(s["cost"]["cpu_seconds"] for _, s in done), 1),
            "peak_memory_bytes": max((s["cost"]["peak_memory_bytes"] for _, s in done), default=0),
            "hardware": done[0][1]["cost"]["hardware"] if done else "",
        },
        "student": done[0][1]["student"] if done else {},
        "code": provenance.code(),
        "provenance": lineage.of_runs([job.folder for job, _ in done]),
        "folder": str(folder),
        "finished": time.strftime("%Y-%m-%d"),
    }


def changed_from_recipe(composed: Composed) -> list[str]:
    """What the command line set that changes the experiment; its pair, its objective and the seed are the recipe's own freedom."""
    semantic = {k.split(".")[0] for k in composed.tree} - set(NOT_SEMANTIC) - {"seed"}
    leaves = [
        k for k, origin in composed.origins.items() if origin == COMMAND_LINE and k.split(".")[0] in semantic and k not in ("dataset.path",)
    ]
    return sorted([*leaves, *(g for g in other_choices(composed) if g in semantic and g not in FREE_CHOICES)])


def other_choices(composed: Composed) -> dict[str, str]:
    """The options, by group, that the command line chose instead of the recipe's own."""
    if composed.recipe is None:
        return {}
    own = compose([f"recipe={composed.recipe}"], composed.config_dirs).choices
    return {group: option for group, option in composed.choices.items() if own.get(group) != option}


def check_claims(composed: Composed) -> None:
    """Raise `Refused`, before the first run, for claims that cannot be read or name an arm or metric that there is not.

    A claim may speak of any objective: one that is not among the arms of this comparison is left open.
    """
    tree = composed.tree
    arms = {*SearchPath.of(composed.config_dirs).options("objective"), *tree["rivals"], compare.method_name(composed)}
    # What objectives and plans tell of themselves is known by name too.
    metrics = [*instantiate(tree["evaluation"], "evaluation", allowed(tree)).names(), *KINDS]
    problems = claim_problems(tree["claims"], arms, metrics, tree["evaluation"]["primary"])
    if problems:
        raise Refused(problems)


def must_be_recordable(composed: Composed) -> None:
    """Raise `CheckFailed`, before a run costs anything, for what its configuration alone keeps out of the ledger."""
    _refuse([*taints(composed), *_not_the_recipe(composed, changed_from_recipe(composed))])


def write_record(composed: Composed, document: Mapping[str, Any], suffix: str = "") -> Path:
    """Put a finished comparison into <root>/ledger. `suffix`: what tells it from the recipe's own record, e.g. a sweep's name. Raises
    `CheckFailed` for what may not enter it."""
    missing = document["planned_runs"] - document["runs"]
    reasons = [*document["tainted"], *_not_the_recipe(composed, document["changed"])]
    _refuse([*reasons, *([f"{missing} of {document['planned_runs']} runs are missing"] if missing else [])])
    file = record_file(composed, suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {k: v for k, v in document.items() if k not in ("folder", "tainted", "changed", "planned_runs")}
    record["teacher"] = {k: v for k, v in record["teacher"].items() if k != "from"}  # a path of one machine
    record |= {"chosen": _chosen(composed), "overrides": portable(composed.overrides)}
    write_json(file, record)
    return file


def record_file(composed: Composed, suffix: str = "") -> Path:
    """Where the record of this experiment is, or would be: every pair and method of a recipe has one of its own."""
    pair = [f"{group}_{option}" for group, option in _chosen(composed).items()]
    name = "-".join([str(composed.recipe), *pair, *([suffix] if suffix else [])])
    return Path(composed.tree["run"]["root"]) / "ledger" / f"{name}.json"


def _chosen(composed: Composed) -> dict[str, str]:
    others = other_choices(composed)
    return {group: others[group] for group in FREE_CHOICES if group in others}


def portable(overrides: Sequence[str]) -> list[str]:
    """The part of a command line that a repetition needs: choices, seeds, arms and hardware; not where its author kept things."""

    def needed(key: str) -> bool:
        group = key.partition(".")[0]
        return key in ("run.rivals", "run.packed", "seed") or (group not in ("recipe", "run", "track") and key != "dataset.path")

    return [text for text in overrides if needed(text.lstrip("+~").partition("=")[0])]


def _not_the_recipe(composed: Composed, changed: Sequence[str]) -> list[str]:
    if composed.recipe is None:
        return ["a record is that of a recipe, and none is chosen (recipe=NAME)"]
    return [f"{key} is set on the command line, not by the recipe" for key in changed]


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        remedy = "leave those settings to a recipe (one of your own joins by --config-dir), or run without run.ledger=true"
        raise CheckFailed(f"this may not enter the ledger: {'; '.join(dict.fromkeys(reasons))}\n  remedy  {remedy}")


def _teacher(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of the method's teacher; where the seeds have teachers of their own, each measured value is the mean of theirs."""
    if len({str(fact.get("sha256")) for fact in facts}) < 2:
        return dict(facts[0]) if facts else {}
    shared = [name for name, value in facts[0].items() if isinstance(value, float) and all(isinstance(f.get(name), float) for f in facts)]
    return {"from": f"{len(facts)} teachers, one for each seed", **{name: statistics.fmean(f[name] for f in facts) for name in shared}}


def _answerable(text: str, table: Mapping[str, Any], primary: str) -> bool:
    """Whether both arms were run and have the metric: a student alone has no agreement with a teacher."""
    claim = parse_claim(text, primary)
    return all(metric in table.get(arm, ()) for arm, metric in claim.sides)


def _board(table: Mapping[str, Mapping[str, Mapping[int, float]]], primary: str) -> list[dict[str, Any]]:
    """The arms ranked, with who cannot be told apart; [] for a metric whose better direction is not known."""
    told = kind(primary)
    if told is None:
        return []
    rows = leaderboard({arm: metrics[primary] for arm, metrics in table.items() if primary in metrics}, told.higher_is_better)
    return [{**dataclasses.asdict(row), "ties": row.mark} for row in rows]


def _row(by_seed: Mapping[int, float]) -> dict[str, Any]:
    return {**dataclasses.asdict(summary(list(by_seed.values()))), "by_seed": {str(k): v for k, v in by_seed.items()}}


def _clean(claim: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in claim.items()}


__all__ = ["ClaimResult", "assess", "changed_from_recipe", "check_claims", "must_be_recordable", "read_ledger", "write_record"]
