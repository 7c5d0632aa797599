"""Law 2 with real processes and real signals."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from kdrun.engine import state
from kdrun.engine.records import METRICS, SUMMARY
from tests.conftest import Outcome
from tests.engine.processes import count_lines, kdrun_process, wait_until
from tests.engine.running import assert_same_run, run, training_lines

# Long enough to be met in the middle; a checkpoint every other step, so that a kill may well fall into the writing of one.
LONG = [
    "dataset.n_train=960",
    "optim.epochs=10",
    "run.checkpoint_every=0.1",
    "evaluation.every_epochs=5",
    "optim.ema=0.99",
    "objective=pld",
]
STEPS = 300


def test_a_process_that_is_stopped_then_killed_at_random_is_resumed_to_the_same_bytes(
    tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base, folder = [*tiny, *LONG], tmp_path / "run"
    with kdrun_process("train", *base, f"run.dir={folder}", f"run.root={tmp_path / 'root'}", "--quiet") as child:
        wait_until(lambda: count_lines(folder / METRICS) > 10, child)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert f"go on with: kdrun resume {folder}" in err
    stopped = len(training_lines(folder))
    assert (state.newest(folder / "checkpoints") or [None])[0] == stopped < STEPS  # saved at the very step it stopped at

    wait = random.Random().uniform(0, 0.5)  # any moment will do: no moment may matter
    with kdrun_process("resume", str(folder), "--quiet") as child:
        wait_until(lambda: count_lines(folder / METRICS) > stopped + 20, child)
        time.sleep(wait)
        child.send_signal(signal.SIGSTOP)  # it holds still, and its folder, while a second process wants to work there
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        second = kdrun("resume", str(folder), "--quiet")
        assert second.code == 2
        assert "another process works in this run folder" in second.err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (folder / SUMMARY).exists()

    with kdrun_process("resume", str(folder), "--quiet") as child:
        _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    run(base, tmp_path / "unbroken")
    assert len(training_lines(folder)) == STEPS
    assert_same_run(folder, tmp_path / "unbroken")
