"""The verbs."""

from __future__ import annotations

import typer

from kdrun.cli import bench, cache, doctor, evaluate, ledger, listing, plan, resume, show, train

app = typer.Typer(
    name="kdrun",
    help="Knowledge distillation, one command an experiment. KEY=VALUE arguments are Hydra overrides: recipe=NAME chooses a recipe, "
    "every leaf can be set.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("resume")(resume.resume)
app.command("ls")(listing.ls)
app.command("show")(show.show)
app.command("plan")(plan.plan)
app.command("ledger")(ledger.ledger)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(v)),
) -> None: ...


def _version(wanted: bool) -> None:
    if wanted:
        import kdrun

        typer.echo(f"kdrun {kdrun.__version__}")
        raise typer.Exit()
