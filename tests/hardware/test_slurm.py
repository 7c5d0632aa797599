"""A run as a job of a cluster; `executor=local` is the same path without one."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.config.compose import compose
from kdrun.engine.records import METRICS, SUMMARY, read_json
from kdrun.hardware.slurm import parameters
from tests.conftest import Outcome
from tests.engine.running import assert_bit_equal, run, run_killed, weights

SLURM = ["hardware=slurm", "hardware.device=cpu", "hardware.slurm.executor=local", "hardware.slurm.timeout_min=5"]
Command = Callable[..., Outcome]


def settings(tiny: list[str], *overrides: str) -> dict[str, Any]:
    return dict(compose([*tiny, "hardware=slurm", *overrides]).tree["hardware"]["slurm"])


def test_one_task_is_one_rank_with_one_gpu(tiny: list[str]) -> None:
    asked = settings(
        tiny, "hardware.slurm.nodes=2", "hardware.slurm.gpus_per_node=4", "hardware.slurm.partition=gpu", "hardware.slurm.memory_gb=64",
        "hardware.slurm.cpus_per_task=6", "hardware.slurm.timeout_min=90",
    )  # fmt: skip
    assert parameters(asked, "pld_cifar100") == {
        "name": "kdrun-pld_cifar100", "timeout_min": 90, "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 6,
        "slurm_partition": "gpu", "mem_gb": 64,
    }  # fmt: skip


def test_what_is_not_said_is_left_to_the_cluster(tiny: list[str]) -> None:
    found = parameters(settings(tiny, "hardware.slurm.gpus_per_node=0", "hardware.slurm.account=lab"), "run")
    assert found["tasks_per_node"] == 1
    assert found["gpus_per_node"] == 0
    assert found["slurm_account"] == "lab"
    assert not {"mem_gb", "slurm_partition"} & found.keys()


def test_a_job_in_this_machine_needs_no_words_of_a_cluster(tiny: list[str]) -> None:
    assert parameters(settings(tiny, "hardware.slurm.executor=local"), "run") == {"name": "kdrun-run", "timeout_min": 1440}


def test_without_submitit_it_is_refused_with_its_remedy(
    tiny: list[str], tmp_path: Path, kdrun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "submitit":
            raise ImportError("No module named 'submitit'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    refused = kdrun("train", *tiny, *SLURM, f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert "needs the package submitit" in refused.err
    assert 'pip install "kdrun[cluster]"' in refused.err
    assert not (tmp_path / "run").exists()


def test_a_job_trains_what_this_process_trains(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    pytest.importorskip("submitit")
    run(tiny, tmp_path / "here")
    done = kdrun("train", *tiny, *SLURM, f"run.dir={tmp_path / 'job'}", "--json")
    assert done.code == 0, done.err
    assert done.json == read_json(tmp_path / "job" / SUMMARY)
    assert_bit_equal(weights(tmp_path / "job"), weights(tmp_path / "here"))
    assert (tmp_path / "job" / METRICS).read_bytes() == (tmp_path / "here" / METRICS).read_bytes()


@pytest.mark.slow
def test_a_refusal_in_a_job_is_the_refusal_of_the_command(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    pytest.importorskip("submitit")
    refused = kdrun("train", *tiny, *SLURM, "objective=rkd", f"run.dir={tmp_path / 'job'}")
    assert refused.code == 2
    assert "features of the teacher" in refused.err
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_a_killed_job_is_resumed_as_a_job(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    pytest.importorskip("submitit")
    base = [*tiny, *SLURM]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 4)
    done = kdrun("resume", str(tmp_path / "run"), "--quiet")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "unbroken" / METRICS).read_bytes()
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))


@pytest.mark.slow
def test_a_job_that_is_not_waited_for_says_where_it_runs(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    pytest.importorskip("submitit")
    done = kdrun("train", *tiny, *SLURM, "hardware.slurm.wait=false", f"run.dir={tmp_path / 'job'}", "--json")
    assert done.code == 0, done.err
    assert done.json["waiting"] is False
    assert done.json["folder"] == str(tmp_path / "job")
    deadline = time.monotonic() + 60
    while not (tmp_path / "job" / SUMMARY).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
