"""kdrun ls: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json
from kdrun.config.paths import GROUPS
from kdrun.errors import Problem, Refused, did_you_mean

if TYPE_CHECKING:
    from kdrun.config.paths import SearchPath


# What `kdrun ls` lists, and the folder whose files that are; runs are no options.
ALONE = ("optim", "hardware", "cache", "track")  # words that are no plurals
KINDS = {"recipes": "recipes", **{group if group in ALONE else f"{group}s": group for group in GROUPS}, "runs": "", "sweeps": ""}


def ls(
    what: Annotated[str, typer.Argument(help="What to list: recipes, runs, or a group: objectives, teachers, students, ...")] = "recipes",
    root: Annotated[str, typer.Option(help="Where runs are kept (for `ls runs` and `ls sweeps`).")] = "outputs",
    config_dir: ConfigDir = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only, one per line.")] = False,
) -> None:
    """List recipes, runs, or the options of a group: objectives, teachers, students, datasets, sources, plans, evaluations, ..."""
    kind = _kind(what)
    rows = {"runs": _runs, "sweeps": _sweeps}[kind](Path(root)) if not KINDS[kind] else _options(KINDS[kind], config_dir or [])
    if json:
        from kdrun.cli.console import print_json

        print_json(rows)
    elif quiet:
        for row in rows:
            print(row["name"])
    else:
        _table(kind, rows)


def _kind(what: str) -> str:
    """Singular or plural. Raises `Refused` for what is not listed."""
    found = next((name for name in (what, f"{what}s", what.removesuffix("s")) if name in KINDS), None)
    if found is None:
        raise Refused(Problem("there is no such list", what, "command line", did_you_mean(what, KINDS)))
    return found


def _options(group: str, config_dirs: list[str]) -> list[dict[str, Any]]:
    from kdrun.config.files import load
    from kdrun.config.paths import SearchPath

    search = SearchPath.of(config_dirs)
    if group != "recipes":
        return [{"name": name, "about": _about(search, group, name)} for name in search.options(group)]
    rows = []
    for name, file in search.options(group).items():
        tree = load(file)
        paper = tree.get("paper") or {}
        told = f"{paper.get('title', '')} ({paper.get('year', '')})" if paper else ""
        rows.append({"name": name, "scale": tree.get("scale", "bench"), "paper": told, "about": tree.get("about", "")})
    return rows


def _about(search: SearchPath, group: str, name: str) -> str:
    """The first comment of an option's file, or of what it is made from: teacher=resnet20 is student=resnet20, a `_resnet`."""
    from kdrun.config.files import load

    file = search.file(group, name)
    if file is None:
        return ""
    comment = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")), "")
    parts = [] if comment else [part for part in load(file).get("defaults", []) if part != "_self_"]
    if comment or not parts:
        return comment.lstrip("# ").rstrip()
    last = parts[-1]
    other, part = next(iter(last.items())) if isinstance(last, dict) else (group, last)
    return _about(search, str(other).lstrip("/").partition("@")[0], str(part))


def run_folders(root: Path) -> list[Path]:
    """The folders of all runs, by recipe and time; a teacher that a run has trained is no run of anybody's."""
    found = sorted([*root.glob("*/run.json"), *root.glob("*/*/run.json")])
    return [origin.parent for origin in found if origin.parent.parent.name not in ("teachers", "ledger")]


def _runs(root: Path) -> list[dict[str, Any]]:
    import json

    rows = []
    for folder in run_folders(root):
        told = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) if (folder / "summary.json").is_file() else None
        rows.append(
            {
                "name": str(folder),
                "recipe": told["recipe"],
                "objective": told["choices"]["objective"],
                "state": _state(folder, summary),
                "result": _result(summary),
            }
        )
    return rows


def _sweeps(root: Path) -> list[dict[str, Any]]:
    import json
    from collections import Counter

    rows = []
    for file in sorted((root / "sweeps").glob("*/sweep.json"), key=lambda f: f.stat().st_mtime):
        told = json.loads(file.read_text(encoding="utf-8"))
        counts = Counter(job["status"] for job in told["jobs"])
        stands = ", ".join(f"{count} {status}" for status, count in counts.items())
        rows.append({"name": file.parent.name, "jobs": len(told["jobs"]), "state": stands, "words": " ".join(told["words"]["overrides"])})
    return rows


def _state(folder: Path, summary: dict[str, Any] | None) -> str:
    if summary is not None:
        return "tainted" if summary.get("tainted") else "done"
    return "resumable" if any(folder.rglob("checkpoints/step-*")) else "started"


def _result(summary: dict[str, Any] | None) -> str:
    from kdrun.ledger.table import number

    if summary is None:
        return ""
    metric = summary["metric"]
    if "arms" in summary:
        return "  ".join(f"{arm} {number(row[metric]['mean'], metric)}" for arm, row in summary["arms"].items())
    return f"{metric} {number(summary['value'], metric)}"


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import out

    if not rows:
        out().print(f"no {title} yet")
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, style="bold" if column == "name" else None, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*(escape(str(v)) for v in row.values()))
    out().print(table)
