"""From a number to what made it: code, configuration, data, teacher, start, environment; of a run, a comparison or a ledger record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun.engine.records import ORIGIN, SUMMARY, read_json

PROVENANCE, COMPARISON = "provenance.json", "comparison.json"
LEFT_OUT = ("command", "platform")  # of the environment: what tells of one machine and not of the number


def of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """What a record keeps of its runs' provenance: every data set, teacher and environment that was used, with the number of runs.
    Empty where the runs left none."""
    told = [read_json(folder / PROVENANCE) for folder in folders if (folder / PROVENANCE).is_file()]
    if not told:
        return {}
    data = _counted([tuple((k, str(t["data"][k])) for k in ("name", "fingerprint")) for t in told])
    teachers = _counted([(("sha256", str(t["teacher"]["sha256"])),) for t in told if t["teacher"].get("sha256")])
    environments = [{k: v for k, v in t["environment"].items() if k not in LEFT_OUT} for t in told]
    different = [e for i, e in enumerate(environments) if e not in environments[:i]]
    return {
        "data": data,
        "teachers": teachers,
        "environments": [{**e, "runs": environments.count(e)} for e in different],
        "codes": _counted([(("commit", t["code"]["commit"]), ("dirty", t["code"]["dirty"])) for t in told]),
    }


def _counted(rows: Sequence[tuple[tuple[str, Any], ...]]) -> list[dict[str, Any]]:
    return [{**dict(row), "runs": count} for row, count in Counter(rows).items()]


def of_folder(folder: Path) -> dict[str, Any]:
    """The whole provenance of a run's folder: of a single run its provenance.json; of a comparison what its runs have in common, and
    every run's folder with its number."""
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    run = read_json(folder / ORIGIN)
    head = {"folder": str(folder), "recipe": run["recipe"], "choices": run["choices"], "overrides": run["overrides"]}
    head |= {"config_hash": run["config_hash"], "metric": summary.get("metric")}
    if not (folder / COMPARISON).is_file():
        told = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
        return {**head, "value": summary.get("value"), **{k: v for k, v in told.items() if k != "origins"}}
    jobs = read_json(folder / COMPARISON)["jobs"]
    done = [job for job in jobs if job["done"]]
    runs = [
        {"arm": job["arm"], "seed": job["seed"], "value": read_json(folder / job["folder"] / SUMMARY)["value"], "folder": job["folder"]}
        for job in done
    ]
    return {**head, "code": summary.get("code", {}), **of_runs([folder / job["folder"] for job in done]), "runs": runs}


def of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a record, as far as it was kept: older records hold neither the data's fingerprint nor the environment."""
    row = record["arms"][record["method"]][record["metric"]]
    kept: Mapping[str, Any] = record.get("provenance", {})
    return {
        "recipe": record["recipe"],
        "choices": record["choices"],
        "overrides": record.get("overrides", [f"{group}={option}" for group, option in (record.get("chosen") or {}).items()]),
        "config_hash": record["config_hash"],
        "metric": record["metric"],
        "value": row["mean"],
        "by_seed": row["by_seed"],
        "code": record["code"],
        "data": kept.get("data"),
        "teachers": kept.get("teachers") or [{"sha256": record["teacher"].get("sha256")}],
        "teacher_measured": {k: v for k, v in record["teacher"].items() if isinstance(v, float)},
        "environments": kept.get("environments") or [{"hardware": record["cost"]["hardware"]}],
        "finished": record["finished"],
    }
