"""kdrun new: the files that an objective, a recipe, a data set or a student of one's own begins as."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdrun.cli.options import Json


class Kind(StrEnum):
    objective = "objective"
    recipe = "recipe"
    dataset = "dataset"
    student = "student"


def new(
    kind: Annotated[Kind, typer.Argument(help="What to begin.")],
    name: Annotated[str, typer.Argument(help="Its name: small letters, digits and _.")],
    dir: Annotated[
        str, typer.Option("--dir", help="A folder of your own, for --config-dir; in a checkout of kdrun the files go where it has its own.")
    ] = ".",
    origin: Annotated[str | None, typer.Option("--from", help="A recipe that the new one begins as.")] = None,
    json: Json = False,
) -> None:
    """Write files that run at once and pass their own tests at once, and say how to use them. Nothing is overwritten."""
    from kdrun.new.scaffold import plan, write

    made = plan(kind.value, name, Path(dir).expanduser(), origin)
    write(made)
    if json:
        from kdrun.cli.console import print_json

        print_json({"files": [str(file) for file in made.files], "commands": made.commands})
        return
    for file in made.files:
        print(f"wrote  {file}")
    for command in made.commands:
        print(f"try    {command}")
