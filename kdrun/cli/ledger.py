"""kdrun ledger: what was measured, beside what was published, with a verdict."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import Json


class Scale(StrEnum):
    paper = "paper"
    bench = "bench"


class Verdict(StrEnum):
    reproduced = "reproduced"
    better = "better"
    worse = "worse"
    direction_only = "direction only"
    underpowered = "underpowered"
    not_attempted = "not attempted"
    impossible_here = "impossible here"


def ledger(
    root: Annotated[str, typer.Option(help="The folder that holds ledger/.")] = "outputs",
    scale: Annotated[Scale | None, typer.Option(help="Only this scale.")] = None,
    verdict: Annotated[Verdict | None, typer.Option(help="Only this verdict.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of README.md.")] = False,
    json: Json = False,
) -> None:
    """List the recipes that were really run: published and measured value, interval, seeds, verdict, cost."""
    from kdrun.ledger.table import flat, read_ledger, to_markdown

    everything = read_ledger(Path(root))
    records = [r for r in everything if (scale is None or r["scale"] == scale) and (verdict is None or r["verdict"]["name"] == verdict)]
    if json:
        from kdrun.cli.console import print_json

        print_json([flat(r) for r in records])
    elif markdown:
        print(to_markdown(records))
    else:
        _show(records, len(everything))


def _show(records: list[dict[str, Any]], in_all: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import out
    from kdrun.ledger.table import COLUMNS, cells

    if in_all and not records:
        out().print(f"none of the {in_all} records is of this kind")
        return
    if not records:
        out().print("the ledger is empty; `kdrun train recipe=pld_bench run.ledger=true` adds a record")
        return
    for scale in ("paper", "bench"):
        chosen = [r for r in records if r["scale"] == scale]
        if not chosen:
            continue
        table = Table(title=f"{scale} scale", title_justify="left")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for record in chosen:
            table.add_row(*map(escape, cells(record)))
        out().print(table)
