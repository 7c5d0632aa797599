"""kdrun show: the composed configuration, where each leaf comes from, and what differs from another recipe."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Overrides, default_recipe

TOLD_APART = ("paper", "about", "published", "claims", "notes", "rivals", "name", "scale", "family")


def show(
    overrides: Overrides = None,
    diff: Annotated[str | None, typer.Option("--diff", help="Another recipe: show only what differs.")] = None,
    hash: Annotated[bool, typer.Option("--hash", help="Print the configuration's hash only.")] = False,
    provenance: Annotated[
        bool,
        typer.Option("--provenance", help="Of run=NAME or ledger=NAME: code, configuration, data, teacher and environment of its number."),
    ] = False,
    root: Annotated[str, typer.Option(help="The folder that holds ledger/ and the runs.")] = "outputs",
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Show what a command line means: every setting with its origin; with run=FOLDER (or its name) what that run was, what came out and
    what it was expected to cost; with --provenance where its number comes from. Imports no torch and builds nothing."""
    if provenance or any(o.startswith("ledger=") for o in overrides or []):
        from kdrun.cli.provenance import show_provenance

        return show_provenance(overrides or [], Path(root), json)
    from kdrun.cli.console import out, print_json
    from kdrun.config.check import check
    from kdrun.config.compose import compose, flatten

    run = run_named(overrides or [], Path(root))
    if run is None:
        composed = compose(overrides or [], config_dir or [], default_recipe(overrides))
        check(composed, build=False)
    else:
        from kdrun.engine.records import load_run

        composed = load_run(run)
    if hash:
        print(composed.hash())
        return
    values = flatten(composed.tree)
    other: dict[str, Any] | None = None
    if diff:
        name = diff.removeprefix("recipe=")
        rest = [o for o in overrides or [] if not o.startswith("recipe=")]
        compared = compose([f"recipe={name}", *rest], config_dir or [])
        check(compared, build=False)
        other = flatten(compared.tree)
    if json:
        rows = {k: {"value": v, "origin": composed.origins.get(k, "")} for k, v in values.items()}
        shown = rows if run is None else {"folder": str(run), "summary": _summary(run), "settings": rows}
        print_json(shown if other is None else {"differences": _differences(values, other)})
        return
    console = out()
    if other is not None:
        _show_difference(console, composed.recipe or "this", name, _differences(values, other))
        return
    if run is None:
        _show_head(console, composed)
    else:
        _show_run(console, run, composed.recipe)
    _show_leaves(console, values, composed.origins)


def run_named(overrides: list[str], root: Path = Path("outputs")) -> Path | None:
    """The folder that run=... names, by its path or by its own name below `root`. Raises `Refused` where there is none."""
    named = [o.partition("=")[2] for o in overrides if o.startswith("run=")]
    if not named:
        return None
    from kdrun.cli.listing import run_folders
    from kdrun.errors import Problem, Refused, did_you_mean

    if len(overrides) > 1:
        other = " ".join(o for o in overrides if not o.startswith("run="))
        raise Refused(Problem("a run is what it was", other, "command line", "leave it out; or leave out run=..."))
    folder = Path(named[0])
    if (folder / "run.json").is_file():
        return folder
    known = {found.name: found for found in run_folders(root)}
    if named[0] not in known:
        raise Refused(Problem(f"there is no run '{named[0]}'", "run", "command line", did_you_mean(named[0], known) or "a run's folder"))
    return known[named[0]]


def _summary(run: Path) -> dict[str, Any] | None:
    file = run / "summary.json"
    found: dict[str, Any] | None = json_text.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def _show_run(console: Any, run: Path, recipe: str | None) -> None:
    """The number of a run and its cost, predicted and actual."""
    from rich.markup import escape

    from kdrun.ledger.forecasts import forecast_lines
    from kdrun.ledger.table import number

    console.print(f"[bold]{escape(str(run))}[/]: {escape(recipe or 'no recipe')}", soft_wrap=True)
    summary = _summary(run)
    if summary is None:
        console.print(f"not finished; kdrun resume {escape(str(run))} goes on with it", soft_wrap=True)
    elif "arms" in summary:
        metric = summary["metric"]
        means = ", ".join(f"{arm} {number(row[metric]['mean'], metric)}" for arm, row in summary["arms"].items() if metric in row)
        console.print(f"{metric}: {means}; each run of it is below {escape(str(run / 'arms'))}", soft_wrap=True)
    else:
        metric = summary["metric"]
        console.print(f"{metric} {number(summary['value'], metric)} ({escape(str(summary['how']))})", soft_wrap=True)
        for line in forecast_lines(summary):
            console.print(line, soft_wrap=True)
    console.print()


def _differences(values: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [k for k in (*values, *(k for k in other if k not in values)) if k.split(".")[0] not in TOLD_APART]
    return {k: (values.get(k), other.get(k)) for k in keys if values.get(k) != other.get(k)}


def _show_difference(console: Any, left: str, right: str, differences: dict[str, tuple[Any, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not differences:
        console.print(f"{left} and {right} are the same experiment")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("key", left, right):
        table.add_column(column, overflow="fold")
    for key, (a, b) in differences.items():
        table.add_row(key, escape(_text(a)), escape(_text(b)))
    console.print(table)


def _show_head(console: Any, composed: Any) -> None:
    """What a newcomer wants to know first: the paper, the equation, the published numbers, what is compared."""
    from rich.markup import escape

    from kdrun.config.paths import SearchPath

    tree = composed.tree
    paper = tree["paper"]
    if paper:
        console.print(
            f"[bold]{escape(paper['title'])}[/] ({escape(str(paper.get('venue') or ''))} {paper['year']}, arXiv {paper.get('arxiv')})",
            soft_wrap=True,
        )
    if tree["about"]:
        console.print(escape(tree["about"].strip()), soft_wrap=True)
    file = SearchPath.of(composed.config_dirs).file("objective", composed.choices["objective"])
    if file is not None:
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            console.print(f"[cyan]{escape(line.lstrip('# '))}[/]", soft_wrap=True)
    for table in tree["published"]:
        for row in table["rows"]:
            cells = "  ".join(f"{k} {v[0]} +- {v[1]}" if isinstance(v, list) else f"{k} {v}" for k, v in row.items() if k != "if")
            where = "; ".join([table["table"], table["metric"], *filter(None, [", ".join(row.get("if", []))])])
            console.print(f"published ({escape(where)}): {escape(cells)}", soft_wrap=True)
    for name in ("claims", "notes"):
        for line in tree[name]:
            console.print(f"{name[:-1]}: {escape(line)}", soft_wrap=True)
    if tree["rivals"]:
        console.print("rivals: " + ", ".join(f"{k} ({' '.join(v)})" for k, v in tree["rivals"].items()), soft_wrap=True)
    console.print()


def _show_leaves(console: Any, values: dict[str, Any], origins: dict[str, str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("origin", style="dim", no_wrap=True)
    for key, value in values.items():
        if key.split(".")[0] not in TOLD_APART:
            table.add_row(key, escape(_text(value)), escape(origins.get(key, "")))
    console.print(table)


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
