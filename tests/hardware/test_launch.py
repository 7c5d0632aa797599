"""Where a run happens: what is started, what its end means, which signals it gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kdrun.config.compose import Composed, compose
from kdrun.engine.records import read_json
from kdrun.engine.report import Reporter
from kdrun.errors import KdrunError, Problem, Refused, RunFailed
from kdrun.hardware import launch as launching
from kdrun.hardware import worker
from kdrun.hardware.launch import EXIT_FILE, in_ranks, launch, raise_again, run_to_end, torchrun_command, write_spec
from tests.conftest import Outcome
from tests.engine.running import assert_bit_equal, run, weights

RANKS = ["hardware=multi_gpu", "hardware.device=cpu"]


def composed(tiny: list[str], *overrides: str) -> Composed:
    return compose([*tiny, *overrides])


def test_torchrun_starts_as_many_ranks_as_asked_for(tiny: list[str]) -> None:
    command = torchrun_command(composed(tiny, *RANKS, "hardware.procs=3"))
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=3" in command
    assert command[-1] == "kdrun.hardware.worker"


def test_torchrun_starts_one_rank_per_gpu(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "--nproc-per-node=8" in torchrun_command(composed(tiny, "hardware=multi_gpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(Refused) as caught:
        torchrun_command(composed(tiny, "hardware=multi_gpu"))
    assert caught.value.problems[0].key == "hardware.procs"
    assert "hardware.procs=2" in caught.value.problems[0].remedy


def test_a_rank_runs_what_its_file_says(tiny: list[str], tmp_path: Path) -> None:
    """One worker by itself is the run: the resolved configuration travels, nothing is composed again."""
    run(tiny, tmp_path / "here")
    write_spec(composed(tiny), tmp_path / "there", False, tmp_path / "spec.json")
    assert worker.main(tmp_path / "spec.json") == 0
    assert not (tmp_path / EXIT_FILE).exists()
    assert_bit_equal(weights(tmp_path / "there"), weights(tmp_path / "here"))
    assert read_json(tmp_path / "there" / "run.json")["config_hash"] == composed(tiny).hash()


def test_a_refusal_travels_with_its_problems(tiny: list[str], tmp_path: Path) -> None:
    write_spec(composed(tiny, "objective=rkd"), tmp_path / "run", False, tmp_path / "spec.json")
    assert worker.main(tmp_path / "spec.json") == 2
    with pytest.raises(Refused) as caught:
        raise_again(read_json(tmp_path / EXIT_FILE))
    assert "features" in caught.value.problems[0].what
    assert caught.value.problems[0].remedy
    assert not (tmp_path / "run").exists()


def test_a_failure_travels_with_its_message_and_exit_code(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "trap").touch()
    poison = ["objective._target_=tests.engine.parts.Poisoned", f"objective.trap={tmp_path / 'trap'}", "run.allow=[tests]"]
    write_spec(composed(tiny, *poison), tmp_path / "run", False, tmp_path / "spec.json")
    assert worker.main(tmp_path / "spec.json") == 1
    with pytest.raises(KdrunError, match="not finite at step 1") as caught:
        raise_again(read_json(tmp_path / EXIT_FILE))
    assert caught.value.exit_code == 1


def test_an_exit_file_keeps_every_word_of_a_problem() -> None:
    problems = [Problem("what", "key", "where", "remedy"), Problem("other")]
    with pytest.raises(Refused) as caught:
        raise_again({"exit_code": 2, "message": "", "problems": [asdict(p) for p in problems]})
    assert caught.value.problems == problems


def test_a_rank_that_dies_without_a_word_leaves_the_end_of_its_log(tiny: list[str], tmp_path: Path) -> None:
    dying = [sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(7)"]
    with pytest.raises(RunFailed, match="last words"):
        in_ranks(composed(tiny, *RANKS, "hardware.procs=2"), tmp_path / "run", False, dying)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on_to_the_ranks(number: signal.Signals) -> None:
    """Once, and to them alone: the command waits for their end and has their exit code."""
    child = (
        "import signal, sys, time\nseen = []\n"
        "for n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, lambda n, f: seen.append(n))\n"
        "print('ready', flush=True)\nend = time.monotonic() + 60\n"
        "while not seen and time.monotonic() < end: time.sleep(0.01)\n"
        "time.sleep(0.1)\nsys.exit(40 + len(seen) if seen[0] == int(sys.argv[1]) else 1)"
    )
    read, write = os.pipe()

    def send() -> None:
        os.read(read, 5)  # until it listens
        os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    sender = threading.Thread(target=send)
    sender.start()
    assert run_to_end([sys.executable, "-c", child, str(int(number))], stdout=write) == 41
    sender.join()
    os.close(read)
    os.close(write)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


@pytest.mark.parametrize("watched", [True, False])
def test_progress_of_the_ranks_is_shown_only_to_who_watches(
    watched: bool, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json or --quiet standard output belongs to the result."""
    from kdrun.cli.console import out
    from kdrun.cli.view import PlainReporter

    seen: list[object] = []

    def run_to_end(command: list[str], stdout: object, **options: object) -> int:
        seen.append(stdout)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(launching, "run_to_end", run_to_end)
    launch(composed(tiny, *RANKS, "hardware.procs=2"), PlainReporter(out()) if watched else Reporter(), tmp_path / "run")
    assert seen == [None if watched else subprocess.DEVNULL]


@pytest.mark.parametrize(
    ("settings", "key", "remedy"),
    [
        (["hardware=cpu", "hardware.procs=2"], "hardware.procs", "hardware=multi_gpu hardware.procs=2"),
        (RANKS, "hardware.procs", "hardware.procs=2"),
        ([*RANKS, "hardware.procs=2", "hardware.wrap=fsdp2", "optim.ema=0.9"], "optim.ema", "hardware.wrap=ddp"),
        ([*RANKS, "hardware.procs=2", "hardware.micro_batch=[20,12]"], "hardware.micro_batch", "make them add up"),
    ],
)
def test_hardware_that_cannot_be_is_refused(
    settings: list[str], key: str, remedy: str, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    started = time.monotonic()
    refused = kdrun("train", *tiny, *settings, f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert f"{key}: " in refused.err
    assert remedy in refused.err
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 30  # no rank was started for it
