"""TensorBoard (https://www.tensorflow.org/tensorboard): event files in a folder, written by torch.utils.tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kdrun.track.base import Ending, Tracked, Tracker


@dataclass(eq=False)
class TensorBoard(Tracker):
    """A writer for each stage, so that teacher and student lie over each other under one tag and a resume can take back its own steps."""

    package: ClassVar[str] = "tensorboard"

    folder: str | None = None

    _home: Path = field(default=Path(), init=False, repr=False)
    _writers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def begin(self, run: Tracked) -> dict[str, Any]:
        self._home = Path(
            run.kept.get("folder") or (Path(self.folder).expanduser() / run.name if self.folder else run.folder / "tensorboard")
        )
        if not run.kept:
            settings = "\n".join(f"    {key}: {json.dumps(value, default=str)}" for key, value in run.settings.items())
            self._writer("").add_text("settings", settings, 0)
        return {"folder": str(self._home), "where": f"tensorboard --logdir {self._home}"}

    def _writer(self, stage: str, purge: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self._writers:
            self._writers[stage] = SummaryWriter(str(self._home / stage), purge_step=purge)
        return self._writers[stage]

    def stage(self, name: str, step: int) -> None:
        self._writer(name, step + 1 if step else None)

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer(stage).add_scalar(name, value, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._writer("").add_text("summary", "\n".join(f"    {key}: {json.dumps(value, default=str)}" for key, value in values.items()), 0)

    def end(self, how: Ending) -> None:
        for writer in self._writers.values():
            writer.close()
