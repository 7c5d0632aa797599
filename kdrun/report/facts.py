"""What the runs cost, in what they differ, and where they come from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdrun.ledger.forecasts import forecast_lines
from kdrun.report.boards import Arm, Board, differing
from kdrun.report.collect import Run
from kdrun.report.parts import Section, Table
from kdrun.report.results import scatter

MOST_KEYS = 40
MOST_RUNS_NAMED = 4
NOT_RECORDED = "not recorded"
GONE = "-"
SEMANTIC_GROUPS = ("dataset", "teacher", "student", "objective", "source", "plan", "optim", "evaluation")


def cost_section(board: Board) -> Section:
    about = (
        "Means over the finished runs of an arm; a teacher's own training is not in them. CPU seconds do not depend on what else the "
        "machine did; peak memory is that of the process."
    )
    columns = ("arm", "seconds", "CPU seconds", "peak memory", "samples/s", "parameters", "FLOPs of a sample", "hardware")
    rows = [_cost(arm) for arm in board.arms if arm.done]
    words = [f"{arm.label}: {line}" for arm in board.arms for line in _forecast(arm)]
    if rows and not words:
        words.append("Not recorded: what these runs were expected to cost.")
    if not rows:
        words = ["No run of it is finished: what it costs is not known yet."]
    chart = scatter(board)
    data = {arm.name: {str(seed): told.get("cost") for seed, told in arm.done.items()} for arm in board.arms}
    return Section("cost", "What it cost", about, words, [Table(columns, rows)] if rows else [], [chart] if chart else [], data)


def _cost(arm: Arm) -> list[str]:
    def mean(get: Callable[[dict[str, Any]], Any], show: Callable[[float], str]) -> str:
        values = [float(v) for told in arm.done.values() if (v := get(told)) is not None]
        return show(statistics.fmean(values)) if values else NOT_RECORDED

    cost = lambda key: lambda told: told.get("cost", {}).get(key)  # noqa: E731
    own = lambda key: lambda told: told.get("student", {}).get(key)  # noqa: E731
    hardware = dict.fromkeys(str(told.get("cost", {}).get("hardware") or NOT_RECORDED) for told in arm.done.values())
    return [
        arm.label,
        mean(cost("seconds"), lambda v: f"{v:,.1f}"),
        mean(cost("cpu_seconds"), lambda v: f"{v:,.1f}"),
        mean(cost("peak_memory_bytes"), lambda v: f"{v / 2**20:,.0f} MiB"),
        mean(cost("images_per_s"), lambda v: f"{v:,.0f}"),
        mean(own("parameters"), lambda v: f"{v:,.0f}"),
        mean(own("flops"), lambda v: f"{v:,.0f}"),
        "; ".join(hardware),
    ]


def _forecast(arm: Arm) -> list[str]:
    """Predicted beside measured, of the arm's first finished run."""
    first = next(iter(arm.done.values()), None)
    return [] if first is None else [" ".join(line.split()) for line in forecast_lines(first)]


# -- differences --------------------------------------------------------------------------------------------------


def differences_section(board: Board) -> Section:
    about = (
        "The options that were chosen, and every setting in which the arms differ, the seed apart. What is not listed is the same for all."
    )
    arms = board.arms
    keys = differing([arm.first for arm in arms])
    if len(arms) < 2:
        return Section("differences", "In what they differ", about, ["There is one arm: nothing to tell apart."], data=keys)
    options = {group: [str(arm.first.composed.choices.get(group)) for arm in arms] for group in arms[0].first.composed.choices}
    rows = [[group, *chosen] for group, chosen in options.items() if len(set(chosen)) > 1 and group in SEMANTIC_GROUPS]
    told = {key: [GONE if _absent(arm, key) else _text(v) for arm, v in zip(arms, values, strict=True)] for key, values in keys.items()}
    rows += [[key, *cells] for key, cells in told.items() if not _follows(key, cells)]
    words = [f"{len(rows) - MOST_KEYS} further keys are left out here; `kdrun show run=A` shows all of a run."] * (len(rows) > MOST_KEYS)
    words += ["None: the arms differ in their seeds alone."] * (not rows)
    words += [f"{GONE}: an option of this arm has no such setting."] * any(GONE in row for row in rows[:MOST_KEYS])
    table = Table(("key", *(arm.label for arm in arms)), rows[:MOST_KEYS], numbers=False)
    return Section("differences", "In what they differ", about, words, [table] if rows else [], data=keys)


def _follows(key: str, cells: Sequence[str]) -> bool:
    """Whether a difference is that of an option alone: a class, or what one network has and another lacks."""
    network = key.split(".")[0] in ("teacher", "student")
    return key.endswith("._target_") or (network and GONE in cells and len({*cells} - {GONE}) == 1)


def _absent(arm: Arm, key: str) -> bool:
    node: Any = arm.first.tree
    for word in key.split("."):
        if not isinstance(node, Mapping) or word not in node:
            return True
        node = node[word]
    return False


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# -- provenance ---------------------------------------------------------------------------------------------------


def provenance_section(board: Board) -> Section:
    about = "Where the numbers come from. A fact that is the same for all runs stands once."
    runs = [(f"{arm.name} seed {seed}", run) for arm in board.arms for seed, run in arm.runs.items()]
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("recipe", lambda r: str(r.composed.recipe or "none: parts named on the command line")),
        ("code", _code),
        ("data", _data),
        ("teacher", _teacher),
        ("kdrun, python", lambda r: _environment(r, "kdrun", "python")),
        ("packages", _packages),
        ("hardware", lambda r: str(_of(r, "environment", "hardware") or NOT_RECORDED)),
        ("platform", lambda r: str(_of(r, "environment", "platform") or NOT_RECORDED)),
        ("ranks", lambda r: str(r.provenance.get("ranks") or NOT_RECORDED)),
        ("finished", lambda r: str((r.summary or {}).get("finished", "not finished"))[:10]),
    ]
    rows = [[name, value] for name, get in facts for value in _each(runs, get)]
    by_arm = [
        [
            arm.label,
            ", ".join(map(str, arm.runs)),
            ", ".join(run.composed.hash() for run in arm.runs.values()),
            str(arm.first.folder.parent),
        ]
        for arm in board.arms
    ]
    tables = [
        Table(("fact", "value"), rows, numbers=False),
        Table(("arm", "seeds", "configuration hash of each seed", "folder"), by_arm, numbers=False),
    ]
    dirty = [name for name, run in runs if _of(run, "code", "dirty")]
    words = [
        f"{len(dirty)} of {len(runs)} runs were made from a working tree with changes that no commit holds: nobody can make them again."
    ] * bool(dirty)
    data = {
        name: {k: run.provenance.get(k) for k in ("code", "config_hash", "data", "teacher", "environment", "seed")} for name, run in runs
    }
    return Section("provenance", "Provenance", about, words, tables, data=data)


def _each(runs: Sequence[tuple[str, Run]], get: Callable[[Run], str]) -> list[str]:
    """One text where all say the same, else one for each value with the runs that have it."""
    found: dict[str, list[str]] = {}
    for name, run in runs:
        found.setdefault(get(run), []).append(name)
    if len(found) == 1:
        return list(found)
    return [f"{value} ({_named(names)})" for value, names in found.items()]


def _named(names: Sequence[str]) -> str:
    more = len(names) - MOST_RUNS_NAMED
    return ", ".join(names[:MOST_RUNS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _of(run: Run, *keys: str) -> Any:
    node: Any = run.provenance
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _code(run: Run) -> str:
    commit = _of(run, "code", "commit")
    if not commit:
        return NOT_RECORDED
    dirty = _of(run, "code", "dirty")
    changed = _of(run, "code", "changed") or []
    state = f"with uncommitted changes in {len(changed)} files" if dirty and changed else "with uncommitted changes" if dirty else "clean"
    return f"commit {str(commit)[:12]}, {state}"


def _data(run: Run) -> str:
    data = run.provenance.get("data")
    if not data:
        return NOT_RECORDED
    sizes = ", ".join(f"{n} {split}" for split, n in (data.get("sizes") or {}).items())
    return f"{data.get('name')}: {sizes}; fingerprint {str(data.get('fingerprint'))[:16]}"


def _teacher(run: Run) -> str:
    facts = (run.summary or {}).get("teacher") or run.provenance.get("teacher")
    if not facts:
        return (
            "none"
            if run.tree["teacher"].get("kind", "none") == "none"
            else f"{run.tree['teacher'].get('kind')}: no weights of its own are recorded"
        )
    told = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {str(v)[:16] if 'sha' in k else v}"
        for k, v in facts.items()
        if not isinstance(v, (dict, list))
    )
    return told or NOT_RECORDED


def _environment(run: Run, *keys: str) -> str:
    return ", ".join(str(_of(run, "environment", key) or NOT_RECORDED) for key in keys)


def _packages(run: Run) -> str:
    packages = _of(run, "environment", "packages")
    return ", ".join(f"{name} {version}" for name, version in packages.items()) if packages else NOT_RECORDED
