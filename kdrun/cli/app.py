"""The verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from kdrun.cli import bench, cache, doctor, evaluate, export, ledger, listing, new, plan, report, reproduce, resume, show, sweep, train
from kdrun.cli.pipe import Verbs

app = typer.Typer(
    name="kdrun",
    cls=Verbs,
    help="Knowledge distillation, one command an experiment. KEY=VALUE arguments are Hydra overrides: recipe=NAME chooses a recipe, "
    "every leaf can be set.",
    no_args_is_help=True,
    add_completion=False,  # `kdrun.cli.shells` says why
    rich_markup_mode=None,  # its panels would take twice the time of all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("sweep", short_help="Run many combinations; killed and resumed at will.")(sweep.sweep)
app.command("eval", short_help="Measure a run, a checkpoint or a student's weights.")(evaluate.evaluate)
app.command("export", short_help="Write a run's student for the world outside.")(export.export)
app.command("resume", short_help="Go on with a run that was stopped or killed.")(resume.resume)
app.command("new", short_help="Begin an objective, recipe, data set or student of your own.")(new.new)
app.command("ls", short_help="List recipes, runs, objectives, teachers, ...")(listing.ls)
app.command("show")(show.show)
app.command("plan")(plan.plan)
app.command("report", short_help="What runs have found, on a terminal, as a page, for a paper.")(report.report)
app.command("reproduce", short_help="Measure a recipe beside its rivals and add it to the ledger.")(reproduce.reproduce)
app.add_typer(ledger.app, name="ledger", short_help="List what was measured beside what was published.")
app.add_typer(cache.app, name="cache", short_help="What teachers have said, kept on disk.")
app.add_typer(bench.app, name="bench", short_help="Speed and memory on this machine.")
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    install_completion: Annotated[bool, typer.Option("--install-completion", help="Install tab completion for this shell.")] = False,
    show_completion: Annotated[bool, typer.Option("--show-completion", help="Print the script of tab completion instead.")] = False,
    shell: Annotated[str | None, typer.Option(help="bash, zsh or fish, where it is not the shell in which this runs.")] = None,
) -> None:
    if version:
        import kdrun

        typer.echo(f"kdrun {kdrun.__version__}")
    elif install_completion or show_completion:
        from kdrun.cli import shells

        (shells.install if install_completion else shells.show)(shell)
    else:
        return
    raise typer.Exit()
