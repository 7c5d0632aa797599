"""The rows of the ledger: its records, each with the family of its recipe, and where it is asked for the recipes that were never run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun.config.files import load
from kdrun.config.paths import SearchPath
from kdrun.errors import Refused
from kdrun.ledger.table import read_ledger

NOT_ATTEMPTED, IMPOSSIBLE = "not attempted", "impossible here"


def rows(root: Path, config_dirs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of <root>/ledger. The family is what the recipe says today; a recipe that is not at hand leaves it to the record."""
    files = SearchPath.of(config_dirs).options("recipes")
    records = read_ledger(root)
    for record in records:
        told = load(files[record["recipe"]]).get("family") if record["recipe"] in files else None
        record["family"] = told or record.get("family")
    return records


def never_run(records: Sequence[Mapping[str, Any]], config_dirs: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row, shaped as a record without arms, for every recipe that has none: "not attempted", or "impossible here" with the reason."""
    recorded = {record["recipe"] for record in records}
    for name in SearchPath.of(config_dirs).options("recipes"):
        if name not in recorded:
            yield _unattempted(name, config_dirs)


def _unattempted(name: str, config_dirs: Sequence[str]) -> dict[str, Any]:
    from dataclasses import asdict

    from kdrun.config.compose import compose
    from kdrun.ledger.published import lookup

    composed = compose([f"recipe={name}"], config_dirs)
    tree = composed.tree
    method = tree["method"] or composed.choices["objective"]
    published = lookup(tree["published"], composed.facts(), method, tree["evaluation"].get("primary"))
    published = published or lookup(tree["published"], composed.facts(), method)  # of a metric that kdrun does not measure
    reason = impossible(tree)
    return {
        "recipe": name,
        "family": tree["family"],
        "paper": tree["paper"],
        "scale": tree["scale"],
        "metric": tree["evaluation"].get("primary"),
        "method": method,
        "arms": {},
        "claims": [],
        "teacher": {},
        "published": asdict(published) if published else None,
        "verdict": {"name": IMPOSSIBLE if reason else NOT_ATTEMPTED, "reason": reason or "no run is recorded"},
        "cost": None,
        "code": {"commit": None, "dirty": None},
        "config_hash": composed.hash(),
    }


def impossible(tree: Mapping[str, Any]) -> str | None:
    """Why a configuration cannot run on this machine as it stands, or None. What it asks of the hardware is looked at, not whether its
    data are here nor whether its memory suffices: `kdrun plan` says what it needs."""
    from kdrun.engine.device import pick_device

    hardware = tree["hardware"]
    if hardware["kind"] == "slurm":
        return None  # another machine's business
    try:
        device = pick_device(hardware)
    except Refused as refused:
        return refused.problems[0].what
    if hardware["kind"] == "ranks" and hardware["procs"] is None and hardware["device"] != "cpu" and device.type == "cpu":
        return "it asks for one process per GPU, and torch finds no GPU"
    return None
