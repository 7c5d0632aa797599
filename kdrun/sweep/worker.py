"""`python -m kdrun.sweep.worker SPEC`: some jobs of a sweep in a process of their own, alone or packed."""

from __future__ import annotations

import ctypes
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from kdrun.cli.view import make_reporter
from kdrun.engine.packed import Job, run_packed
from kdrun.engine.records import SUMMARY, from_document, read_json, write_json
from kdrun.engine.stage import Stopped
from kdrun.errors import KdrunError
from kdrun.hardware.launch import launch

SET_PARENT_DEATH_SIGNAL = 1  # prctl(2) on Linux


def main(spec: Path) -> int:
    """Carry the jobs out; why one failed is written where the specification says. 75 after a signal, else 0."""
    die_with_parent()
    jobs: list[dict[str, Any]] = read_json(spec)["jobs"]
    packed = [Job(from_document(job["composed"]), Path(job["folder"]), job["resume"]) for job in jobs]
    try:
        with make_reporter(json=False, quiet=False) as reporter:
            if len(packed) == 1:
                job = packed[0]
                try:
                    launch(job.composed, reporter, job.folder, job.resume)
                except Stopped:
                    raise
                except Exception as error:  # of one job: it is told, and the sweep goes on
                    note_failure(jobs[0], error)
                return 0
            for told, member in zip(jobs, run_packed(packed, reporter), strict=True):
                if member.failure is not None:
                    note_failure(told, member.failure)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def note_failure(job: dict[str, Any], error: Exception) -> None:
    """Beside the sweep, since a refused run leaves no folder."""
    if (Path(job["folder"]) / SUMMARY).is_file():
        return
    expected = isinstance(error, KdrunError)
    trace = [] if expected else traceback.format_exception(error)
    file = Path(job["failure"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {
        "exit_code": error.exit_code if isinstance(error, KdrunError) else 1,
        "message": str(error) if expected else f"{type(error).__name__}: {error}",
        "tail": "".join(trace).splitlines()[-25:],
    })  # fmt: skip
    print(f"failed: {error}", file=sys.stderr)


def die_with_parent() -> None:
    """A sweep that is killed outright takes its processes along: they save and stop. Only Linux knows how."""
    try:
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    except (OSError, AttributeError, TypeError):
        return


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
