"""A run as a job on a Slurm cluster, through submitit (the library beneath Hydra's submitit launcher)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kdrun.config.compose import Composed
from kdrun.engine.records import ORIGIN, SUMMARY, read_json
from kdrun.engine.report import Reporter
from kdrun.errors import Problem, Refused, RunFailed
from kdrun.hardware.launch import EXIT_FILE, raise_again, write_spec

JOB = "job"  # the folder of what the scheduler leaves, in the run's


def submit(composed: Composed, reporter: Reporter, folder: Path, resume: bool) -> dict[str, Any]:
    """Submit the run; wait for its summary unless slurm.wait is false. `slurm.executor=local` runs it here, as a job.

    Raises `Refused` without submitit, and what the job raised.
    """
    job = start(composed, reporter, folder, resume)
    if not composed.tree["hardware"]["slurm"]["wait"]:
        return {"job": job.job_id, "folder": str(folder), "waiting": False}
    job.wait()
    return conclude(job, folder)


def start(composed: Composed, reporter: Reporter, folder: Path, resume: bool) -> Any:
    """Submit the run; submitit's handle of the job. Raises `Refused` without submitit."""
    try:
        import submitit
    except ImportError as error:
        raise Refused(
            Problem("submitting to a cluster needs the package submitit", "hardware", "", 'pip install "kdrun[cluster]"')
        ) from error
    slurm = composed.tree["hardware"]["slurm"]
    jobs = folder / JOB
    jobs.mkdir(parents=True, exist_ok=True)
    spec = jobs / "spec.json"
    (jobs / EXIT_FILE).unlink(missing_ok=True)
    write_spec(composed, folder, resume, spec)
    executor = submitit.AutoExecutor(folder=jobs, cluster=slurm["executor"])
    executor.update_parameters(**parameters(slurm, composed.recipe or "run"))
    ranks = 1 if slurm["executor"] == "local" else slurm["nodes"] * max(1, slurm["gpus_per_node"])
    job = executor.submit(run_rank, str(spec), ranks)
    reporter.note(f"job {job.job_id} submitted; its log: {jobs}")
    return job


def conclude(job: Any, folder: Path) -> dict[str, Any]:
    """The summary of a job that has ended. Raises what it raised."""
    jobs = folder / JOB
    if (jobs / EXIT_FILE).exists():
        outcome = read_json(jobs / EXIT_FILE)
        if not (folder / ORIGIN).exists():  # it was refused before it began: nothing is left behind
            shutil.rmtree(folder)
        raise_again(outcome)
    if not (folder / SUMMARY).exists():
        raise RunFailed(
            f"job {job.job_id} ended without a result; the end of its log:\n" + "\n".join((job.stderr() or "").splitlines()[-25:])
        )
    return dict(read_json(folder / SUMMARY))


def parameters(slurm: dict[str, Any], name: str) -> dict[str, Any]:
    """The scheduler's own words for what the hardware group says: one task a rank, one GPU a task."""
    found: dict[str, Any] = {"name": f"kdrun-{name}", "timeout_min": slurm["timeout_min"]}
    if slurm["executor"] == "slurm":
        ranks = max(1, slurm["gpus_per_node"])
        found |= {
            "nodes": slurm["nodes"],
            "tasks_per_node": ranks,
            "gpus_per_node": slurm["gpus_per_node"],
            "cpus_per_task": slurm["cpus_per_task"],
        }
        found |= {f"slurm_{k}": slurm[k] for k in ("partition", "account") if slurm[k]}
        if slurm["memory_gb"]:
            found["mem_gb"] = slurm["memory_gb"]
    return found


def run_rank(spec: str, ranks: int) -> int:
    """One task of the job. With several ranks the scheduler's environment becomes the one torch.distributed reads."""
    from kdrun.hardware.worker import main

    if ranks > 1:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export()
    return main(Path(spec))
