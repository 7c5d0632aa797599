"""The jobs of a sweep on a cluster: all are submitted, then waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kdrun.engine.records import write_json
from kdrun.engine.report import Reporter
from kdrun.errors import KdrunError
from kdrun.hardware.slurm import conclude, start
from kdrun.sweep.manifest import Job, Sweep

PAUSE = 2.0  # seconds between two questions to the scheduler


def submit_all(sweep: Sweep, jobs: list[Job], say: Callable[[str], None]) -> None:
    """Submit every job at once; the scheduler says which of them run when. Those that are not waited for (slurm.wait=false) are read by
    the next --resume."""
    handles: dict[str, tuple[Job, Any]] = {}
    for job in jobs:
        assert job.composed is not None
        handle = start(job.composed, Reporter(), sweep.place(job), sweep.begun(job))
        say(f"submitted as {handle.job_id}: {job.label}")
        handles[job.id] = job, handle
    if not all(job.composed.tree["hardware"]["slurm"]["wait"] for job in jobs if job.composed is not None):
        return
    while handles:
        time.sleep(PAUSE)
        for identity, (job, handle) in list(handles.items()):
            if handle.done():
                del handles[identity]
                _conclude(sweep, job, handle, say)
                sweep.write()


def _conclude(sweep: Sweep, job: Job, handle: Any, say: Callable[[str], None]) -> None:
    try:
        summary = conclude(handle, sweep.place(job))
    except KdrunError as error:
        file = sweep.failure(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"exit_code": error.exit_code, "message": str(error), "tail": (handle.stderr() or "").splitlines()[-25:]})
        say(f"failed: {job.label}: {str(error).splitlines()[0]}")
    else:
        done = sum(sweep.status(j) == "done" for j in sweep.jobs)
        say(f"[{done}/{len(sweep.jobs)}] {job.label}: {summary['metric']} {summary['value']:.4g}")
