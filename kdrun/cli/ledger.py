"""kdrun ledger: what was measured beside what was published; `kdrun ledger rerun` measures a record again."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Quiet

app = typer.Typer(invoke_without_command=True)
Root = Annotated[str, typer.Option(help="The folder that holds ledger/.")]


class Family(StrEnum):
    image = "image"
    dense = "dense"
    graph = "graph"
    federated = "federated"
    cross_modal = "cross-modal"
    language = "language"
    diffusion = "diffusion"
    search = "search"
    theory = "theory"
    security = "security"


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


@app.callback()
def ledger(
    ctx: typer.Context,
    root: Root = "outputs",
    family: Annotated[Family | None, typer.Option(help="Only recipes of this family.")] = None,
    scale: Annotated[Scale | None, typer.Option(help="Only this scale.")] = None,
    verdict: Annotated[Verdict | None, typer.Option(help="Only this verdict.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the recipes that were never run.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of README.md.")] = False,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """List the recipes that were really run: published and measured value, interval, seeds, rivals, verdict, cost, commit."""
    if ctx.invoked_subcommand is not None:
        return
    from kdrun.ledger.rows import never_run, rows
    from kdrun.ledger.table import flat, to_markdown

    found = rows(Path(root), config_dir or [])
    if everything:
        found += never_run(found, config_dir or [])
    wanted = {"family": family, "scale": scale, "verdict": verdict}
    chosen = [r for r in found if all(value is None or _of(r, key) == value for key, value in wanted.items())]
    if json:
        from kdrun.cli.console import print_json

        print_json([flat(r) for r in chosen])
    elif markdown:
        print(to_markdown(chosen))
    else:
        _show(chosen, len(found))


@app.command("rerun")
def rerun(
    row: Annotated[str, typer.Argument(help="A record, as its file in ledger/ is called: kd_digits.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Where and how it runs: dataset.path=..., hardware=...")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Other seeds than the record's: 3, or [1,2].")] = None,
    root: Root = "outputs",
    config_dir: ConfigDir = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a record's arms and seeds again, with the present code, and hold every mean against it: equal, within the prediction interval,
    or different (exit code 3). The record stays as it is."""
    from kdrun.cli.rerun import rerun_record

    rerun_record(row, overrides or [], seeds, Path(root), config_dir or [], json, quiet)


def _of(record: dict[str, Any], key: str) -> Any:
    return record["verdict"]["name"] if key == "verdict" else record[key]


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
