"""kdrun in a process of its own, which a test can signal and which cannot outlive it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds until a test gives up on a process


@contextmanager
def kdrun_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`kdrun ARGUMENTS`, its output in pipes. Asked to stop, then ended, if it is still there when the block is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kdrun", *arguments]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()  # handed on to ranks, which a kill would leave alone in the world
            try:
                child.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()


def kdrun_to_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A whole command. Fails rather than waits for ever."""
    with kdrun_process(*arguments) as child:
        out, err = child.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(arguments, child.returncode, out, err)


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    """Until the condition holds; an AssertionError if the process ends before, or it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
