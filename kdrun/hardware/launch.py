"""Where a run happens: in this process, in ranks on this machine (torchrun), or as a job on a cluster.

Ranks and jobs get the resolved configuration as a file: nobody composes a second time, so all of them run the same one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from kdrun.config.compose import Composed
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import SUMMARY, read_json, run_folder, to_document
from kdrun.engine.report import Reporter
from kdrun.engine.run import execute
from kdrun.errors import KdrunError, Problem, Refused, RunFailed

EXIT_FILE = "exit.json"


def launch(composed: Composed, reporter: Reporter, folder: Path | None = None, resume: bool = False, data: Any = None) -> dict[str, Any]:
    """Run one configuration where `hardware` says and return its summary. Raises what the run raises."""
    kind = composed.tree["hardware"]["kind"]
    if kind == "local" or "RANK" in os.environ:
        return _here(composed, reporter, folder, resume, data)
    folder = folder or run_folder(composed)
    if kind == "slurm":
        from kdrun.hardware.slurm import submit

        return submit(composed, reporter, folder, resume)
    return in_ranks(composed, folder, resume, torchrun_command(composed), watched=type(reporter) is not Reporter)


def _here(composed: Composed, reporter: Reporter, folder: Path | None, resume: bool, data: Any) -> dict[str, Any]:
    """In this process, or in the ranks that somebody's own torchrun has started."""
    ranks = Ranks.join()
    try:
        if ranks.world > 1:
            import torch.distributed as dist

            box = [str(folder or run_folder(composed))]
            dist.broadcast_object_list(box)  # the folder's name holds the time: rank 0 names it for all
            folder = Path(box[0])
        return execute(composed, reporter if ranks.first else Reporter(), folder, resume, ranks, data).summary
    finally:
        ranks.leave()


def torchrun_command(composed: Composed) -> list[str]:
    """torchrun on this machine, one rank per GPU unless hardware.procs says otherwise."""
    hardware = composed.tree["hardware"]
    procs = hardware["procs"]
    if procs is None:
        import torch

        procs = torch.cuda.device_count()
        if procs == 0:
            raise Refused(
                Problem(
                    "there is no usable GPU here, so the number of ranks must be said",
                    "hardware.procs",
                    "",
                    "hardware.procs=2 (two gloo ranks on the CPU), or hardware=cpu",
                )
            )
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={procs}",
        "--no-python",
        sys.executable,
        "-m",
        "kdrun.hardware.worker",
    ]


def write_spec(composed: Composed, folder: Path, resume: bool, spec: Path) -> None:
    """The file that tells a worker what to run."""
    spec.write_text(json.dumps({"composed": to_document(composed), "folder": str(folder), "resume": resume}), encoding="utf-8")


def in_ranks(composed: Composed, folder: Path, resume: bool, command: list[str], watched: bool = True) -> dict[str, Any]:
    """Run `command SPEC` and raise what its first rank raised, with its message and exit code. Progress is shown if `watched`."""
    with tempfile.TemporaryDirectory(prefix="kdrun-") as scratch:
        spec = Path(scratch) / "spec.json"
        write_spec(composed, folder, resume, spec)
        environment = {**os.environ, "KDRUN_DEVICE": composed.tree["hardware"]["device"]}
        environment.setdefault("OMP_NUM_THREADS", str(composed.tree["hardware"]["threads"] or max(1, (os.cpu_count() or 2) // 2)))
        # torchrun's patience with ranks that were told to stop: they ask at the logging cadence, then save.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
        errors = Path(scratch) / "stderr.txt"
        with open(errors, "w", encoding="utf-8") as log:
            code = run_to_end([*command, str(spec)], env=environment, stdout=None if watched else subprocess.DEVNULL, stderr=log)
        ended = Path(scratch) / EXIT_FILE
        outcome = read_json(ended) if ended.exists() else None
        if outcome is not None:
            raise_again(outcome)
        if code != 0:
            raise RunFailed("a rank failed; the end of its log:\n" + "\n".join(errors.read_text(encoding="utf-8").splitlines()[-25:]))
    return read_json(folder / SUMMARY)


def run_to_end(command: list[str], **options: Any) -> int:
    """Run a command and return its exit code; SIGTERM and SIGINT are handed on to it, so that its ranks save and stop.

    It has a session of its own: a terminal would send Ctrl-C to the ranks as well, and a second one ends them unsaved.
    """
    child = subprocess.Popen(command, start_new_session=True, **options)
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {n: signal.signal(n, lambda number, frame: child.send_signal(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_again(outcome: dict[str, Any]) -> None:
    """Turn a worker's exit file back into the error it stands for."""
    if outcome["problems"] is not None:
        raise Refused([Problem(**p) for p in outcome["problems"]])
    error = KdrunError(outcome["message"])
    error.exit_code = outcome["exit_code"]
    raise error
