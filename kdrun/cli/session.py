"""What `train` and `resume` share: watch a run or a comparison, then show its number beside the published one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdrun.cli.console import out, print_json
from kdrun.cli.view import make_reporter
from kdrun.config.compose import Composed
from kdrun.engine.records import ORIGIN, held, open_folder, run_folder
from kdrun.engine.report import Reporter
from kdrun.errors import EXIT_STOPPED, KdrunError
from kdrun.hardware.launch import launch


def run_session(composed: Composed, json: bool, quiet: bool, folder: Path | None = None, resume: bool = False) -> None:
    """Run to the end and print the result. Everything that can be refused is refused before the folder exists."""
    from kdrun.config.check import located
    from kdrun.engine.compare import is_comparison
    from kdrun.engine.tracking import open_trackers

    ledger = composed.tree["run"]["ledger"]
    if ledger:
        from kdrun.ledger.record import must_be_recordable

        must_be_recordable(composed)
    with located(composed), make_reporter(json=json, quiet=quiet) as reporter:
        open_trackers(composed.tree)  # what they lack is said once, before the first of several runs
        if is_comparison(composed.tree) or ledger:  # a record is that of a comparison, be it of one arm and one seed
            document = run_comparison(composed, reporter, folder, resume)
        else:
            document = launch(composed, reporter, folder, resume)
    if json:
        print_json(document)
    else:
        from kdrun.cli.tables import show_comparison, show_run

        (show_comparison if "arms" in document else show_run)(out(), composed, document)


def run_comparison(composed: Composed, reporter: Reporter, folder: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """All arms and seeds, the comparison's document in its folder, and the record where run.ledger asks for one."""
    from kdrun.engine import compare
    from kdrun.engine.build import load_data
    from kdrun.engine.records import SUMMARY, read_json, write_json
    from kdrun.ledger.record import assess, check_claims, write_record

    check_claims(composed)
    folder = folder or run_folder(composed)
    listed = compare.jobs(composed, folder)
    # One process and one data set for all arms that agree on it; ranks and clusters load their own.
    data = load_data(composed.tree) if composed.tree["hardware"]["kind"] == "local" else None
    compare.try_out(listed, composed, data)
    with held(folder, fresh=not resume):
        if not resume:
            open_folder(folder, composed)
        todo = []
        for job in listed:
            if (job.folder / SUMMARY).is_file():
                reporter.note(f"kept: {job.arm}, seed {job.seed}")
            else:
                todo.append(job)
        for group in compare.packs(todo, composed.tree["run"]["packed"]):
            names = ", ".join(f"{job.arm}, seed {job.seed}" for job in group)
            reporter.note(f"[{listed.index(group[0]) + 1}/{len(listed)}] {names}")
            same = data if all(job.composed.tree["dataset"] == composed.tree["dataset"] for job in group) else None
            with _resumed_whole(folder):
                _carry_out(group, reporter, same)
            compare.write_comparison(folder, listed)
            reporter.brief = True
        document = assess(composed, listed, folder)
        write_json(folder / SUMMARY, document)
    if composed.tree["run"]["ledger"]:
        written = write_record(composed, document)
        reporter.note(f"ledger record: {written}")
    return read_json(folder / SUMMARY)


def _carry_out(group: list[Any], reporter: Reporter, data: Any) -> None:
    """One job, or several side by side. Raises the first failure of a pack when all its members have ended."""
    if len(group) == 1:
        job = group[0]
        launch(job.composed, reporter, job.folder, resume=(job.folder / ORIGIN).is_file(), data=data)
        return
    from kdrun.engine import packed

    members = packed.run_packed([packed.Job(j.composed, j.folder, (j.folder / ORIGIN).is_file()) for j in group], reporter, data)
    for member in members:
        if member.failure is not None:
            raise member.failure


@contextmanager
def _resumed_whole(folder: Path) -> Iterator[None]:
    """A comparison is resumed as a whole: say so where the run that was stopped names itself."""
    try:
        yield
    except KdrunError as error:
        if error.exit_code != EXIT_STOPPED:
            raise
        stopped = KdrunError(f"{str(error).partition(';')[0]}; go on with: kdrun resume {folder}")
        stopped.exit_code = EXIT_STOPPED
        raise stopped from error
