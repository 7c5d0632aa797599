"""kdrun resume: go on with a run that was stopped or killed; same run, same configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdrun.cli.options import Json, Quiet


def resume(
    run: Annotated[str, typer.Argument(help="The run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run exactly where its newest whole checkpoint is."""
    from kdrun.engine.records import load_run
    from kdrun.errors import Problem, Refused

    if overrides:
        remedy = (
            f"kdrun resume {run} goes on unchanged; a new run from its weights: kdrun train ... plan.start_from={run} {' '.join(overrides)}"
        )
        raise Refused(Problem("a resumed run keeps its configuration", " ".join(overrides), "command line", remedy))
    folder = Path(run).resolve()
    composed = load_run(folder)
    from kdrun.cli.session import run_session

    run_session(composed, json=json, quiet=quiet, folder=folder, resume=True)
