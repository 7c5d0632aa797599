"""Weights & Biases (https://docs.wandb.ai): online where there is a key, otherwise into the run's folder, to be sent by `wandb sync`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from urllib.parse import urlparse
from uuid import uuid4

from kdrun.track.base import Ending, Tracked, Tracker

SECONDS_TO_OPEN = 30.0  # for a server that does not answer (unconfirmed: ours)


def has_key() -> bool:
    """Whether somebody has logged in here: `wandb login` writes the key into ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc().authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@dataclass(eq=False)
class Wandb(Tracker):
    """Each stage has its own step axis: `student/loss` over `student/step`."""

    package: ClassVar[str] = "wandb"

    project: str = "kdrun"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"

    _run: Any = field(default=None, init=False, repr=False)
    _told: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # the last step of each stage that the server has

    def begin(self, run: Tracked) -> dict[str, Any]:
        import wandb

        mode, why = self._mode()
        name = run.kept.get("id") or uuid4().hex[:8]
        self._run = wandb.init(
            project=self.project, entity=self.entity, id=name, name=run.name, group=run.group, notes=run.title, dir=str(run.folder),
            config=dict(run.settings), mode=mode, resume="allow" if mode == "online" else None, reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_OPEN, disable_git=True),
        )  # fmt: skip
        again = "wandb sync --append" if run.kept else "wandb sync"
        where = self._run.url if mode == "online" else f"offline ({why}); send it with: {again} {os.path.dirname(self._run.dir)}"
        return {"id": name, "where": where}

    def _mode(self) -> tuple[Literal["online", "offline"], str]:
        """(mode, why it is offline)."""
        if self.mode != "auto":
            return self.mode, "track.wandb.mode"
        said = os.environ.get("WANDB_MODE", "").lower()
        if said and said != "online":
            return "offline", "WANDB_MODE"
        return ("online", "") if said == "online" or has_key() else ("offline", "there is no key: wandb login")

    def stage(self, name: str, step: int) -> None:
        self._run.define_metric(f"{name}/step")
        self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        before = self._run.summary.get(f"{name}/step") if step else None  # of a resumed run the server's own
        self._told[name] = int(before) if isinstance(before, (int, float)) else -1

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if step > self._told.get(stage, -1):
            self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update({f"summary/{name}": value for name, value in values.items()})

    def end(self, how: Ending) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if how == "finished" else 1)
