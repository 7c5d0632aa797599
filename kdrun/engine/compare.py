"""A method beside its rivals: the same budget, shared seeds, one teacher; every arm and seed is an ordinary run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdrun.config.check import check, located, origin_of
from kdrun.config.compose import COMMAND_LINE, Composed, compose
from kdrun.dataset.base import Data
from kdrun.engine.build import build_first, given_weights, start_from
from kdrun.engine.distributed import Ranks
from kdrun.engine.packed import key
from kdrun.engine.records import SUMMARY, read_json, write_json
from kdrun.engine.teaching import load_checkpoint
from kdrun.errors import Problem, Refused
from kdrun.strict_json import metrics_of
from kdrun.student.statefile import read_state

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    arm: str
    seed: int
    composed: Composed
    folder: Path


def is_comparison(tree: Mapping[str, Any]) -> bool:
    run = tree["run"]
    return bool(run["rivals"] or run["seeds"])


def arm_names(composed: Composed) -> list[str]:
    """The method first, then its rivals (if they were asked for)."""
    rivals = list(composed.tree["rivals"]) if composed.tree["run"]["rivals"] else []
    return [method_name(composed), *(r for r in rivals if r != method_name(composed))]


def method_name(composed: Composed) -> str:
    """The method's short name, as claims and published rows write it: the recipe's own, or that of the objective."""
    return composed.tree["method"] or composed.choices["objective"]


def jobs(composed: Composed, folder: Path) -> list[Job]:
    """Every run of the comparison, seed by seed, so that an interrupted one has whole rows. Raises `Refused`: all arms
    are composed and checked before the first one starts."""
    run = composed.tree["run"]
    seeds = run["seeds"] or [composed.tree["seed"]]
    found: list[Job] = []
    problems: list[Problem] = []
    for seed in seeds:
        for arm in arm_names(composed):
            try:
                found.append(Job(arm, seed, _arm(composed, arm, seed), folder / "arms" / arm / f"seed-{seed}"))
            except Refused as refused:
                problems += [replace(p, where=p.where or f"rivals.{arm}") for p in refused.problems if seed == seeds[0]]
    if problems:
        raise Refused(problems)
    return found


def _arm(composed: Composed, arm: str, seed: int) -> Composed:
    """The configuration of an arm, checked. What a rival says of itself is composed as if the command line had said it; its origins
    and problems name the line of the recipe."""
    extra = [] if arm == method_name(composed) else list(composed.tree["rivals"][arm])
    keys = [e.lstrip("+~").partition("=")[0] for e in extra]
    place = origin_of(composed, f"rivals.{arm}")

    def placed(key: str, origin: str) -> str:
        its_own = key in extra or any(key == k or key.startswith(f"{k}.") for k in keys)
        return f"{place} (rivals.{arm})" if its_own and origin == COMMAND_LINE != place else origin

    # A group that the rival chooses for itself is its own: the command line's choice and settings of it are the method's.
    groups = set(keys)
    own = [o for o in composed.overrides if o.lstrip("+~").partition("=")[0].split(".")[0] not in groups]
    fixed = [f"seed={seed}", "run.rivals=false", "run.seeds=null", "run.dir=null", "run.ledger=false", "run.packed=false"]
    if composed.tree["run"]["packed"] and composed.tree["hardware"]["compile"] == "auto":
        fixed.append("hardware.compile=off")
    own = [o for o in own if o.partition("=")[0] not in {f.partition("=")[0] for f in fixed}]
    try:
        found = compose([*own, *extra, *fixed], composed.config_dirs, default_recipe=composed.recipe)
        found.origins = {key: placed(key, origin) for key, origin in found.origins.items()}
        check(found)
    except Refused as refused:
        raise Refused([replace(p, where=placed(p.key, p.where)) for p in refused.problems]) from refused
    return found


def packs(listed: Iterable[Job], packed: bool) -> Iterator[list[Job]]:
    """The jobs, those that can be packed together in one list. In the order of their first."""
    if not packed:
        yield from ([job] for job in listed)
        return
    groups: dict[str, list[Job]] = {}
    for number, job in enumerate(listed):
        groups.setdefault(key(job.composed.tree) or str(number), []).append(job)
    yield from groups.values()


def try_out(listed: list[Job], composed: Composed, data: Data | None) -> None:
    """Build every arm once, with the weights that it names, and throw it away: what cannot fit together is refused before the first
    arm has cost anything. Of an arm whose data are not at hand (`data` None, or its data set another) the weights' files are read."""
    problems: list[Problem] = []
    first = {job.arm: job for job in reversed(listed)}
    for arm, job in first.items():
        tree = job.composed.tree
        try:
            with located(job.composed):
                if data is not None and tree["dataset"] == composed.tree["dataset"]:
                    built = build_first(tree, data, torch.device("cpu"), Ranks())
                    load_checkpoint(tree, start_from(built))
                else:
                    for key, file in given_weights(tree).items():
                        read_state(file, key)
        except Refused as refused:
            problems += [replace(p, where=p.where or f"arm {arm}") for p in refused.problems]
    if problems:
        raise Refused(problems)


def results(listed: list[Job]) -> dict[str, dict[str, dict[int, float]]]:
    """arm -> metric -> seed -> value, of the runs that are done. The primary metric is the one by protocol."""
    table: dict[str, dict[str, dict[int, float]]] = {}
    for job, summary in finished(listed):
        # NaN too: a run that diverged is not left out.
        for metric, value in metrics_of({**(summary["test"] or {}), summary["metric"]: summary["value"]}).items():
            table.setdefault(job.arm, {}).setdefault(metric, {})[job.seed] = value
    return table


def finished(listed: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    for job in listed:
        if (job.folder / SUMMARY).is_file():
            yield job, read_json(job.folder / SUMMARY)


def write_comparison(folder: Path, listed: list[Job]) -> None:
    """The comparison's own record, rewritten after every job."""
    rows = [
        {"arm": j.arm, "seed": j.seed, "folder": str(j.folder.relative_to(folder)), "done": (j.folder / SUMMARY).is_file()} for j in listed
    ]
    write_json(folder / COMPARISON, {"jobs": rows, "results": results(listed)})
