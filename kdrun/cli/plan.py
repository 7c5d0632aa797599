"""kdrun plan: what a run will do and what it will cost, before it starts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Overrides, default_recipe


def plan(
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Time a few real steps on random inputs.")] = True,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Shapes, parameters, FLOPs, memory, steps and time of a run. Needs no data: inputs of the right shape are drawn."""
    from kdrun.config.check import check, located
    from kdrun.config.compose import compose

    composed = compose(overrides or [], config_dir or [], default_recipe(overrides))
    check(composed)
    from kdrun.engine.estimate import estimate

    with located(composed):
        document = estimate(composed, probe)
    if json:
        from kdrun.cli.console import print_json

        print_json(document)
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import count, out

    console = out()
    console.print(f"[bold]{document['title']}[/]", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("", "parameters", "FLOPs a sample", "output"):
        table.add_column(column, justify="left" if column in ("", "output") else "right")
    for name, row in document["models"].items():
        table.add_row(name, f"{row['parameters']:,}", count(row["flops"]), escape(row["output"]))
    console.print(table)
    for tap, shape in document["taps"].items():
        console.print(f"tap      {escape(f'{tap}: {shape}')}", soft_wrap=True)
    for name, text in document["facts"].items():
        console.print(f"{name:<9}{escape(text)}", soft_wrap=True)
