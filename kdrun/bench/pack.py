"""Seconds of one optimiser step of several students: packed in one process, and each alone with a live teacher of its own.

`python -m kdrun.bench.pack CASE --steps N --members "A B" "C" --common X Y`: every member is what is common and its own overrides. The
time of a step is that of all members together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrun.bench.loop import WARM_UP, parts
from kdrun.engine import loop
from kdrun.engine.device import settle
from kdrun.engine.distributed import Ranks
from kdrun.engine.packed import Job, Member, share
from kdrun.engine.report import Reporter
from kdrun.engine.stage import StageRun, make_stage

CASES = ("separate", "packed")
PLAIN = "hardware.compile=off"  # as packed runs are computed


def member(overrides: Sequence[str], folder: Path) -> Member:
    """A student before its first step, with what packing asks of it."""
    tree, built, device = parts([*overrides, PLAIN])
    stage = make_stage(tree, built, device, Ranks(), "student", Reporter())
    folder.mkdir(parents=True)
    return Member(Job(None, folder), training=StageRun(tree, built, stage, folder, Reporter()))  # type: ignore[arg-type]


def measure(case: str, members: Sequence[str], common: Sequence[str], steps: int) -> dict[str, Any]:
    """The seconds of a step of all members."""
    with tempfile.TemporaryDirectory() as root:
        made = [member([*common, *own.split()], Path(root) / str(number)) for number, own in enumerate(members)]
        groups = [made] if case == "packed" else [[one] for one in made]
        seconds = sum(_walk(group, share(group) if case == "packed" else [], steps) for group in groups)
    return {"seconds": seconds / steps, "members": len(members)}


def _walk(group: Sequence[Member], memories: Sequence[Any], steps: int) -> float:
    stages = [one.training.stage for one in group if one.training is not None]
    started = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            settle(stages[0].device)
            started = time.perf_counter()
        for memory in memories:
            memory.begin(step)
        for stage in stages:
            loop.train_step(stage, loop.Unwatched())
    settle(stages[0].device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--members", nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--common", nargs="*", default=[])
    given = parser.parse_args()
    print(json.dumps({"case": given.case, **measure(given.case, given.members, given.common, given.steps)}))


if __name__ == "__main__":
    main()
