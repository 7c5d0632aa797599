"""Several runs side by side in one process, on one stream of batches and one forward pass of the teacher.

Every member is an ordinary run in a folder of its own: its loop, optimiser, records, evaluations and checkpoints are those it would have
alone, and on a CPU so is every bit of them. They take their steps in turn; what they share is remembered for the length of a step.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.config.compose import Composed
from kdrun.dataset.base import Data
from kdrun.engine.distributed import Ranks
from kdrun.engine.report import Reporter
from kdrun.engine.run import opened
from kdrun.engine.session import Session
from kdrun.engine.stage import StageRun, Stopped
from kdrun.source.loader import EpochLoader
from kdrun.student.taps import Tapped
from kdrun.student.weights import bare
from kdrun.teacher.cached import CachedTeacher
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.shared import Clock, Heard, SharedTeacher
from kdrun.types import Batch

# What must be the same for two runs to see the same batches. Teachers may differ: those that are alike are asked once.
SHARED = ("seed", "dataset", "source", "hardware", "plan")


@dataclass(frozen=True)
class Job:
    """One run of a pack."""

    composed: Composed
    folder: Path
    resume: bool = False


@dataclass(eq=False)
class Member:
    """A job that is under way, or how it ended."""

    job: Job
    session: Session | None = None
    training: StageRun | None = None
    ending: ExitStack = field(default_factory=ExitStack)  # lets go of its folder
    failure: Exception | None = None
    summary: dict[str, Any] | None = None

    @property
    def active(self) -> bool:
        return self.failure is None and self.summary is None


def key(tree: Mapping[str, Any]) -> str | None:
    """Runs of one key can be packed; None for a run that cannot: one that is more than one student trained once, on batches that are a
    function of its seed and step, in this process; and compiled runs, which would have to share compiled code."""
    single = str(tree["plan"]["_target_"]).endswith(".Single") and not tree["plan"].get("start_from")
    loader = str(tree["source"]["_target_"]).endswith(".Loader")
    hardware = tree["hardware"]
    if not (single and loader and hardware["kind"] == "local" and hardware["compile"] == "off"):
        return None
    return json.dumps({name: tree[name] for name in SHARED}, sort_keys=True, default=str)


def run_packed(jobs: Sequence[Job], reporter: Reporter, data: Data | None = None) -> list[Member]:
    """Carry all out; how each ended, in their order: one that fails leaves the others alone. Raises `Stopped` after a signal, with every
    member saved."""
    members = [Member(job) for job in jobs]
    try:
        with listening() as stopping:
            for number, member in enumerate(members):
                _attempt(member, _begin, member, reporter if number == 0 else Reporter(), data)
            memories = share([m for m in members if m.active])
            _walk(members, memories, stopping)
            for member in members:
                if member.active:
                    _attempt(member, _finish, member, len(jobs))
    finally:
        for member in members:
            member.ending.close()
    return members


def _attempt(member: Member, do: Callable[..., None], *arguments: Any) -> None:
    """A fault ends this member alone; its folder is let go as that of a run that failed by itself."""
    try:
        do(*arguments)
    except Stopped:
        raise
    except Exception as error:  # whatever it is, the others go on
        member.failure = error
        with suppress(Exception):  # it is raised again on the way out
            member.ending.__exit__(type(error), error, error.__traceback__)


def _begin(member: Member, reporter: Reporter, data: Data | None) -> None:
    job = member.job
    session = member.ending.enter_context(opened(job.composed, reporter, job.folder, job.resume, Ranks(), data))
    built = session.build()
    session.ready_teacher(built)
    member.session, member.training = session, session.prepare(None, built)
    member.training.listens = False  # the pack does
    member.training.announce()


def _finish(member: Member, size: int) -> None:
    assert member.session is not None
    assert member.training is not None
    member.session.reporter.stage_done(member.training.stage.name)
    member.session.check_untouched(member.training.built)
    member.summary = member.session.finish(member.training, facts={"packed": size}).summary


def _walk(members: Sequence[Member], memories: Sequence[Any], stopping: threading.Event) -> None:
    """Step by step, those that are furthest behind first: after a kill some may be ahead of others."""
    clocks = [memory.clock for memory in memories]
    shared = [0.0, 0.0]
    while True:
        running = [m for m in members if m.active and m.training is not None and m.training.stage.step < m.training.end]
        if not running:
            break
        step = min(m.training.stage.step for m in running if m.training is not None)
        for memory in memories:
            memory.begin(step)
        for member in running:
            training = member.training
            assert training is not None
            if training.stage.step == step:
                _attempt(member, training.advance, step + 1, False)
                for clock in clocks:  # what is shared is nobody's own
                    seconds, cpu = clock.take()
                    training.charge(-seconds, -cpu)
                    shared[0] += seconds
                    shared[1] += cpu
        if stopping.is_set():
            _stop(running)
    sharers = [m.training for m in members if m.active and m.training is not None]
    for training in sharers:
        training.charge(shared[0] / len(sharers), shared[1] / len(sharers))


def _stop(running: Sequence[Member]) -> None:
    for member in running:
        if member.active and member.training is not None:
            member.training.save(member.training.stage.step)
    raise Stopped(f"stopped; {len(running)} packed runs are saved")


# -- what is shared -----------------------------------------------------------------------------------------------


class Batches:
    """The batches of one step, made once for all students that see the same ones."""

    def __init__(self, source: EpochLoader) -> None:
        self._make, self._step = source.group, -1
        self.clock = Clock()
        self._group: list[Batch] = []

    def begin(self, step: int) -> None:
        if step != self._step:
            self._step, self._group = step, []

    def group(self, step: int) -> list[Batch]:
        if step != self._step:
            return self._make(step)
        if not self._group:
            with self.clock.running():
                self._group = self._make(step)
        return list(self._group)


def share(members: Sequence[Member]) -> list[Any]:
    """Let the members hear and see together what is the same for them; the memories, which want to know of each new step."""
    trainings = [m.training for m in members if m.training is not None]
    memories: list[Any] = []
    sources = [t for t in trainings if isinstance(t.stage.source, EpochLoader)]
    if sources:
        batches = Batches(sources[0].stage.source)  # type: ignore[arg-type]
        memories.append(batches)
        for training in sources:
            training.stage.source.group = batches.group  # type: ignore[method-assign]
    for alike in _by_teacher(trainings).values():
        memories.append(_hear_together(alike))
    return memories


def _by_teacher(trainings: Sequence[StageRun]) -> dict[str, list[StageRun]]:
    """The students that have the same live teacher, computed in the same way."""
    found: dict[str, list[StageRun]] = {}
    for training in trainings:
        stage, teacher, asked = training.stage, training.built.teacher, training.built.objective.needs()
        if type(teacher) is not LiveTeacher or asked.teacher_network or not (asked.teacher_logits or asked.teacher_taps):
            continue
        name = json.dumps([training.tree["teacher"], str(stage.autocast), str(teacher.way)], sort_keys=True, default=str)
        found.setdefault(name, []).append(training)
    return found


def _hear_together(trainings: Sequence[StageRun]) -> Heard:
    """The first one's network for all, with every tap that any of them asks for; the other copies are let go."""
    first = trainings[0].built.teacher
    assert isinstance(first, LiveTeacher)
    taps = tuple(dict.fromkeys(tap for t in trainings for tap in t.built.objective.needs().teacher_taps))
    if len(trainings) > 1:
        whole = Tapped(bare(first.module), trainings[0].tree["teacher"].get("taps") or {}, taps, "teacher.taps").eval()
        first.module, first.forward = whole, whole
    heard = Heard(first, taps)
    for training in trainings:
        own = training.built.teacher
        assert isinstance(own, LiveTeacher)
        own.module, own.forward = first.module, first.forward
        ear = SharedTeacher(own, heard)
        if isinstance(training.stage.teacher, CachedTeacher):
            training.stage.teacher.live = ear  # type: ignore[assignment]
        else:
            training.stage.teacher = ear
    return heard


@contextmanager
def listening() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT ask for a stop after the step; a second one is taken at its word."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
