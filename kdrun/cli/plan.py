"""kdrun plan: what a run will do and what it will cost, before it starts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Overrides, default_recipe


def plan(
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Time a few real steps on random inputs.")] = True,
    detect: Annotated[float | None, typer.Option(help="How many seeds show a difference of so much, at 95 % confidence?")] = None,
    sd: Annotated[
        float | None, typer.Option(help="For --detect: standard deviation over seeds, of the paired differences or of one arm.")
    ] = None,
    power: Annotated[float, typer.Option(help="For --detect: the chance that the difference is found.")] = 0.8,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Shapes, parameters, FLOPs, memory, steps and time of a command, all arms and seeds. Needs no data: inputs of the right shape are
    drawn. With --detect and --sd also the seeds that a comparison needs; without a configuration those alone."""
    document = _seeds(detect, sd, power)
    if overrides or not document:
        from kdrun.config.check import check, located
        from kdrun.config.compose import compose

        composed = compose(overrides or [], config_dir or [], default_recipe(overrides))
        check(composed)
        from kdrun.engine.estimate import estimate

        with located(composed):
            document = estimate(composed, probe) | document
    if json:
        from kdrun.cli.console import print_json

        print_json(document)
    else:
        show_plan(document)


def _seeds(detect: float | None, sd: float | None, power: float) -> dict[str, Any]:
    """The seeds that are asked for, {} where none are."""
    if detect is None and sd is None:
        return {}
    from kdrun.errors import Problem, Refused

    if detect is None or sd is None:
        missing = "--sd" if sd is None else "--detect"
        raise Refused(Problem("the difference and its standard deviation are both needed", missing, "command line", f"{missing} NUMBER"))
    from kdrun.ledger.statistics import power_pairs, power_seeds

    try:
        needed = {"paired": power_pairs(detect, sd, power), "unpaired": power_seeds(detect, sd, power)}
    except ValueError as error:
        raise Refused(Problem(str(error), "--detect", "command line", "a larger difference, or less power")) from error
    return {"detect": {"difference": detect, "sd": sd, "power": power, "seeds": needed}}


def show_plan(document: dict[str, Any]) -> None:
    """The plan's document for people."""
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import count, out

    console = out()
    if "title" not in document:
        _show_seeds(document)
        return
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
    _show_seeds(document)


def _show_seeds(document: dict[str, Any]) -> None:
    """A line for each way to compare, with what it costs where that is known. A comparison has two arms at least."""
    from kdrun.cli.console import out

    asked = document.get("detect")
    if asked is None:
        return
    arms = max(2, len(document.get("arms", ())))
    spread = {"paired": "of the differences paired by seed", "unpaired": "of either arm"}
    for way, seeds in asked["seeds"].items():
        line = f"{seeds} seeds show a difference of {asked['difference']:g} where the standard deviation {spread[way]} is {asked['sd']:g}"
        if "seconds" in document:
            from kdrun.engine.costs import duration

            spent = document["seconds"]
            one = spent["seed"] if len(document["arms"]) > 1 else 2 * spent["run"]
            line += f"; {seeds} x {arms} runs: {duration(seeds * one + spent['teacher'])}"
        out().print(f"{way:<9}{line}", soft_wrap=True)
    out().print(
        f"         at 95 % confidence, found in {100 * asked['power']:g} % of such comparisons (t-tests, two-sided)", soft_wrap=True
    )
