"""One training stage in its folder: build the loop's Stage, resume it, run it, keep its records."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdrun.engine import loop, shard, state
from kdrun.engine.build import Built, build_student_network, open_source
from kdrun.engine.caching import cached
from kdrun.engine.choices import apply, choose
from kdrun.engine.device import DTYPES, peak_memory_bytes
from kdrun.engine.diagnosis import Diagnosis, first_step
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import Evaluator
from kdrun.engine.forecast import Forecast
from kdrun.engine.loop import NotFinite, Stage
from kdrun.engine.optim import build_ema, build_optimizer, build_schedule, for_phase
from kdrun.engine.records import MetricsFile, write_json
from kdrun.engine.report import Reporter
from kdrun.errors import KdrunError
from kdrun.evaluation.protocol import best_epoch
from kdrun.teacher.follower import CurrentTeacher, EmaTeacher
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Hears, Signal, Start, Writes

DRY_STEPS = 2
ROWS_AT_ONCE = 500  # of the walk over the training rows before step 0
NUMBERS_AT_ONCE = 2**24  # of their inputs: fewer rows where they are large images
WARM_UP_STEPS = 10  # left out of the throughput: allocation, autotuning, compilation


class Stopped(KdrunError):
    """A signal asked to stop; the run is saved and can be resumed."""

    exit_code = 75


def make_stage(
    tree: Mapping[str, Any], built: Built, device: torch.device, ranks: Ranks, name: str, reporter: Reporter, folder: Path | None = None
) -> Stage:
    """The loop's view of a stage, at step 0; `folder` is where it is kept how its networks are computed."""
    hardware, optim, objective, learner = tree["hardware"], tree["optim"], built.objective, built.learner
    source = open_source(tree, built.data, device, ranks)
    if isinstance(source, Writes):
        teacher = built.teacher.network if isinstance(built.teacher, LiveTeacher) else None
        source.attach(built.network, teacher, built.total_steps, DTYPES[hardware["dtype"]])
    start_objective(built, device)
    ema = build_ema(built.network, optim["ema"])
    norms(learner, hardware, device, ranks, reporter)
    if ranks.world > 1 and hardware["wrap"] == "fsdp2":
        shard.shard(learner, ranks, device)
    optimizers, schedules = {}, {}
    for phase in objective.phases:
        parameters = [p for n, p in learner.named_parameters() if n.startswith(objective.trained_in(phase)) and p.requires_grad]
        of_phase = for_phase(optim, phase)
        optimizers[phase] = build_optimizer(parameters, of_phase)
        schedules[phase] = build_schedule(optimizers[phase], of_phase["schedule"], built.steps_per_epoch, built.total_steps)
    limit = DRY_STEPS if tree["run"]["dry"] else tree["run"]["max_steps"]
    stage = Stage(
        name=name,
        seed=tree["seed"],
        learner=learner,
        forward=learner,
        teacher=built.teacher,
        objective=objective,
        source=source,
        optimizers=optimizers,
        schedules=schedules,
        classes=built.data.classes,
        total_steps=built.total_steps,
        log_every=1 if tree["run"]["dry"] else tree["run"]["log_every"],
        device=device,
        ranks=ranks,
        autocast=DTYPES[hardware["dtype"]],
        clip_norm=optim["clip_norm"],
        clip_value=optim["clip_value"],
        ema=ema,
        last_step=limit,
    )
    choice = choose(stage, built, tree, reporter, folder)
    apply(choice, stage, built)
    if ranks.world > 1 and not shard.is_sharded(learner):
        # No phase of several gives every parameter a gradient, and neither does a step in which a connector's term has no weight.
        partial = len(objective.phases) > 1 or len(learner.connectors) > 0
        ids = [device.index] if device.type == "cuda" else None
        stage.forward = DistributedDataParallel(stage.forward, device_ids=ids, find_unused_parameters=partial)
    stage.teacher = cached({**tree, "hardware": {**hardware, "dtype": choice.dtype}}, built, ranks, reporter)
    return stage


def start_objective(built: Built, device: torch.device) -> None:
    """What the objective does before step 0, with the teacher's weights in place."""
    needs, teacher = built.objective.needs(), built.teacher

    def rows() -> Iterator[tuple[Batch, Signal]]:
        at_once = max(1, min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // max(1, math.prod(built.data.input_shape))))
        for batch in built.data.batches("train", at_once, device):
            yield batch, teacher.signal(batch, needs)

    network = teacher.network if isinstance(teacher, (LiveTeacher, EmaTeacher, CurrentTeacher)) else None
    built.objective.start(Start(built.network, network, rows), built.learner.connectors)


def norms(learner: nn.Module, hardware: Mapping[str, Any], device: torch.device, ranks: Ranks, reporter: Reporter) -> None:
    """Say where batch normalisation makes a result depend on how a batch is cut."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in learner.modules()):
        return
    if ranks.world > 1 and device.type != "cuda":
        reporter.note(
            "BatchNorm: its statistics are each rank's own on the CPU (SyncBatchNorm needs GPUs); results depend on the number of ranks"
        )
    elif hardware["micro_batch"] is not None:
        reporter.note("BatchNorm: its statistics are each micro-batch's own; results depend on hardware.micro_batch")


class StageRun:
    """The hooks around the loop for one stage: metrics, evaluation, checkpoints, signals."""

    def __init__(
        self, tree: Mapping[str, Any], built: Built, stage: Stage, folder: Path, reporter: Reporter, home: Path | None = None
    ) -> None:
        self.home = home or folder  # of the whole run, which is what is resumed
        self.tree, self.built, self.stage, self.folder, self.reporter = tree, built, stage, folder, reporter
        first = stage.ranks.first
        self.metrics = MetricsFile(folder, active=first)
        # A sharded student's forward is a collective: every rank must run every batch. The metrics are the same.
        share = Ranks() if shard.is_sharded(stage.learner) else stage.ranks
        self.evaluator = Evaluator(built.data, built.evaluation, built.teacher, stage.device, share)
        self.history: list[dict[str, Any]] = []
        self.checkpoints = folder / "checkpoints"
        per_epoch = built.steps_per_epoch
        self.save_every = max(1, round(tree["run"]["checkpoint_every"] * per_epoch))
        self.evaluate_every = max(1, round(built.evaluation.every_epochs * per_epoch))
        self.end = stage.total_steps if stage.last_step is None else min(stage.last_step, stage.total_steps)
        self.samples_per_step = int(tree["source"].get("batch_size") or len(built.data.split("train")))
        self.best: dict[str, Any] | None = None  # {"step", "weights"} of the best validation epoch, where that is the protocol
        self._stop = threading.Event()
        self.listens = True  # to signals that ask for a stop
        self._clock: tuple[float, int] | None = None
        self._last_saved = -1
        self._spent = (0.0, 0.0)
        self._began: tuple[float, float] | None = None
        self.rate: float | None = None  # samples per second
        self.tokens: int | None = None  # scored ones of the last logged step
        self._written: dict[str, float] = {}  # what the source's writing had cost before a resume
        self.forecast: Forecast | None = None  # of what the stage costs
        self.diagnosis = Diagnosis(folder, reporter, per_epoch, first)
        if tree["run"].get("diagnose"):
            stage.look = self.diagnosis

    # -- the loop's hooks -----------------------------------------------------------------------------------------

    def logged(self, step: int, record: dict[str, Any]) -> None:
        epoch = round(step / self.built.steps_per_epoch, 4)
        self.metrics.write({"stage": self.stage.name, "step": step, "epoch": epoch, **record, **self.written()})
        if step == 1 and not self.reporter.brief and len(self.stage.objective.phases) == 1:
            weights = self.stage.objective.weights(self.stage.progress)
            self.reporter.note(first_step(self.stage.name, record["terms"], weights, self.stage.classes, self.diagnosis.last))
        self._measure_rate(step)
        self.tokens = record.get("tokens")
        self.reporter.logged(self.stage.name, step, {**record, **self.speed(), "memory_bytes": peak_memory_bytes(self.stage.device)})

    def step_done(self, step: int) -> None:
        with self.forecast.between_steps(step) if self.forecast else nullcontext():
            self.reporter.step_done(self.stage.name, step)
            if step % self.evaluate_every == 0 or step == self.end:
                self.evaluate(step)
            if step % self.save_every == 0 or step == self.end:
                self.save(step)

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    # -- what they do ---------------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        """Go back to where a killed run left the stage, or to its beginning."""
        if resume and self.restore():
            self.diagnosis.cut(self.stage.step)
            return
        self.diagnosis.cut(0)
        self.metrics.cut(0)  # what a run that was killed before its first checkpoint left
        if isinstance(self.stage.source, Hears):
            self.stage.source.hear(self.evaluator.measure(self.network(), "validation"))

    def advance(self, until: int | None = None, save: bool = True) -> None:
        """Train to that step and `save` there, or to the end. Raises `Stopped` after a signal, `NotFinite` before a bad update."""
        whole = until is None
        if until is not None:
            self.stage.last_step = min(until, self.end)
        if whole:
            self.announce()
        previous = self._listen()
        self._began = (time.perf_counter(), time.process_time())
        try:
            finished = loop.train(self.stage, self)
        except NotFinite as error:
            if self.stage.ranks.first:
                write_json(self.folder / "not_finite.json", error.bundle)
            raise
        finally:
            self._spent, self._began = self.spent(), None
            for number, handler in previous.items():
                signal.signal(number, handler)
        if not finished:
            self.save(self.stage.step)
            raise Stopped(f"stopped at step {self.stage.step} of {self.end}; go on with: kdrun resume {self.home}")
        if whole:
            self.reporter.stage_done(self.stage.name)
        elif save:
            self.save(self.stage.step)

    def announce(self) -> None:
        """Tell whoever watches that the stage begins or goes on."""
        self.reporter.stage_started(self.stage.name, self.stage.step, self.end, self.built.steps_per_epoch, self.samples_per_step)

    def network(self) -> nn.Module:
        """The network that counts: the moving average if there is one."""
        return self.stage.ema.module if self.stage.ema is not None else self.built.network  # type: ignore[return-value]

    def take_best(self) -> None:
        """Put the weights of the best validation epoch into the network that counts, where the protocol is that epoch."""
        if self.best is not None:
            self.network().load_state_dict(self.best["weights"])

    def exported(self) -> nn.Module:
        """The network that counts, whole, on this process: what is saved for others. A collective where it is sharded."""
        if not shard.is_sharded(self.stage.learner):
            return self.network()
        whole = build_student_network({**self.tree, "student": {**self.tree["student"], "checkpoint": None}}, self.built.data)
        weights = shard.full_weights(self.built.network)
        if weights:  # the first rank's
            whole.load_state_dict(weights)
        return whole

    def evaluate(self, step: int) -> None:
        loop.assert_healthy(self.stage)
        epoch = step / self.built.steps_per_epoch
        results = self.evaluator.measure_all(self.network())
        if isinstance(self.stage.source, Hears):
            self.stage.source.hear(results["validation"])
        own = self.stage.objective.report()
        results = {split: {**values, **own} for split, values in results.items()}
        self.history.append({"step": step, "epoch": epoch, "validation": results.get("validation"), "test": results.get("test")})
        self._note_best(step)
        for split, values in results.items():
            self.metrics.write({"stage": self.stage.name, "step": step, "epoch": round(epoch, 4), "split": split, **values})
        self.reporter.evaluated(self.stage.name, epoch, results, step)

    def _note_best(self, step: int) -> None:
        """Keep the weights of the best validation epoch; stop the stage when its patience is at an end."""
        evaluation = self.built.evaluation
        if evaluation.protocol != "best_val" and evaluation.patience is None:
            return
        if all(math.isnan(entry["validation"].get(evaluation.primary, math.nan)) for entry in self.history):
            return
        best = best_epoch(self.history, "validation", evaluation.primary, ties=evaluation.ties)
        if evaluation.protocol == "best_val" and best["step"] == step and not shard.is_sharded(self.stage.learner):
            self.best = {"step": step, "weights": {k: v.detach().clone() for k, v in self.network().state_dict().items()}}
        waited = sum(entry["step"] > best["step"] for entry in self.history)
        if evaluation.patience is not None and waited >= evaluation.patience:
            self.reporter.note(f"{self.stage.name} stops at step {step}: no better {evaluation.primary} for {waited} evaluations")
            self.end = self.stage.last_step = step

    def save(self, step: int) -> None:
        loop.assert_healthy(self.stage)
        if step == self._last_saved:
            return
        content = self.state_dict()  # on every rank: shards are gathered here
        if self.stage.ranks.first:
            state.save(self.checkpoints, step, content, self.tree["run"]["keep"])
            self._measure_rate(step)
            writing = {"writing_seconds": self.stage.source.seconds()} if isinstance(self.stage.source, Writes) else {}
            self.metrics.write_timing({"step": step, **self.speed(), **writing, "memory_bytes": peak_memory_bytes(self.stage.device)})
        self._last_saved = step
        self.stage.ranks.barrier()

    def state_dict(self) -> dict[str, Any]:
        s = self.stage
        learner = shard.full_weights(s.learner) if shard.is_sharded(s.learner) else s.learner.state_dict()
        return {
            "learner": learner,
            "optimizers": {k: shard.optimizer_state(s.learner, o) for k, o in s.optimizers.items()},
            "ema": s.ema.state_dict() if s.ema is not None else None,
            "objective": s.objective.state_dict(),
            "source": s.source.state_dict(),
            "written": self.written(),
            "teacher": s.teacher.state_dict(),
            "history": self.history,
            "best": self.best,
            "end": self.end,
            "reads": self.evaluator.reads,
            "metrics_offset": self.metrics.offset(),
            "seconds": self.spent(),
        }

    def restore(self) -> bool:
        """Go back to the newest whole checkpoint; False where there is none."""
        found = state.newest(self.checkpoints)
        if found is None:
            self.reporter.note("no whole checkpoint is left: it starts from the beginning")
            return False
        step, saved, remarks = found
        for remark in remarks:
            self.reporter.note(remark)
        s = self.stage
        shard.load_weights(s.learner, saved["learner"])
        for phase, optimizer in s.optimizers.items():
            shard.load_optimizer(s.learner, optimizer, saved["optimizers"][phase])
        if s.ema is not None:
            s.ema.load_state_dict(saved["ema"])
        s.objective.load_state_dict(saved["objective"])
        s.source.load_state_dict(saved["source"])
        s.teacher.load_state_dict(saved["teacher"])
        s.step = self._last_saved = step
        self.history, self.evaluator.reads, self._spent = saved["history"], saved["reads"], saved["seconds"]
        self.best, self._written = saved["best"], saved["written"]
        if saved["end"] < self.end:  # its patience was at an end
            self.end = s.last_step = saved["end"]
        self.metrics.cut(saved["metrics_offset"])
        return True

    def spent(self) -> tuple[float, float]:
        """(seconds, CPU seconds) of this stage, those before a resume included. The second does not depend on what else runs."""
        if self._began is None:
            return self._spent
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        return self._spent[0] + wall, self._spent[1] + cpu

    def charge(self, seconds: float, cpu: float) -> None:
        """Count what was spent for this stage outside its own steps, or (negative) in them for others."""
        self._spent = self._spent[0] + seconds, self._spent[1] + cpu

    def written(self) -> dict[str, float]:
        """What a source that writes has written since step 0, over all ranks; a collective."""
        if not isinstance(self.stage.source, Writes):
            return {}
        own = self.stage.source.report()
        total = self.stage.ranks.sum(torch.tensor(list(own.values()), dtype=torch.float64, device=self.stage.device)).tolist()
        return {name: self._written.get(name, 0.0) + value for name, value in zip(own, total, strict=True)}

    def speed(self) -> dict[str, float | None]:
        """Samples and, of texts, scored tokens per second (those of the last logged step)."""
        tokens = {} if self.tokens is None else {"tokens_per_s": self.rate and self.rate / self.samples_per_step * self.tokens}
        return {"images_per_s": self.rate, **tokens}

    def _measure_rate(self, step: int) -> None:
        """Samples per second over the steps of this process, the first ones left out."""
        now = time.perf_counter()
        if self._clock is None:
            if step >= self.stage.step and step >= WARM_UP_STEPS:
                self._clock = (now, step)
        elif step > self._clock[1]:
            self.rate = (step - self._clock[1]) * self.samples_per_step / (now - self._clock[0])

    def _listen(self) -> dict[int, Any]:
        """SIGTERM and SIGINT ask for a stop at the next step; a second one is taken at its word."""
        if not self.listens or threading.current_thread() is not threading.main_thread():
            return {}

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        return {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
