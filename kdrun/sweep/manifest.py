"""A sweep's folder: what was asked, the jobs by the hash of what each computes, and how each of them stands.

outputs/sweeps/ID/sweep.json      the words, the jobs
outputs/sweeps/ID/jobs/...        a run each
outputs/sweeps/ID/failures/...    why a job failed
outputs/sweeps/ID/logs/...        what each process said
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from kdrun.config.check import check
from kdrun.config.compose import Composed, compose
from kdrun.config.paths import SearchPath
from kdrun.engine.packed import key
from kdrun.engine.records import LOCK, ORIGIN, SUMMARY, must_be_writable, read_json, write_json
from kdrun.errors import Problem, Refused
from kdrun.sweep.axes import Words, check_sweepable, expand

FILE = "sweep.json"
LONGEST = 60  # characters of a job's folder name beside its hash
Status = Literal["pending", "running", "done", "failed", "stale"]


@dataclass
class Job:
    """One run. Its `id` names what it computes: the configuration's hash, which leaves out where and how fast."""

    id: str
    choices: dict[str, str]
    folder: str  # below the sweep's
    composed: Composed | None = field(default=None, repr=False)  # None: of words that are no longer there

    @property
    def arm(self) -> str:
        """What it is called beside other seeds of the same: the values of all that varies but the seed."""
        return ", ".join(
            value if k in ("objective", "recipe", "student", "teacher") else f"{k}={value}"
            for k, value in self.choices.items()
            if k != "seed"
        )

    @property
    def label(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.choices.items()) or "the only job"

    @property
    def seed(self) -> int:
        assert self.composed is not None
        return int(self.composed.tree["seed"])


class Sweep:
    """A sweep in its folder."""

    def __init__(self, folder: Path, words: Words, config_dirs: Sequence[str], default_recipe: str | None, packed: bool) -> None:
        self.folder, self.words, self.config_dirs, self.default_recipe, self.packed = (
            folder,
            words,
            list(config_dirs),
            default_recipe,
            packed,
        )
        self.jobs: list[Job] = []
        self.stale: list[Job] = []  # of earlier words or an earlier configuration, finished or not

    # -- making and reading ---------------------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Raises `Refused` where there is none."""
        if not (folder / FILE).is_file():
            raise Refused(
                Problem("there is no sweep here", str(folder), "--resume", "kdrun ls sweeps lists them; --resume last is the newest")
            )
        told = read_json(folder / FILE)
        words = Words(tuple(told["words"]["overrides"]), tuple(told["words"]["zipped"]), tuple(told["words"]["table"]))
        sweep = cls(folder, words, told["config_dirs"], told["default_recipe"], told["packed"])
        sweep.jobs = [Job(j["id"], j["choices"], j["folder"]) for j in told["jobs"]]
        sweep.stale = [Job(j["id"], j["choices"], j["folder"]) for j in told["stale"]]
        return sweep

    def compose(self) -> None:
        """Expand the words and check every job; all faults of all jobs at once. Jobs that were there are known again by their hash.

        Raises `Refused`; nothing is written.
        """
        expanded = expand(self.words, SearchPath.of(self.config_dirs))
        check_sweepable(expanded.fixed)
        found: dict[str, Job] = {}
        problems: dict[str, Problem] = {}
        for choices in expanded.choices:
            try:
                job = self._job(expanded.fixed, choices)
            except Refused as refused:
                problems |= {str(p): p for p in refused.problems}
            else:
                if job.id in found:
                    problems[job.id] = Problem(f"computes what {found[job.id].label} does", job.label, "", "leave one of them out")
                found[job.id] = job
        if problems:
            raise Refused(list(problems.values()))
        known = {job.id: job for job in [*self.jobs, *self.stale]}
        for job in found.values():
            if job.id in known:
                job.folder = known[job.id].folder
        self.stale = [job for identity, job in known.items() if identity not in found]
        self.jobs = list(found.values())

    def _job(self, fixed: Sequence[str], choices: Mapping[str, str]) -> Job:
        own = [f"{k}={v}" for k, v in choices.items()]
        said = {text.partition("=")[0] for text in fixed}
        quiet = [] if "hardware.compile" in said or not self.packed else ["hardware.compile=off"]
        composed = compose([*fixed, *own, *quiet, "run.ledger=false"], self.config_dirs, self.default_recipe)
        check(composed)
        slug = re.sub(r"[^A-Za-z0-9.=+-]+", "_", "_".join(own))[:LONGEST].strip("_") or "job"
        identity = composed.hash()[:12]
        return Job(identity, dict(choices), f"jobs/{slug}-{identity[:6]}", composed)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = lambda job: {"id": job.id, "choices": job.choices, "folder": job.folder, "status": self.status(job)}  # noqa: E731
        document = {
            "words": asdict(self.words), "config_dirs": self.config_dirs, "default_recipe": self.default_recipe, "packed": self.packed,
            "jobs": [plain(job) for job in self.jobs], "stale": [{**plain(job), "status": "stale"} for job in self.stale],
        }  # fmt: skip
        write_json(self.folder / FILE, document)

    # -- how the jobs stand ---------------------------------------------------------------------------------------

    def place(self, job: Job) -> Path:
        return self.folder / job.folder

    def failure(self, job: Job) -> Path:
        return self.folder / "failures" / f"{job.id}.json"

    def status(self, job: Job) -> Status:
        """From what lies on disk: nothing else survives a kill."""
        folder = self.place(job)
        if (folder / SUMMARY).is_file():
            return "done" if read_json(folder / ORIGIN)["config_hash"][:12] == job.id else "stale"
        if _locked(folder / LOCK):
            return "running"
        return "failed" if self.failure(job).is_file() else "pending"

    def summary(self, job: Job) -> dict[str, Any]:
        return dict(read_json(self.place(job) / SUMMARY))

    def failure_told(self, job: Job) -> dict[str, Any]:
        """Why a job failed: {"exit_code", "message", "tail"}."""
        return dict(read_json(self.failure(job)))

    def begun(self, job: Job) -> bool:
        return (self.place(job) / ORIGIN).is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """As the only process that carries this sweep out. Raises `Refused` where another does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.folder / LOCK))
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            remedy = f"wait until it ends or stop it, then: kdrun sweep --resume {self.folder.name}"
            raise Refused(Problem("another process carries this sweep out", str(self.folder), "--resume", remedy)) from error
        try:
            yield
        finally:
            lock.release()


def packs(jobs: Sequence[Job], packed: bool, largest: int) -> list[list[Job]]:
    """The jobs that share a process: those that see the same batches, so many at most."""
    groups: dict[str, list[Job]] = {}
    for number, job in enumerate(jobs):
        assert job.composed is not None
        alike = key(job.composed.tree) if packed else None
        groups.setdefault(alike or f"alone {number}", []).append(job)
    return [group[at : at + largest] for group in groups.values() for at in range(0, len(group), largest)]


def new_folder(root: Path, name: str | None) -> Path:
    """outputs/sweeps/NAME, or the time. Raises `Refused` where it is taken or cannot be written."""
    sweeps = root / "sweeps"
    folder = sweeps / (name or time.strftime("%Y%m%d-%H%M%S"))
    number = 1
    while name is None and folder.exists():
        number += 1
        folder = folder.with_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    if (folder / FILE).exists():
        raise Refused(
            Problem("a sweep of this name is there already", name or "", "--name", f"kdrun sweep --resume {name}, or another name")
        )
    must_be_writable(folder)
    return folder.resolve()


def find(root: Path, which: str) -> Path:
    """The folder of a sweep by its name, its path, or `last`. Raises `Refused`."""
    listed = sweeps(root)
    if which == "last":
        if not listed:
            raise Refused(Problem(f"there is no sweep below {root / 'sweeps'}", which, "--resume", "kdrun sweep KEY=A,B begins one"))
        return listed[-1]
    for folder in (Path(which), root / "sweeps" / which):
        if (folder / FILE).is_file():
            return folder.resolve()
    from kdrun.errors import did_you_mean

    raise Refused(Problem(f"there is no sweep '{which}'", which, "--resume", did_you_mean(which, [f.name for f in listed])))


def sweeps(root: Path) -> list[Path]:
    """Folders of sweeps, the newest last."""
    found = [file.parent for file in (root / "sweeps").glob(f"*/{FILE}")]
    return sorted((f.resolve() for f in found), key=lambda f: (f / FILE).stat().st_mtime)


def _locked(file: Path) -> bool:
    if not file.is_file():
        return False
    lock = FileLock(str(file))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False
