"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_RECIPE = "pld_digits"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides: recipe=NAME, group=option, leaf=value."),
]
ConfigDir = Annotated[
    list[str] | None,
    typer.Option("--config-dir", help="A folder of your own with conf/<group>/*.yaml and recipes/*.yaml. May be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results, no progress.")]


def default_recipe(overrides: list[str] | None) -> str | None:
    """The recipe that a command line without one means: the first run of a newcomer, or none where parts are named instead."""
    named = {o.partition("=")[0] for o in overrides or []}
    return None if named & {"dataset", "student", "teacher"} else DEFAULT_RECIPE
