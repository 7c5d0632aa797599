"""Trackers beside whoever watches a run: they get the same numbers, and when one fails the run goes on without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdrun.config.check import instantiate
from kdrun.config.compose import Composed, flatten
from kdrun.config.targets import allowed
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import read_json, write_json
from kdrun.engine.report import Reporter, Reporters
from kdrun.errors import EXIT_STOPPED, KdrunError, Problem, Refused
from kdrun.track.base import Ending, Tracked, Tracker

TRACKED = "tracked.json"  # what finds the run again in its trackers


def open_trackers(tree: Mapping[str, Any]) -> dict[str, Tracker]:
    """The trackers that a configuration names; nothing is started. Raises `Refused` for a package that is not installed."""
    trackers: dict[str, Tracker] = {}
    problems: list[Problem] = []
    for name, node in (tree.get("track") or {}).items():
        trackers[name] = instantiate(node, f"track.{name}", allowed(tree))
        problems += trackers[name].missing(f"track.{name}")
    if problems:
        raise Refused(problems)
    return trackers


@contextmanager
def tracked(composed: Composed, title: str, folder: Path, reporter: Reporter, ranks: Ranks) -> Iterator[Reporter]:
    """The reporter of a run, with its trackers beside it on the first rank. `folder` is the run's own."""
    trackers = open_trackers(composed.tree) if ranks.first else {}
    if not trackers:
        yield reporter
        return
    watching = Tracking(trackers, reporter.note)
    watching.begin(composed, title, folder)
    how: Ending = "failed"
    try:
        yield Reporters(reporter, watching)
        how = "finished"
    except KdrunError as error:
        how = "stopped" if error.exit_code == EXIT_STOPPED else "failed"
        raise
    finally:
        watching.end(how)


class Tracking(Reporter):
    """Hands numbers to trackers. One that raises is told of once, and left out from there on."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._trackers, self._say = dict(trackers), say
        self._per_epoch: dict[str, int] = {}

    def _tell(self, do: Callable[[str, Tracker], Any]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(name, tracker)
            except Exception as error:  # whatever it is: no tracker is worth a run
                del self._trackers[name]
                reason = next(iter(str(error).strip().splitlines()), "")
                self._say(f"track={name} is left out from here on ({type(error).__name__}: {reason}); metrics.jsonl has all numbers")

    def begin(self, composed: Composed, title: str, folder: Path) -> None:
        """Open the run in every tracker, or go on with it, and keep what finds it again."""
        run, file = composed.tree["run"], folder / TRACKED
        kept = read_json(file) if file.is_file() else {}
        own = {key: value for key, value in flatten(composed.tree).items() if key.partition(".")[0] != "track"}
        # Of an arm of a comparison the end of the path is the seed alone.
        name = "-".join(folder.parts[-3:]) if folder.parent.parent.name == "arms" else folder.name

        def open_one(which: str, tracker: Tracker) -> None:
            told = Tracked(name, composed.recipe or "kdrun", title, folder, Path(run["root"]), own, kept.get(which, {}))
            facts = tracker.begin(told)
            kept[which] = facts
            self._say(f"{which:<9}{facts['where']}")

        self._tell(open_one)
        write_json(file, kept)

    def end(self, how: Ending) -> None:
        self._tell(lambda _, tracker: tracker.end(how))

    def stage_started(self, name: str, step: int, total_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        self._tell(lambda _, tracker: tracker.stage(name, step))

    def logged(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        before = f"{record['phase']}/" if "phase" in record else ""
        values = {f"{before}{key.replace('.', '/')}": value for key, value in flatten(record).items()}
        self._numbers(name, step, values)

    def evaluated(self, name: str, epoch: float, results: Mapping[str, Mapping[str, float]], step: int = 0) -> None:
        self._numbers(name, step, {f"{split}/{key}": value for split, values in results.items() for key, value in values.items()})

    def _numbers(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        plain = {key: float(value) for key, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        self._tell(lambda _, tracker: tracker.numbers(stage, step, plain))

    def run_done(self, summary: Mapping[str, Any]) -> None:
        leaves = flatten(summary)
        self._tell(lambda _, tracker: tracker.summary(leaves))
