"""kdrun show: the composed configuration, where each leaf comes from, and what differs from another recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Overrides, default_recipe

TOLD_APART = ("paper", "about", "published", "claims", "notes", "rivals", "name", "scale")


def show(
    overrides: Overrides = None,
    diff: Annotated[str | None, typer.Option("--diff", help="Another recipe: show only what differs.")] = None,
    hash: Annotated[bool, typer.Option("--hash", help="Print the configuration's hash only.")] = False,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Show what a command line means: every setting with its origin. Imports no torch and builds nothing."""
    from kdrun.cli.console import out, print_json
    from kdrun.config.check import check
    from kdrun.config.compose import compose, flatten

    composed = compose(overrides or [], config_dir or [], default_recipe(overrides))
    check(composed, build=False)
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
        print_json(rows if other is None else {"differences": _differences(values, other)})
        return
    console = out()
    if other is not None:
        _show_difference(console, composed.recipe or "this", name, _differences(values, other))
        return
    _show_head(console, composed)
    _show_leaves(console, values, composed.origins)


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
