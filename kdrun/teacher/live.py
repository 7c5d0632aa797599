"""A teacher that is run on every batch: frozen, in evaluation mode whatever `train()` is called on it, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.teacher.context import TARGETS, beside_student, in_context
from kdrun.types import Batch, ModelSpec, Needs, Progress, Signal


class LiveTeacher:
    """`module` returns (logits, taps by name). `affine` maps the data set's normalisation to the teacher's own."""

    follows = False
    privileged = False  # whether it reads a prompt of its own (kdrun.teacher.context)
    way: object = None  # how it is computed (kdrun.engine.choices)
    device: torch.device | None = None  # of its weights, where that is not the student's

    def __init__(self, module: nn.Module, spec: ModelSpec, affine: tuple[Tensor, Tensor] | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        # Law 6: nothing may put the teacher into training mode, not even a parent's train().
        self.module.train = lambda mode=True: self.module  # type: ignore[method-assign]
        self.spec: ModelSpec | None = spec
        self.forward: Callable[..., tuple[Tensor, dict[str, Tensor]]] = module  # (inputs, extra)
        self.affine = affine

    @property
    def network(self) -> nn.Module:
        """The teacher without its taps."""
        return getattr(self.module, "module", self.module)

    @property
    def takes(self) -> tuple[str, ...]:
        return tuple(getattr(self.network, "takes", ()))

    def renormalise(self, inputs: Tensor) -> Tensor:
        if self.affine is None:
            return inputs
        scale, shift = (v.to(inputs.device).view(-1, *[1] * (inputs.dim() - 2)) for v in self.affine)
        return inputs * scale + shift

    def to(self, device: torch.device, memory_format: torch.memory_format, placement: str = "same") -> None:
        """Put its weights on the student's device, or on the one that `placement` names."""
        self.device = None if placement == "same" else torch.device(placement)
        self.module.to(self.device or device).to(memory_format=memory_format)

    @torch.no_grad()
    def signal(self, batch: Batch, needs: Needs) -> Signal:
        if not needs.teacher_logits and not needs.teacher_taps:
            return Signal(None, {})
        if self.device is None:
            return self._speak(batch)
        said, home = self._speak(batch.to(self.device)), batch.inputs.device
        return Signal(None if said.logits is None else said.logits.to(home), {k: v.to(home) for k, v in said.taps.items()})

    def _speak(self, batch: Batch) -> Signal:
        if self.privileged or TARGETS in batch.extra:
            read = in_context(batch)
            return Signal(beside_student(self.forward(read.inputs, read.extra)[0], batch), {})
        logits, taps = self.forward(self.renormalise(batch.inputs), batch.extra)
        return Signal(logits, taps)

    def after_step(self, student: nn.Module, progress: Progress) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def affine_between(mean_from: Any, std_from: Any, mean_to: Any, std_to: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) [C] that turn inputs normalised one way into inputs normalised another way: per channel, or per feature."""
    m0, s0, m1, s1 = (torch.tensor(v, dtype=torch.float32) for v in (mean_from, std_from, mean_to, std_to))
    return s0 / s1, (m0 - m1) / s1
