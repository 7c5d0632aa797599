"""kdrun eval: measure a run, a checkpoint file or an export again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Overrides


def evaluate(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, a folder checkpoints/step-..., or a file with a student's weights."),
    ],
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Also time one sample on this machine.")] = True,
    json: Json = False,
) -> None:
    """Measure a student: accuracy, NLL, calibration, agreement with its teacher, size, FLOPs, latency.

    A run's folder, or anything inside it, brings its own configuration; a bare weights file needs recipe=NAME or the groups.
    """
    from kdrun.config.check import check, located
    from kdrun.config.compose import compose
    from kdrun.engine.records import load_run
    from kdrun.errors import Problem, Refused

    path = Path(what).resolve()
    if not path.exists():
        raise Refused(Problem("no such run, checkpoint or file", what, "command line", "`kdrun ls runs` lists the runs"))
    home = next((p for p in (path, *path.parents) if (p / "run.json").is_file()), None)
    if home is not None and not overrides:
        composed = load_run(home)
    elif home is not None:
        own = load_run(home)
        composed = compose([*own.overrides, *(overrides or [])], [*own.config_dirs, *(config_dir or [])], default_recipe=own.recipe)
    else:
        if not overrides:
            raise Refused(
                Problem(
                    "this file says nothing of its network and data", what, "command line", "add recipe=NAME, or dataset=... student=..."
                )
            )
        composed = compose(overrides, config_dir or [])
    check(composed)
    from kdrun.engine.measure import measure

    with located(composed):
        report = measure(composed, path, home, latency)
    if json:
        from kdrun.cli.console import print_json

        print_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from kdrun.cli.console import count, out

    console = out()
    console.print(f"[bold]{report['weights']}[/] on {report['data']}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for split in report["metrics"]:
        table.add_column(split, justify="right")
    names = list(dict.fromkeys(k for metrics in report["metrics"].values() for k in metrics))
    for name in names:
        table.add_row(name, *(f"{metrics[name]:.4g}" if name in metrics else "" for metrics in report["metrics"].values()))
    console.print(table)
    costs = Table(box=None, pad_edge=False)
    for column in ("", "parameters", "FLOPs", "latency, 1 sample"):
        costs.add_column(column, justify="left" if not column else "right")
    for name, row in report["cost"].items():
        time = f"{row['median_ms']:.2f} ms" if "median_ms" in row else ""
        costs.add_row(name, f"{row['parameters']:,}", count(row["flops"]), time)
    console.print(costs)
