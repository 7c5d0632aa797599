"""Teachers that are the student itself: as it was at the end of the last epoch, or averaged over its steps.

Snapshot: the "model" memory of progressive self-distillation (Kim et al., ICCV 2021, arXiv 2006.12000). Average: the mean teacher
(Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780, Eq. 1), buffers averaged as the weights are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.student.taps import Tapped
from kdrun.teacher.context import beside_student, in_context
from kdrun.types import Batch, ModelSpec, Needs, Progress, Signal


class Follower:
    """A deep copy of the bare student, frozen, in evaluation mode whatever `train()` is called on it.

    `student` must carry no taps of its own yet: a copy would share their names. `taps` and `wanted` are as for `Tapped`.
    """

    follows = True
    way: object = None  # how it is computed (kdrun.engine.choices)
    privileged = False  # whether it reads a prompt of its own (kdrun.teacher.context)

    def __init__(self, student: nn.Module, spec: ModelSpec, taps: Mapping[str, str] | None = None, wanted: Iterable[str] = ()) -> None:
        # Tensors without content (a plan's) have no storage that could be copied: each is cloned, under its old name.
        tensors = [*student.parameters(), *student.buffers()]
        copies: dict[int, Any] = {
            id(t): nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.clone() for t in tensors
        }
        self.network = copy.deepcopy(student, copies).eval().requires_grad_(False)
        self.module = Tapped(self.network, taps or {}, wanted, "teacher.taps").eval()
        self.module.train = lambda mode=True: self.module  # type: ignore[method-assign]
        self.spec: ModelSpec | None = spec
        self.forward: Callable[..., tuple[Tensor, dict[str, Tensor]]] = self.module  # (inputs, extra)

    @torch.no_grad()
    def signal(self, batch: Batch, needs: Needs) -> Signal:
        if not needs.teacher_logits and not needs.teacher_taps:
            return Signal(None, {})
        if self.privileged:
            read = in_context(batch)
            return Signal(beside_student(self.forward(read.inputs, read.extra)[0], batch), {})
        logits, taps = self.forward(batch.inputs, batch.extra)
        return Signal(logits, taps)

    def after_step(self, student: nn.Module, progress: Progress) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """{"weights": those of the copy, buffers included}; references, as those of nn.Module."""
        return {"weights": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])


class SnapshotTeacher(Follower):
    """The student at the end of the last epoch. In the first epoch there is none, and it says nothing: logits None."""

    def __init__(self, student: nn.Module, spec: ModelSpec, taps: Mapping[str, str] | None = None, wanted: Iterable[str] = ()) -> None:
        super().__init__(student, spec, taps, wanted)
        self.epochs_seen = 0

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        return super().signal(batch, needs) if self.epochs_seen else Signal(None, {})

    def after_step(self, student: nn.Module, progress: Progress) -> None:
        """`progress` as before the step."""
        if (progress.step + 1) % progress.steps_per_epoch == 0:
            self.network.load_state_dict(student.state_dict())
            self.epochs_seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epochs_seen": self.epochs_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.epochs_seen = int(state["epochs_seen"])


class CurrentTeacher(Follower):
    """The student as it is at the beginning of the step: of use where it reads another prompt than the student."""

    def after_step(self, student: nn.Module, progress: Progress) -> None:
        self.network.load_state_dict(student.state_dict())


class EmaTeacher(Follower):
    """weights <- decay * weights + (1 - decay) * student's, after every step; it begins as the untrained student.

    Whole numbers (BatchNorm's count of batches) are copied. Raises `Refused` for a decay outside (0, 1).
    """

    def __init__(
        self, student: nn.Module, spec: ModelSpec, taps: Mapping[str, str] | None = None, wanted: Iterable[str] = (), decay: float = 0.999
    ) -> None:
        if not 0 < decay < 1:
            raise Refused(Problem(f"a decay lies between 0 and 1, not {decay}", "teacher.decay", "", "e.g. teacher.decay=0.999"))
        super().__init__(student, spec, taps, wanted)
        self.decay = decay

    @torch.no_grad()
    def after_step(self, student: nn.Module, progress: Progress) -> None:
        theirs = student.state_dict()
        for name, mine in self.network.state_dict().items():
            if mine.is_floating_point():
                mine.lerp_(theirs[name].to(mine.dtype), 1 - self.decay)
            else:
                mine.copy_(theirs[name])
