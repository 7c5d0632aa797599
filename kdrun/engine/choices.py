"""How each network of a stage is computed: memory format, precision, compiled or not; as asked, or as it measured on this machine.

What is `auto` is tried on the stage's own first steps, whose every trace is then taken back, and chosen network by network. What was
found is kept: in the stage's folder, so that a resume computes as the run did, and beside the compiled code, so that the next run of
the same networks on this machine does too.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kdrun.config.paths import kept
from kdrun.engine import loop
from kdrun.engine.device import DTYPES, settle
from kdrun.engine.records import read_json, write_json
from kdrun.engine.report import Reporter
from kdrun.errors import RunFailed
from kdrun.strict_json import to_json
from kdrun.teacher.follower import Follower
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Needs, Progress, Signal, Teacher, Writes

if TYPE_CHECKING:
    from kdrun.engine.build import Built

FILE = "choices.json"
LEAST_STEPS = 500  # of a stage that is worth measuring: trying all ways takes some 30 of them
LEAST_SECONDS = 240.0  # that a stage takes uncompiled before compiling is tried: it costs about a minute and saves about a quarter
GAIN = 0.95  # of a way's time at most, for another to be chosen
WARM_UP, TIMED = 2, 4  # steps of every way; the fastest counts, since whatever else the machine does only ever adds


class Way(NamedTuple):
    """How one network is computed."""

    channels_last: bool
    compiled: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return ("compiled" if self.compiled else "eager") + (", channels last" if self.channels_last else "")


class Choice(NamedTuple):
    student: Way
    teacher: Way
    dtype: str  # key of DTYPES
    reason: str


class Seconds(NamedTuple):
    """Of one optimiser step."""

    teacher: float
    rest: float

    @property
    def step(self) -> float:
        return self.teacher + self.rest


def choose(stage: loop.Stage, built: Built, tree: Mapping[str, Any], reporter: Reporter, folder: Path | None) -> Choice:
    """What the stage in `folder` runs with; told in one line. A stage at its step 0 that is long enough is measured."""
    hardware = tree["hardware"]
    if folder is not None and (folder / FILE).is_file():
        choice = _from_json(read_json(folder / FILE))
        reporter.note(f"{choice.reason} (as the run began)")
        return choice
    plain = _plain(hardware, built, stage.device)
    if not _open(hardware, built):
        choice = plain._replace(reason=f"compile {hardware['compile']}: as asked")
    elif not built.objective.compilable and hardware["compile"] != "off":
        choice = plain._replace(reason="compile off: this objective cannot be compiled")
    elif reason := _not_measured(stage):
        choice = plain._replace(reason=f"{_told(plain)}: {reason}")
    else:
        choice = _measured(stage, built, tree, plain, reporter)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FILE, _to_json(choice))
    reporter.note(choice.reason)
    return choice


def _plain(hardware: Mapping[str, Any], built: Built, device: torch.device) -> Choice:
    """What was asked; for `auto`, what is right for most: images channels last, float32, compiled on a GPU."""
    image = built.memory_format == torch.channels_last
    wanted = hardware["compile"] == "on" or (hardware["compile"] == "auto" and device.type == "cuda" and built.total_steps >= LEAST_STEPS)
    way = Way(image, wanted and built.objective.compilable)
    return Choice(way, way, "fp32" if hardware["dtype"] == "auto" else hardware["dtype"], "")


def _open(hardware: Mapping[str, Any], built: Built) -> bool:
    """Whether anything is left to this module."""
    image = built.memory_format == torch.channels_last
    return "auto" in (hardware["compile"], hardware["dtype"]) or (hardware["channels_last"] == "auto" and image)


def _not_measured(stage: loop.Stage) -> str:
    """Why a stage is not tried, or ""."""
    if isinstance(stage.source, Writes):
        return "not measured where the networks write"
    if stage.ranks.world > 1:
        return "not measured over several ranks"
    if stage.end < LEAST_STEPS:
        return f"{stage.end} steps are too few to try"
    return ""


def _told(choice: Choice) -> str:
    return f"compile {'on' if choice.student.compiled else 'off'}"


# -- measuring ----------------------------------------------------------------------------------------------------


def _measured(stage: loop.Stage, built: Built, tree: Mapping[str, Any], plain: Choice, reporter: Reporter) -> Choice:
    key = kept() / "choices" / f"{_key(stage, built, tree)}.json"
    if key.is_file():
        found = _from_json(read_json(key))
        return found._replace(reason=f"{found.reason} (measured before: {key})")
    trial = _Trial(stage, built)
    try:
        with _untouched(stage):
            choice, whole = _search(trial, tree["hardware"], plain, stage.end, reporter)
    except RunFailed as error:  # the run itself will say where
        return plain._replace(reason=f"{_told(plain)}: the first steps failed when they were tried ({str(error).splitlines()[0]})")
    finally:
        torch.compiler.reset()
    if whole:
        try:
            key.parent.mkdir(parents=True, exist_ok=True)
            write_json(key, _to_json(choice))
        except OSError:
            pass  # what cannot be kept is measured again
    return choice


def _search(trial: _Trial, hardware: Mapping[str, Any], plain: Choice, steps: int, reporter: Reporter) -> tuple[Choice, bool]:
    """(the choice, whether everything was tried): every way in every precision that is open, each network by itself."""
    start = plain._replace(student=plain.student._replace(compiled=False), teacher=plain.teacher._replace(compiled=False))
    base = trial.seconds(start)
    planned = base.step * steps
    if planned < LEAST_SECONDS:
        told = f"{steps:,} steps of {1000 * base.step:,.0f} ms are {planned:,.0f} s"
        return start._replace(reason=f"compile off: {told}, too few to repay compiling"), False
    formats = [plain.student.channels_last]
    if hardware["channels_last"] == "auto" and plain.student.channels_last:
        formats.append(False)
    ways = [Way(last, False) for last in formats]
    if hardware["compile"] != "off":
        reporter.note(f"compile auto: trying on the first steps ({steps:,} steps of {1000 * base.step:,.0f} ms are planned)")
        ways += [Way(last, True) for last in formats]
    began = time.perf_counter()
    found = {start.dtype: _best(trial, ways, start, base)}
    dtype = start.dtype
    if hardware["dtype"] == "auto":
        found["bf16"] = _best(trial, ways, start._replace(dtype="bf16"), None)
        dtype = "bf16" if found["bf16"].step < GAIN * found["fp32"].step else "fp32"
    best = found[dtype]
    choice = Choice(best.student[0], best.teacher[0], dtype, "")
    failures = [text for each in found.values() for text in each.failures]
    return choice._replace(reason=_reason(choice, base, best, time.perf_counter() - began, failures)), True


class _Found(NamedTuple):
    """The best way of each network in one precision, with its seconds of a step."""

    teacher: tuple[Way, float]
    student: tuple[Way, float]
    failures: list[str]

    @property
    def step(self) -> float:
        return self.teacher[1] + self.student[1]


def _best(trial: _Trial, ways: list[Way], start: Choice, base: Seconds | None) -> _Found:
    """`base`: what the first way takes, where that is known already."""
    found = _Found((ways[0], math.inf), (ways[0], math.inf), [])
    for way in ways:
        try:
            seconds = base if way == ways[0] and base is not None else trial.seconds(Choice(way, way, start.dtype, ""))
        except Exception as error:  # whatever a compiler raises, the eager way is left
            found.failures.append(f"{way}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
            continue
        if seconds.teacher < GAIN * found.teacher[1] or found.teacher[1] == math.inf:
            found = found._replace(teacher=(way, seconds.teacher))
        if seconds.rest < GAIN * found.student[1] or found.student[1] == math.inf:
            found = found._replace(student=(way, seconds.rest))
    return found


def _reason(choice: Choice, base: Seconds, best: _Found, spent: float, failures: list[str]) -> str:
    """The choice in words, with what it was measured to save."""
    each = (("teacher", base.teacher, best.teacher), ("student", base.rest, best.student))
    parts = [f"{who} {way} {1000 * before:,.1f} -> {1000 * after:,.1f} ms a step" for who, before, (way, after) in each if before > 0]
    failed = f"; {'; '.join(failures)}" if failures else ""
    return f"measured in {spent:,.0f} s: {choice.dtype}; " + "; ".join(parts) + failed


@dataclass
class _Trial:
    """The stage's own steps, computed in one way or another."""

    stage: loop.Stage
    built: Built
    heard: float = field(default=0.0, init=False)

    def seconds(self, choice: Choice) -> Seconds:
        """Of the fastest step."""
        torch.compiler.reset()
        apply(choice, self.stage, self.built)
        # What a cache holds is neither asked for nor filled: the networks are measured.
        self.stage.teacher = _Clocked(self.built.teacher, self)
        found = [self._step() for _ in range(WARM_UP + TIMED)][WARM_UP:]
        return Seconds(min(f.teacher for f in found), min(f.rest for f in found))

    def _step(self) -> Seconds:
        self.heard = 0.0
        settle(self.stage.device)
        began = time.perf_counter()
        loop.train_step(self.stage, loop.Unwatched())
        settle(self.stage.device)
        return Seconds(self.heard, time.perf_counter() - began - self.heard)


class _Clocked:
    """A teacher whose time is added up."""

    def __init__(self, teacher: Teacher, trial: _Trial) -> None:
        self._teacher, self._trial = teacher, trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        settle(self._trial.stage.device)
        began = time.perf_counter()
        said = self._teacher.signal(batch, needs)
        settle(self._trial.stage.device)
        self._trial.heard += time.perf_counter() - began
        return said

    def after_step(self, student: torch.nn.Module, progress: Progress) -> None:
        self._teacher.after_step(student, progress)


@contextmanager
def _untouched(stage: loop.Stage) -> Iterator[None]:
    """Whatever steps are made inside, the stage is afterwards as it was; what a resume brings back is brought back."""
    owners: dict[str, Any] = {"learner": stage.learner, "objective": stage.objective, "source": stage.source, "teacher": stage.teacher}
    owners |= {f"optimizer {phase}": optimizer for phase, optimizer in stage.optimizers.items()}
    owners |= {} if stage.ema is None else {"ema": stage.ema}
    saved = {name: copy.deepcopy(owner.state_dict()) for name, owner in owners.items()}
    teacher, step, trained = stage.teacher, stage.step, [(p, p.requires_grad) for p in stage.learner.parameters()]
    try:
        yield
    finally:
        for name, owner in owners.items():
            owner.load_state_dict(saved[name])
        stage.teacher, stage.step, stage.first_bad_step = teacher, step, None
        for parameter, wanted in trained:
            parameter.grad = None
            parameter.requires_grad_(wanted)


# -- doing it -----------------------------------------------------------------------------------------------------


def apply(choice: Choice, stage: loop.Stage, built: Built) -> None:
    """Put the networks into their formats and compile what is to be compiled."""
    teacher, image = built.teacher, built.memory_format == torch.channels_last
    if choice.student.compiled or choice.teacher.compiled:
        # Compiled code is kept by the class of a network, and its guards do not look at hooks: an earlier run in this process
        # (another arm of a comparison) would lend its taps to this one.
        torch.compiler.reset()
    if image and stage.ranks.world == 1:  # what is sharded stays as it was built
        built.learner.to(memory_format=choice.student.memory_format)
        if isinstance(teacher, LiveTeacher):
            teacher.module.to(memory_format=choice.teacher.memory_format)
    stage.forward = _compiled_student(choice.student, built.learner) if choice.student.compiled else built.learner
    stage.autocast = DTYPES[choice.dtype]
    if isinstance(teacher, (LiveTeacher, Follower)):
        fixed = image and stage.device.type == "cpu" and isinstance(teacher, LiveTeacher)
        teacher.way = choice.teacher
        teacher.forward = _compiled_teacher(choice.teacher, teacher.module, fixed) if choice.teacher.compiled else teacher.module


def _compiled_student(way: Way, learner: torch.nn.Module) -> Callable[..., Any]:
    compiled = torch.compile(learner)

    def forward(batch: Batch, signal: Signal, phase: str) -> Any:
        return compiled(batch._replace(inputs=_packed(batch.inputs, way)), signal, phase)

    return forward


def _compiled_teacher(way: Way, module: torch.nn.Module, fixed: bool) -> Callable[..., Any]:
    # As constants, weights that nothing changes are laid out for the CPU's convolutions and normalisation is folded into them. Of a
    # language model it would only keep a copy.
    compiled = torch.compile(module, options={"freezing": True}) if fixed else torch.compile(module)
    return lambda inputs, extra: compiled(_packed(inputs, way), extra)


def _packed(inputs: torch.Tensor, way: Way) -> torch.Tensor:
    """A compiled network does not look at its weights' format, only at its inputs'."""
    return inputs.contiguous(memory_format=torch.channels_last) if way.channels_last and inputs.dim() == 4 else inputs


# -- keeping it ---------------------------------------------------------------------------------------------------


def _key(stage: loop.Stage, built: Built, tree: Mapping[str, Any]) -> str:
    """Of everything that decides how fast a step is, but not of seeds and of what only counts steps."""
    asked = {
        "teacher": {k: v for k, v in tree["teacher"].items() if k not in ("checkpoint", "claim", "fit")},
        "student": {k: v for k, v in tree["student"].items() if k != "checkpoint"},
        "objective": dict(tree["objective"]),
        "batch": tree["source"].get("batch_size"),
        "hardware": {k: v for k, v in tree["hardware"].items() if k != "slurm"},
        "shape": [*built.data.input_shape, built.data.classes],
        "machine": [torch.__version__, platform.processor(), os.cpu_count(), torch.get_num_threads(), str(stage.device)],
    }
    return hashlib.sha256(to_json(asked).encode()).hexdigest()[:24]


def _to_json(choice: Choice) -> dict[str, Any]:
    return {"student": choice.student._asdict(), "teacher": choice.teacher._asdict(), "dtype": choice.dtype, "reason": choice.reason}


def _from_json(found: Mapping[str, Any]) -> Choice:
    return Choice(Way(**found["student"]), Way(**found["teacher"]), found["dtype"], found["reason"])
