"""Carrying a sweep out: packs of jobs in processes of their own, or jobs on a cluster; what fails fails alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.engine.packed import listening
from kdrun.engine.records import read_json, to_document, write_json
from kdrun.errors import EXIT_STOPPED, KdrunError
from kdrun.sweep.manifest import Job, Sweep, packs

TAIL = 25  # lines of a log that tell why a process ended
PAUSE = 0.2  # seconds between two looks at the processes

Say = Callable[[str], None]


@dataclass
class Process:
    """Some jobs under way."""

    jobs: list[Job]
    log: Path
    child: subprocess.Popen[bytes]
    began: float = field(default_factory=time.perf_counter)


class SweepStopped(KdrunError):
    """A signal asked to stop; everything is saved."""

    exit_code = EXIT_STOPPED


def carry_out(sweep: Sweep, say: Say, processes: int = 1, largest: int = 16, retry: bool = False) -> None:
    """Run what is missing; `retry`: also what failed. Raises `SweepStopped` after a signal, with every running job saved."""
    todo = []
    for job in sweep.jobs:
        status = sweep.status(job)
        if status == "failed" and retry:
            sweep.failure(job).unlink()
            status = "pending"
        if status == "pending":
            todo.append(job)
        elif status == "running":
            say(f"running elsewhere: {job.label}")
    counts = {status: sum(sweep.status(job) == status for job in sweep.jobs) for status in ("done", "failed")}
    kept = f"{counts['done']} done are kept" if counts["done"] else "none is there yet"
    failed = f", {counts['failed']} failed are left (--retry runs them again)" if counts["failed"] else ""
    say(f"{len(sweep.jobs)} jobs: {kept}, {len(todo)} to run{failed}")
    if todo and todo[0].composed is not None and todo[0].composed.tree["hardware"]["kind"] == "slurm":
        from kdrun.sweep.cluster import submit_all

        submit_all(sweep, todo, say)
        return
    _Pool(sweep, say, processes, packs(todo, sweep.packed, largest)).run()


class _Pool:
    """So many processes at once, each with a pack."""

    def __init__(self, sweep: Sweep, say: Say, processes: int, waiting: list[list[Job]]) -> None:
        self.sweep, self.say, self.processes, self.waiting = sweep, say, processes, waiting
        self.running: list[Process] = []
        self.told: set[str] = set()
        self.number = sum(1 for _ in (sweep.folder / "logs").glob("*.log"))

    def run(self) -> None:
        with listening() as stopping:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.processes and not stopping.is_set():
                    self.running.append(self._start(self.waiting.pop(0)))
                time.sleep(PAUSE)
                self._look()
                if stopping.is_set():
                    self._stop()

    def _start(self, jobs: list[Job]) -> Process:
        self.number += 1
        log = self.sweep.folder / "logs" / f"{self.number:03d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        spec = log.with_suffix(".json")
        write_json(spec, {"jobs": [self._told_to(job) for job in jobs]})
        for job in jobs:
            self.sweep.failure(job).unlink(missing_ok=True)
        packed = f" ({len(jobs)} packed)" if len(jobs) > 1 else ""
        self.say(f"started{packed}: {', '.join(job.label for job in jobs)}")
        with open(log, "wb") as file:
            # A session of its own: a terminal's Ctrl-C reaches the sweep alone, which hands it on once.
            child = subprocess.Popen(
                [sys.executable, "-m", "kdrun.sweep.worker", str(spec)], stdout=file, stderr=file, start_new_session=True
            )
        return Process(jobs, log, child)

    def _told_to(self, job: Job) -> dict[str, Any]:
        assert job.composed is not None
        folder, failure = self.sweep.place(job), self.sweep.failure(job)
        return {"composed": to_document(job.composed), "folder": str(folder), "failure": str(failure), "resume": self.sweep.begun(job)}

    def _look(self) -> None:
        """Tell what has ended since the last look."""
        for process in list(self.running):
            ended = process.child.poll()
            for job in process.jobs:
                self._tell(job, process)
            if ended is not None:
                self.running.remove(process)
                self._ended(process, ended)
                self.sweep.write()

    def _tell(self, job: Job, process: Process) -> None:
        if job.id in self.told:
            return
        status = self.sweep.status(job)
        if status == "done":
            summary, place = self.sweep.summary(job), sum(self.sweep.status(j) == "done" for j in self.sweep.jobs)
            spent = time.perf_counter() - process.began
            self.say(f"[{place}/{len(self.sweep.jobs)}] {job.label}: {summary['metric']} {summary['value']:.4g} ({spent:,.0f} s)")
        elif status == "failed":
            self.say(f"failed: {job.label}: {read_json(self.sweep.failure(job))['message'].splitlines()[0]}")
        else:
            return
        self.told.add(job.id)

    def _ended(self, process: Process, code: int) -> None:
        """A process that ended without a word about a job: killed, out of memory, or torn down by a library."""
        silent = [job for job in process.jobs if self.sweep.status(job) in ("pending", "running")]
        if not silent or code == EXIT_STOPPED:
            return
        if len(process.jobs) > 1:
            self.say(f"a pack of {len(process.jobs)} ended ({_how(code)}): the {len(silent)} that are not done run one by one")
            self.waiting[:0] = [[job] for job in silent]
            return
        tail = process.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        for job in silent:
            file = self.sweep.failure(job)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"exit_code": 1, "message": f"its process ended ({_how(code)})", "tail": tail})
            self._tell(job, process)

    def _stop(self) -> None:
        for process in self.running:
            process.child.send_signal(signal.SIGTERM)
        for process in self.running:
            process.child.wait()
        self._look()
        self.sweep.write()
        raise SweepStopped(f"stopped; every job is saved. Go on with: kdrun sweep --resume {self.sweep.folder.name}")


def _how(code: int) -> str:
    return f"killed by signal {-code}: too little memory?" if code < 0 else f"exit status {code}"
