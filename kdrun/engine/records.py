"""What a run leaves behind: its folder, its resolved configuration, its metrics, its summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from kdrun.config.compose import Composed
from kdrun.config.paths import importable
from kdrun.config.schema import with_new_keys
from kdrun.errors import CheckFailed, Problem, Refused
from kdrun.strict_json import to_json

STUDENT_FILE = "student.safetensors"
CONFIG, ORIGIN, METRICS, TIMING, SUMMARY = "config.yaml", "run.json", "metrics.jsonl", "timing.jsonl", "summary.json"
EVALUATION = "evaluation.json"  # by class and by confidence, of the student that is exported
DIAGNOSTICS = "diagnostics.jsonl"  # the terms at the logits, where run.diagnose asks for it
LOCK = ".lock"  # is there while a process works in the folder


def run_folder(composed: Composed) -> Path:
    """The folder that this run will use; nothing is created. Raises `Refused` where it cannot be used."""
    run = composed.tree["run"]
    if run["dir"]:
        folder = Path(run["dir"]).expanduser()
        if folder.exists() and (not folder.is_dir() or any(p.name != LOCK for p in folder.iterdir())):
            a_run = (folder / ORIGIN).is_file()
            remedy = f"kdrun resume {folder} goes on with it; another run.dir starts anew" if a_run else "choose another run.dir"
            raise Refused(Problem("the run folder exists already and is not empty", "run.dir", str(folder), remedy))
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(run["root"]) / (composed.recipe or "run") / f"{stamp}-{composed.hash()[:6]}"
        number = 1
        while folder.exists():
            number += 1
            folder = folder.with_name(f"{stamp}-{composed.hash()[:6]}-{number}")
    must_be_writable(folder)
    return folder.resolve()


def must_be_writable(folder: Path) -> None:
    """Raise `Refused` where a folder could not be made; nothing is made."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(
            Problem(
                "the run folder cannot be written", "run.dir", str(folder), "choose another run.dir or run.root, or mend the permissions"
            )
        )


@contextmanager
def held(folder: Path, fresh: bool) -> Iterator[None]:
    """Work in a run's folder, which is made, as the only process. The lock is the system's: it ends with its process, however that ends.

    A `fresh` folder is taken away again where the run is refused, or a check fails, with nothing but its configuration in it.
    Raises `Refused` where another process works there, or the folder cannot be written.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    lock = FileLock(str(folder / LOCK))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        remedy = f"wait until it ends or stop it, then: kdrun resume {folder}"
        raise Refused(Problem("another process works in this run folder", "run.dir", str(folder), remedy)) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    except (Refused, CheckFailed):
        if fresh:
            _take_away(folder, made)
        raise
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)  # before the release: the file is still this process's own
        lock.release()


def _take_away(folder: Path, made: Sequence[Path]) -> None:
    configuration = {CONFIG, ORIGIN, LOCK}
    if {p.name for p in folder.iterdir()} <= configuration:
        for name in configuration:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # of another run by now
            for path in made:
                path.rmdir()


def write_json(file: Path, value: Any) -> None:
    """Write whole or not at all."""
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def open_folder(folder: Path, composed: Composed) -> None:
    """Create the folder and put the resolved configuration into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(composed.tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
        write_json(folder / ORIGIN, to_document(composed))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> Refused:
    return Refused(Problem(f"the run folder cannot be written ({error.strerror})", "run.dir", str(folder), "choose another run.dir"))


def to_document(composed: Composed) -> dict[str, Any]:
    """A composed configuration as plain data, for run folders and for the ranks."""
    return {
        "tree": composed.tree,
        "origins": composed.origins,
        "choices": composed.choices,
        "recipe": composed.recipe,
        "overrides": composed.overrides,
        "config_dirs": composed.config_dirs,
        "config_hash": composed.hash(),
    }


def from_document(document: Mapping[str, Any]) -> Composed:
    keys = ("tree", "origins", "choices", "recipe", "overrides", "config_dirs")
    importable(document["config_dirs"])
    return Composed(**{k: document[k] for k in keys})


def load_run(folder: Path) -> Composed:
    """The configuration of an existing run. Raises `Refused` where the folder is not a run."""
    if not (folder / ORIGIN).is_file():
        raise Refused(Problem("this is not a run folder (it has no run.json)", "", str(folder), "`kdrun ls runs` lists the runs"))
    document = read_json(folder / ORIGIN)
    return from_document({**document, "tree": with_new_keys(document["tree"])})


class MetricsFile:
    """metrics.jsonl: one object per line, append only. Cut back to the checkpoint on resume, so that the file of a broken
    and resumed run equals that of an unbroken one; everything that depends on the clock goes to timing.jsonl."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.file, self.clock, self.active = folder / METRICS, folder / TIMING, active

    def offset(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def cut(self, offset: int) -> None:
        if self.active and self.file.exists():
            os.truncate(self.file, min(offset, self.offset()))

    def write(self, record: Mapping[str, Any]) -> None:
        self._append(self.file, record)

    def write_timing(self, record: Mapping[str, Any]) -> None:
        self._append(self.clock, record)

    def _append(self, file: Path, record: Mapping[str, Any]) -> None:
        if self.active:
            with open(file, "a", encoding="utf-8") as handle:
                handle.write(to_json(record) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
