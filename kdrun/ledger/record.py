"""From the runs of a comparison to one record: means, intervals, paired differences, claims, verdict, cost."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun.config.compose import COMMAND_LINE, NOT_SEMANTIC, Composed
from kdrun.engine import compare, provenance
from kdrun.engine.compare import Job
from kdrun.engine.records import read_json, write_json
from kdrun.errors import CheckFailed
from kdrun.ledger.claims import ClaimResult, judge_claim, parse_claim
from kdrun.ledger.published import lookup
from kdrun.ledger.statistics import paired, summary
from kdrun.ledger.verdict import judge

SHOWN = ("top1", "top5", "nll", "ece", "agreement", "kl_teacher", "pair_order")


def assess(composed: Composed, listed: Sequence[Job], folder: Path) -> dict[str, Any]:
    """Everything that can be said of a finished comparison, as plain data."""
    tree, method = composed.tree, compare.method_name(composed)
    table = compare.results(list(listed))
    done = list(compare.finished(list(listed)))
    primary = tree["evaluation"]["primary"]
    claims = [judge_claim(text, table, primary) for text in tree["claims"] if _answerable(text, table, primary)]
    published = lookup(tree["published"], composed.choices, method)
    measured = list(table.get(method, {}).get(primary, {}).values())
    verdict = judge(measured, dataclasses.asdict(published) if published else None, scale=tree["scale"], claims=claims)
    tainted = sorted({t for _, s in done for t in s["tainted"]})
    changed = changed_from_recipe(composed)
    return {
        "recipe": composed.recipe, "paper": tree["paper"], "scale": tree["scale"], "metric": primary, "method": method,
        "arms": {arm: {m: _row(v) for m, v in metrics.items() if m in (*SHOWN, primary)} for arm, metrics in table.items()},
        "differences": {arm: dataclasses.asdict(paired(table[method][primary], table[arm][primary])) for arm in table if arm != method and method in table},
        "claims": [_clean(dataclasses.asdict(c)) for c in claims],
        "published": dataclasses.asdict(published) if published else None,
        "teacher": next((s["teacher"] for job, s in done if job.arm == method), {}),
        "verdict": dataclasses.asdict(verdict), "notes": tree["notes"],
        "choices": composed.choices, "changed": changed, "tainted": tainted, "config_hash": composed.hash(),
        "seeds": sorted({j.seed for j in listed}), "runs": len(done), "planned_runs": len(listed),
        "cost": {"seconds": round(sum(s["cost"]["seconds"] for _, s in done), 1), "peak_memory_bytes": max((s["cost"]["peak_memory_bytes"] for _, s in done), default=0),
                 "hardware": done[0][1]["cost"]["hardware"] if done else ""},
        "student": done[0][1]["student"] if done else {}, "code": provenance.code(), "folder": str(folder), "finished": time.strftime("%Y-%m-%d"),
    }


def changed_from_recipe(composed: Composed) -> list[str]:
    """What the command line set that changes the experiment; group choices and the seed are the recipe's own freedom."""
    semantic = {k.split(".")[0] for k in composed.tree} - set(NOT_SEMANTIC) - {"seed"}
    return sorted(k for k, origin in composed.origins.items() if origin == COMMAND_LINE and k.split(".")[0] in semantic and k not in ("dataset.path",))


def write_record(composed: Composed, document: Mapping[str, Any]) -> Path:
    """Put a finished comparison into <root>/ledger. Raises `CheckFailed` for what may not enter it."""
    reasons = list(document["tainted"])
    reasons += [f"{key} is set on the command line, not by the recipe" for key in document["changed"]]
    if document["runs"] < document["planned_runs"]:
        reasons.append(f"{document['planned_runs'] - document['runs']} of {document['planned_runs']} runs are missing")
    if reasons:
        raise CheckFailed("this may not enter the ledger: " + "; ".join(reasons))
    folder = Path(composed.tree["run"]["root"]) / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    default = [f"{g}={composed.choices[g]}" for g in ("teacher", "student", "objective") if composed.set_by_user(g)]
    name = "-".join([str(composed.recipe), *(d.replace("=", "_") for d in default)])
    record = {k: v for k, v in document.items() if k not in ("folder", "tainted", "changed", "planned_runs")}
    record["teacher"] = {k: v for k, v in record["teacher"].items() if k != "from"}  # a path of one machine
    write_json(folder / f"{name}.json", record)
    return folder / f"{name}.json"


def read_ledger(root: Path) -> list[dict[str, Any]]:
    """All records of a ledger folder, by recipe."""
    return [read_json(file) for file in sorted((root / "ledger").glob("*.json"))]


def _answerable(text: str, table: Mapping[str, Any], primary: str) -> bool:
    claim = parse_claim(text, primary)
    return claim.left in table and claim.right in table


def _row(by_seed: Mapping[int, float]) -> dict[str, Any]:
    return {**dataclasses.asdict(summary(list(by_seed.values()))), "by_seed": {str(k): round(v, 4) for k, v in by_seed.items()}}


def _clean(claim: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in claim.items()}


__all__ = ["ClaimResult", "assess", "changed_from_recipe", "read_ledger", "write_record"]
