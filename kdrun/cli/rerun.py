"""kdrun ledger rerun: a record measured again with the present code, and every mean held against it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.cli.provenance import record_named
from kdrun.errors import CheckFailed, Problem, Refused

if TYPE_CHECKING:
    from kdrun.config.compose import Composed
    from kdrun.ledger.repeat import Repeated

RERUN = "rerun.json"
FREE = ("hardware", "run", "track", "dataset.path")  # what may be another on another machine
NEVER = ("run.ledger", "run.rivals", "run.seeds", "run.dry", "run.max_steps")


def rerun_record(name: str, overrides: list[str], seeds: str | None, root: Path, config_dirs: list[str], json: bool, quiet: bool) -> None:
    """Raises `Refused` for a record that there is not and for settings that make another experiment of it, `CheckFailed` where a mean
    differs."""
    from kdrun.config.check import check, located
    from kdrun.config.compose import compose
    from kdrun.engine.provenance import changes_since
    from kdrun.ledger import repeat

    record = record_named(name, root)
    _same_experiment(overrides)
    composed = compose([*repeat.overrides_of(record, _seeds(seeds)), f"run.root={root}", *overrides], config_dirs)
    check(composed)
    _same_arms(composed, record)
    before, now = record["config_hash"], composed.hash()
    configuration = "the same" if before == now else f"hash {before} then, {now} now: a key, a default or the recipe has changed"
    facts = {"record": name, "code": changes_since(record["code"]["commit"]), "configuration": configuration}

    from kdrun.cli.session import run_comparison
    from kdrun.cli.view import make_reporter

    with located(composed), make_reporter(json=json, quiet=quiet) as reporter:
        for key, value in facts.items():
            reporter.note(f"{key}: {value}")
        document = run_comparison(composed, reporter)
    found = repeat.compare(record, document)
    _report(composed, record, document, found, facts, json)
    different = [r for r in found if r.match == "different"]
    if different:
        raise CheckFailed(f"{len(different)} of {len(found)} means differ from the record '{name}'")


def _same_experiment(overrides: Sequence[str]) -> None:
    keys = [o.lstrip("+~").partition("=")[0] for o in overrides]
    wrong = [k for k in keys if k in NEVER or not any(k == free or k.startswith(f"{free}.") for free in FREE)]
    if wrong:
        remedy = f"only {', '.join(FREE)} may be others; for another experiment: kdrun train; for other seeds: --seeds"
        raise Refused([Problem("a rerun keeps the record's experiment", key, "command line", remedy) for key in wrong])


def _same_arms(composed: Composed, record: dict[str, Any]) -> None:
    """A record of a sweep has arms that its recipe does not name, and one of an older recipe may have others."""
    from kdrun.engine.compare import arm_names

    here = arm_names(composed)
    gone = [arm for arm in record["arms"] if arm not in here]
    if gone:
        what = f"the recipe has no arm named {', '.join(gone)}"
        remedy = f"its arms are {', '.join(here)}; a sweep is run again by kdrun sweep"
        raise Refused(Problem(what, f"ledger {record['recipe']}", "", remedy))


def _seeds(text: str | None) -> list[int] | int | None:
    """ "3" -> the seeds 1 to 3, "[4,5]" or "4,5" -> these. Raises `Refused` for what is neither."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.strip("[]").split(",")]
    except ValueError as error:
        raise Refused(Problem(f"'{text}' are no seeds", "--seeds", "command line", "--seeds 3, or --seeds [1,2]")) from error
    return numbers[0] if text.strip().isdigit() else numbers


def _report(
    composed: Composed, record: dict[str, Any], document: dict[str, Any], found: list[Repeated], facts: dict[str, str], json: bool
) -> None:
    """The table of the primary metric, the count of all, and the same in the run's folder for machines."""
    from kdrun.cli.console import print_json
    from kdrun.engine.records import read_json, write_json

    counts = Counter(r.match for r in found)
    told = {
        **facts,
        "folder": document["folder"],
        "recorded_commit": record["code"]["commit"],
        "commit": document["code"]["commit"],
        "config_hash": {"record": record["config_hash"], "now": composed.hash()},
        "teacher_sha256": {"record": record["teacher"].get("sha256"), "now": document["teacher"].get("sha256")},
        "counts": dict(counts),
        "means": [dataclasses.asdict(r) for r in found],
    }
    file = Path(document["folder"]) / RERUN
    write_json(file, told)
    if json:
        print_json(read_json(file))
        return
    _show(record, found, counts, told)


def _show(record: dict[str, Any], found: list[Repeated], counts: Mapping[Any, int], told: dict[str, Any]) -> None:
    from rich.table import Table

    from kdrun.cli.console import out
    from kdrun.ledger.table import number

    console = out()
    table = Table()
    for heading in ("arm", "metric", "recorded", "now", "prediction interval", ""):
        table.add_column(heading, justify="left" if heading in ("arm", "metric", "") else "right")
    for r in found:
        if r.metric == record["metric"] or r.match == "different":
            low, high = r.low, r.high
            interval = "" if low is None or high is None else f"{number(low, r.metric)} to {number(high, r.metric)}"
            table.add_row(r.arm, r.metric, number(r.recorded, r.metric), number(r.repeated, r.metric), interval, r.match)
    console.print(table)
    console.print(f"of {len(found)} means: " + ", ".join(f"{count} {match}" for match, count in counts.items()), soft_wrap=True)
    if counts.get("different"):
        console.print("by chance alone one independent mean in twenty lies outside its 95 % prediction interval", soft_wrap=True)
    for key in ("code", "configuration"):
        console.print(f"{key}: {told[key]}", soft_wrap=True)
    teachers = told["teacher_sha256"]
    if teachers["record"] and teachers["record"] != teachers["now"]:
        console.print("teacher: other weights than the record's", soft_wrap=True)
    console.print(f"run      {told['folder']}", soft_wrap=True)
