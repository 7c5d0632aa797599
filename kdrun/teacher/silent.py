"""No teacher: for training from labels alone (the undistilled student, and the teacher's own training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdrun.types import Batch, ModelSpec, Needs, Progress, Signal


class NoTeacher:
    spec: ModelSpec | None = None
    follows = False

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        return Signal(None, {})

    def after_step(self, student: nn.Module, progress: Progress) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
