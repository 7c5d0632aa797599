"""kdrun ls: what there is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json

if TYPE_CHECKING:
    from kdrun.config.paths import SearchPath


class What(StrEnum):
    recipes = "recipes"
    objectives = "objectives"
    teachers = "teachers"
    students = "students"
    datasets = "datasets"
    runs = "runs"


def ls(
    what: Annotated[What, typer.Argument(help="What to list.")] = What.recipes,
    root: Annotated[str, typer.Option(help="Where runs are kept (for `ls runs`).")] = "outputs",
    config_dir: ConfigDir = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only, one per line.")] = False,
) -> None:
    """List recipes, objectives, teachers, students, datasets or runs."""
    rows = (
        _runs(Path(root))
        if what is What.runs
        else _options(what.value.removesuffix("s") if what is not What.recipes else "recipes", config_dir or [])
    )
    if json:
        from kdrun.cli.console import print_json

        print_json(rows)
    elif quiet:
        for row in rows:
            print(row["name"])
    else:
        _table(what.value, rows)


def _options(group: str, config_dirs: list[str]) -> list[dict[str, Any]]:
    import yaml

    from kdrun.config.paths import SearchPath

    search = SearchPath.of(config_dirs)
    if group != "recipes":
        return [{"name": name, "about": _about(search, group, name)} for name in search.options(group)]
    rows = []
    for name, file in search.options(group).items():
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        paper = tree.get("paper") or {}
        told = f"{paper.get('title', '')} ({paper.get('year', '')})" if paper else ""
        rows.append({"name": name, "scale": tree.get("scale", "bench"), "paper": told, "about": tree.get("about", "")})
    return rows


def _about(search: SearchPath, group: str, name: str) -> str:
    """The first comment of an option's file, or of what it is made from: teacher=resnet20 is student=resnet20, a `_resnet`."""
    import yaml

    file = search.file(group, name)
    text = file.read_text(encoding="utf-8") if file is not None else ""
    comment = next((line for line in text.splitlines() if line.startswith("#")), "")
    parts = [part for part in (yaml.safe_load(text) or {}).get("defaults", []) if part != "_self_"]
    if comment or not parts:
        return comment.lstrip("# ").rstrip()
    last = parts[-1]
    other, part = next(iter(last.items())) if isinstance(last, dict) else (group, last)
    return _about(search, str(other).lstrip("/").partition("@")[0], str(part))


def _runs(root: Path) -> list[dict[str, Any]]:
    import json

    rows = []
    for origin in sorted([*root.glob("*/run.json"), *root.glob("*/*/run.json")]):
        folder, told = origin.parent, json.loads(origin.read_text(encoding="utf-8"))
        if folder.parent.name in ("teachers", "ledger"):
            continue
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
