"""kdrun sweep: many runs of one experiment, killed and resumed at will."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdrun.cli.options import ConfigDir, Json, Overrides, Quiet, default_recipe

if TYPE_CHECKING:
    from kdrun.sweep.manifest import Sweep


def sweep(
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a sweep: its name, its folder, or last. Further KEY=A,B are added to it.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: run failed jobs again.")] = False,
    zipped: Annotated[
        list[str] | None, typer.Option("--zip", help="KEY,KEY: these move together instead of all with all. May be repeated.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="A .csv or .tsv file: keys in its first line, a job in each further one.")] = None,
    name: Annotated[str | None, typer.Option(help="What the sweep is called; otherwise the time.")] = None,
    processes: Annotated[int, typer.Option("--processes", "-j", help="Processes at once.", min=1)] = 1,
    packed: Annotated[
        bool, typer.Option("--packed/--alone", help="Jobs on the same batches share a process and one forward pass of the teacher.")
    ] = True,
    pack_size: Annotated[int, typer.Option(help="Students that share a process, at most.", min=1)] = 16,
    ledger: Annotated[bool, typer.Option("--ledger", help="Write a record when all jobs are done.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="List the jobs and how they stand; run nothing.")] = False,
    config_dir: ConfigDir = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every combination of KEY=A,B  KEY=range(1,6)  KEY=choice(A,B)  GROUP=glob(*), Hydra's sweep grammar."""
    from kdrun.cli.console import err, print_json
    from kdrun.sweep.axes import Words, read_table
    from kdrun.sweep.manifest import Sweep, find, new_folder
    from kdrun.sweep.results import document, must_be_recordable, record

    words = Words(tuple(overrides or ()), tuple(zipped or ()), read_table(Path(table)) if table else ())
    root = _root(words.overrides)
    if resume is not None:
        made = Sweep.read(find(root, resume))
        made.words = _more(made.words, words)
    else:
        made = Sweep(new_folder(root, name), words, config_dir or [], default_recipe(overrides), packed)
    made.compose()
    _must_vary(made)
    if ledger:
        must_be_recordable(made)
    say = (lambda line: None) if quiet or json else (lambda line: err().print(line, soft_wrap=True, markup=False))
    if not dry:
        from kdrun.sweep.run import carry_out

        with made.held():
            made.write()
            say(f"sweep {made.folder.name}: {made.folder}")
            try:
                carry_out(made, say, processes, pack_size, retry)
            finally:
                made.write()
    found = document(made)
    if ledger and not dry:
        found["record"] = str(record(made))
    if json:
        print_json(found)
    else:
        _show(found)
    if not dry and any(job["status"] != "done" for job in found["jobs"]):
        raise typer.Exit(1)


def _root(overrides: tuple[str, ...]) -> Path:
    return Path(next((o.partition("=")[2] for o in overrides if o.startswith("run.root=")), "outputs"))


def _more(old: Any, new: Any) -> Any:
    """The words of a resumed sweep with what is said now: a key that is said again takes the place of what it was."""
    from kdrun.sweep.axes import Words

    again = {text.partition("=")[0] for text in new.overrides}
    kept = [text for text in old.overrides if text.partition("=")[0] not in again]
    return Words((*kept, *new.overrides), tuple(dict.fromkeys((*old.zipped, *new.zipped))), new.table or old.table)


def _must_vary(made: Sweep) -> None:
    from kdrun.errors import Problem, Refused

    if len(made.jobs) < 2 and not made.words.table:
        raise Refused(
            Problem("nothing varies", "", "command line", "e.g. objective=kd,dkd seed=range(1,4); kdrun train makes a single run")
        )


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import out
    from kdrun.ledger.table import number

    console, metric = out(), found["metric"]
    counts: dict[str, int] = {}
    for job in found["jobs"]:
        counts[job["status"]] = counts.get(job["status"], 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"\n[bold]sweep {escape(found['sweep'])}[/]: {len(found['jobs'])} jobs, {told}", soft_wrap=True)
    if found["leaderboard"]:
        table = Table()
        for heading in ("", "arm"):
            table.add_column(heading)
        for heading in ("n", f"{metric}", "95 % interval", "to the first", "95 % interval", "p", "CPU s a run"):
            table.add_column(heading, justify="right")
        table.add_column("alike")
        for row in found["leaderboard"]:
            cells = [
                str(row["rank"]),
                escape(row["arm"]),
                str(row["n"]),
                number(row["mean"], metric),
                _interval(row["low"], row["high"], metric),
            ]
            gap = "" if row["gap"] is None else number(row["gap"], metric, "+")
            p = "" if row["p"] is None else f"{row['p']:.2g}"
            cells += [gap, _interval(row["gap_low"], row["gap_high"], metric, "+"), p, f"{row['cpu_seconds']:,.0f}"]
            table.add_row(*cells, _letters(row["ties"]))
        console.print(table)
        console.print("Rows that share a letter cannot be told apart (5 %, p-values of all pairs corrected by Holm).", soft_wrap=True)
    _failures(console, [job for job in found["jobs"] if job["status"] == "failed"])
    if found["stale"]:
        console.print(
            f"{len(found['stale'])} earlier runs are of other words or another configuration; they are left where they are", soft_wrap=True
        )
    if "record" in found:
        console.print(f"ledger record: {found['record']}", soft_wrap=True)
    if counts.get("done", 0) < len(found["jobs"]):
        console.print(f"go on    kdrun sweep --resume {found['sweep']}", soft_wrap=True)
    console.print(f"report   kdrun report {found['folder']}", soft_wrap=True)


def _failures(console: Any, failed: list[dict[str, Any]]) -> None:
    """Each reason once, with the jobs that it ended and the end of the first one's log."""
    from rich.markup import escape

    reasons: dict[str, list[dict[str, Any]]] = {}
    for job in failed:
        reasons.setdefault(job["message"], []).append(job)
    for message, jobs in reasons.items():
        names = "; ".join(_label(job) for job in jobs[:3]) + (f" and {len(jobs) - 3} more" if len(jobs) > 3 else "")
        console.print(f"[bold red]failed[/] {escape(names)}: {escape(message)}", soft_wrap=True)
        for line in jobs[0]["tail"][-5:]:
            console.print(f"    {escape(line)}", soft_wrap=True, style="dim")


def _label(job: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in job["choices"].items())


def _letters(ties: Any) -> str:
    return ("," if any(len(t) > 1 for t in ties) else "").join(ties)


def _interval(low: float | None, high: float | None, metric: str, sign: str = "") -> str:
    from kdrun.ledger.table import number

    return "" if low is None or high is None else f"{number(low, metric, sign)} to {number(high, metric, sign)}"
