"""kdrun ls: what there is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json


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
    from kdrun.config.paths import SearchPath

    return [{"name": name, **_describe(file, group)} for name, file in SearchPath.of(config_dirs).options(group).items()]


def _describe(file: Path, group: str) -> dict[str, Any]:
    import yaml

    text = file.read_text(encoding="utf-8")
    if group == "recipes":
        tree = yaml.safe_load(text) or {}
        paper = tree.get("paper") or {}
        return {
            "scale": tree.get("scale", ""),
            "paper": f"{paper.get('title', '')} ({paper.get('year', '')})",
            "about": tree.get("about", ""),
        }
    comments = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return {"about": comments[0] if comments else ""}


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
    if summary is None:
        return ""
    if "arms" in summary:
        return "  ".join(f"{arm} {row[summary['metric']]['mean']:.2f}" for arm, row in summary["arms"].items())
    return f"{summary['metric']} {summary['value']:.2f}"


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
