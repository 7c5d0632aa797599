"""kdrun reproduce: a recipe with its rivals over seeds under one budget, its plan first, its record in the ledger."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kdrun.cli.options import ConfigDir, Json, Quiet

if TYPE_CHECKING:
    from kdrun.config.compose import Composed

FEWEST = 3  # seeds where neither the recipe nor the command line names any: fewer get no verdict


def reproduce(
    recipe: Annotated[str, typer.Argument(help="The recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its pair or method (teacher=, student=, objective=), hardware=, run.*"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="The seeds 1 to N. Without it those of the recipe, or else 1 to 3.", min=1)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Show the plan and start nothing.")] = False,
    config_dir: ConfigDir = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a recipe beside its rivals over seeds and add the record to the ledger. Shows what it will cost, and asks on a terminal.
    Limited runs, subsets and settings that are not the recipe's are refused."""
    from kdrun.config.check import check, located
    from kdrun.config.compose import compose

    said = [f"recipe={recipe}", *(overrides or [])]
    _no_second_recipe(overrides or [])
    if seeds is not None:
        said.append(f"run.seeds={seeds}")
    elif not compose(said, config_dir or []).tree["run"]["seeds"]:
        said.append(f"run.seeds={FEWEST}")
    composed = compose([*said, "run.rivals=true", "run.ledger=true"], config_dir or [])
    check(composed)
    from kdrun.cli.plan import show_plan
    from kdrun.engine.estimate import estimate
    from kdrun.ledger.record import check_claims, must_be_recordable

    must_be_recordable(composed)
    check_claims(composed)
    with located(composed):
        document = estimate(composed, probe=True)
    if json and dry:
        from kdrun.cli.console import print_json

        print_json(document)
    elif not json:
        show_plan(document)
        _say_what_happens(composed)
    if dry or not (yes or json or not sys.stdin.isatty() or typer.confirm("start?")):
        return
    from kdrun.cli.session import run_session

    run_session(composed, json=json, quiet=quiet)


def _no_second_recipe(overrides: list[str]) -> None:
    from kdrun.errors import Problem, Refused

    twice = [o for o in overrides if o.lstrip("+~").partition("=")[0] in ("recipe", "run.ledger")]
    if twice:
        raise Refused([Problem("is what this verb sets itself", o, "command line", "leave it out") for o in twice])


def _say_what_happens(composed: Composed) -> None:
    """What will become of the ledger, and that uncommitted changes will be written into it."""
    from kdrun.cli.console import out
    from kdrun.engine.provenance import MOST_CHANGES, code
    from kdrun.engine.records import read_json
    from kdrun.ledger.record import record_file

    file = record_file(composed)
    if file.is_file():
        old = read_json(file)
        runs = old["arms"][old["method"]][old["metric"]]["n"]
        out().print(f"ledger   replaces {file} ({old['finished']}, n = {runs}, {old['verdict']['name']})", soft_wrap=True)
    else:
        out().print(f"ledger   adds {file}", soft_wrap=True)
    now = code()
    if now["dirty"]:
        changed = len(now["changed"])
        many = f"{changed} or more" if changed == MOST_CHANGES else str(changed)
        out().print(f"code     {many} uncommitted changes: the record will say so (dirty)", soft_wrap=True)
