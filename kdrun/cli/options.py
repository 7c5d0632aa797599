"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from kdrun.cli.complete import complete_override

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides: recipe=NAME, group=option, leaf=value.", autocompletion=complete_override)]
ConfigDir = Annotated[list[str] | None, typer.Option("--config-dir", help="A folder of your own with conf/<group>/*.yaml and recipes/*.yaml. May be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results, no progress.")]
