"""A sweep that is killed at any moment goes on to the same runs; what fails, fails alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.engine.records import METRICS, SUMMARY
from tests.conftest import TINY, Outcome
from tests.engine.running import assert_same_run, run

Command = Callable[..., Outcome]
WORDS = [*TINY, "hardware.compile=off"]


def sweep(kdrun: Command, root: Path, *words: str) -> tuple[int, dict[str, Any]]:
    outcome = kdrun("sweep", *words, f"run.root={root}", "--json")
    return outcome.code, json.loads(outcome.out) if outcome.out.strip() else {"err": outcome.err}


def test_every_job_is_the_run_it_would_be_alone(kdrun: Command, tmp_path: Path) -> None:
    code, found = sweep(kdrun, tmp_path / "root", *WORDS, "objective=kd,pld", "seed=1,2")
    assert code == 0
    assert [job["status"] for job in found["jobs"]] == ["done"] * 4
    assert [(row["n"], row["arm"]) for row in sorted(found["leaderboard"], key=lambda r: r["arm"])] == [(2, "kd"), (2, "pld")]
    for job in found["jobs"]:
        alone = tmp_path / "alone" / job["id"]
        run([*WORDS, *(f"{k}={v}" for k, v in job["choices"].items())], alone)
        assert_same_run(Path(job["folder"]), alone)


def test_a_resumed_sweep_keeps_what_is_done_and_takes_new_values(kdrun: Command, tmp_path: Path) -> None:
    _, first = sweep(kdrun, tmp_path, *WORDS, "objective=kd", "seed=1,2", "--name", "mine")
    before = {job["id"]: (Path(job["folder"]) / METRICS).stat().st_mtime_ns for job in first["jobs"]}
    code, found = sweep(kdrun, tmp_path, "--resume", "mine", "objective=kd,ce", "seed=1,2")
    assert code == 0
    assert len(found["jobs"]) == 4
    after = {job["id"]: (Path(job["folder"]) / METRICS).stat().st_mtime_ns for job in found["jobs"]}
    assert {identity: after[identity] for identity in before} == before
    assert sweep(kdrun, tmp_path, "--resume", "last")[1]["jobs"] == found["jobs"]


def test_jobs_of_other_words_are_stale_and_left(kdrun: Command, tmp_path: Path) -> None:
    _, first = sweep(kdrun, tmp_path, *WORDS, "seed=1,2", "--name", "mine")
    _, found = sweep(kdrun, tmp_path, "--resume", "mine", "student.hidden=[4]")
    assert len(found["stale"]) == 2
    assert all((Path(job["folder"]) / SUMMARY).is_file() for job in [*first["jobs"], *found["jobs"]])
    assert {job["id"] for job in first["jobs"]}.isdisjoint(job["id"] for job in found["jobs"])


@pytest.mark.parametrize("how", ["--packed", "--alone"])
def test_a_job_that_fails_leaves_the_others_and_is_run_again_on_request(how: str, kdrun: Command, tmp_path: Path) -> None:
    code, found = sweep(kdrun, tmp_path, *WORDS, "optim.lr=0.1,1e30", "seed=1", "--name", "mine", how)
    status = {job["choices"]["optim.lr"]: job for job in found["jobs"]}
    assert code == 1
    assert status["0.1"]["status"] == "done"
    assert status["1e+30"]["status"] == "failed"
    assert "not finite" in status["1e+30"]["message"]
    table = kdrun("sweep", "--resume", "mine", f"run.root={tmp_path}")
    assert table.code == 1
    assert "1 failed are left (--retry runs them again)" in table.err
    assert "not finite" in table.out
    assert "started" in kdrun("sweep", "--resume", "mine", "--retry", f"run.root={tmp_path}").err


def test_faults_of_all_jobs_are_told_before_any_runs(kdrun: Command, tmp_path: Path) -> None:
    outcome = kdrun("sweep", *WORDS, "objective=kd,fitnt", "student.hidden=[8],[x]", f"run.root={tmp_path / 'root'}")
    assert outcome.code == 2
    assert "fitnet" in outcome.err
    assert not (tmp_path / "root").exists()


def test_twice_the_same_job_is_refused(kdrun: Command, tmp_path: Path) -> None:
    outcome = kdrun("sweep", *WORDS, "optim.lr=0.1,0.10", f"run.root={tmp_path}")
    assert outcome.code == 2
    assert "computes what" in outcome.err


def test_nothing_to_vary_is_refused(kdrun: Command, tmp_path: Path) -> None:
    outcome = kdrun("sweep", *WORDS, f"run.root={tmp_path}")
    assert outcome.code == 2
    assert "nothing varies" in outcome.err


def test_a_dry_sweep_lists_and_writes_nothing(kdrun: Command, tmp_path: Path) -> None:
    code, found = sweep(kdrun, tmp_path / "root", *WORDS, "seed=1,2", "--dry")
    assert code == 0
    assert [job["status"] for job in found["jobs"]] == ["pending", "pending"]
    assert not (tmp_path / "root").exists()


def begin(root: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kdrun", "sweep", *WORDS, *words, f"run.root={root}", "--name", "mine"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def worker_of(root: Path) -> int:
    """The process id of the sweep's worker, as /proc tells it."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{root}/sweeps/mine/logs" in (folder / "cmdline").read_text().replace("\0", " "):
                return int(folder.name)
        except OSError:
            continue
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "worker", "both", "asked"])
def test_a_killed_sweep_goes_on_to_the_same_runs(victim: str, kdrun: Command, tmp_path: Path) -> None:
    words = ["objective=kd,pld,ce", "seed=1,2", "optim.epochs=40"]
    root = tmp_path / "root"
    child = begin(root, *words)
    while not list(root.glob("sweeps/mine/jobs/*/checkpoints/*")) and child.poll() is None:
        time.sleep(0.05)
    worker = worker_of(root)
    assert worker
    if victim in ("worker", "both"):
        os.kill(worker, signal.SIGKILL)
    if victim in ("parent", "both"):
        child.kill()
    if victim == "asked":
        child.terminate()
    child.communicate()
    if victim == "asked":
        assert child.returncode == 75
    if victim == "parent":  # its worker saves and stops
        while worker_of(root):
            time.sleep(0.05)
    code, found = sweep(kdrun, root, "--resume", "mine")
    assert code == 0
    assert [job["status"] for job in found["jobs"]] == ["done"] * 6
    for job in found["jobs"][:3]:
        alone = tmp_path / "alone" / job["id"]
        run([*WORDS, "optim.epochs=40", *(f"{k}={v}" for k, v in job["choices"].items())], alone)
        assert_same_run(Path(job["folder"]), alone)


@pytest.mark.slow
def test_jobs_on_a_cluster(kdrun: Command, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    words = [w for w in WORDS if w != "hardware=cpu"]
    code, found = sweep(kdrun, tmp_path, *words, "hardware=slurm", "hardware.slurm.executor=local", "objective=kd,ce", "seed=1")
    assert code == 0
    assert [job["status"] for job in found["jobs"]] == ["done"] * 2


def test_two_cannot_carry_out_one_sweep(kdrun: Command, tmp_path: Path) -> None:
    from filelock import FileLock

    sweep(kdrun, tmp_path, *WORDS, "seed=1,2", "--name", "mine")
    with FileLock(str(tmp_path / "sweeps" / "mine" / ".lock")):
        outcome = kdrun("sweep", "--resume", "mine", f"run.root={tmp_path}")
    assert outcome.code == 2
    assert "another process carries this sweep out" in outcome.err


RECIPE = """# @package _global_
defaults:
  - override /dataset: gaussians
  - override /teacher: truth
  - override /student: mlp
  - override /objective: kd
  - _self_
scale: bench
family: image
about: "A world of a test."
dataset: {classes: 6, superclasses: 3, n_train: 96, n_test: 60}
student: {hidden: [8]}
source: {batch_size: 32}
optim: {epochs: 2}
hardware: {threads: 1}
published: []
rivals: {ce: [objective=ce, teacher=none]}
claims: ["kd > ce"]
"""


def test_a_sweep_enters_the_ledger_when_all_its_jobs_are_done(kdrun: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipes").mkdir(parents=True)
    (tmp_path / "mine" / "recipes" / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    words = ["recipe=tiny", "objective=ce,kd,dkd", "seed=1,2,3", "--config-dir", str(tmp_path / "mine"), "--name", "first", "--ledger"]
    code, found = sweep(kdrun, tmp_path / "root", *words)
    assert code == 0
    record = json.loads(Path(found["record"]).read_text(encoding="utf-8"))
    assert Path(found["record"]).name == "tiny-first.json"
    assert (record["method"], sorted(record["arms"]), record["seeds"]) == ("kd", ["ce", "dkd", "kd"], [1, 2, 3])
    assert [claim["text"] for claim in record["claims"]] == ["kd > ce"]
    bad = kdrun("sweep", *words[:-3], "--name", "other", "--ledger", "optim.lr=0.1", f"run.root={tmp_path / 'root'}")
    assert bad.code == 3
    assert "optim.lr is set on the command line, not by the recipe" in bad.err
    assert not (tmp_path / "root" / "sweeps" / "other").exists()
