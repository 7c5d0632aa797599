"""From a composed configuration to a finished run folder: refuse what cannot work, then carry out the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kdrun.config.check import instantiate
from kdrun.config.compose import Composed
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data
from kdrun.engine import provenance
from kdrun.engine.build import Built, load_data, open_source
from kdrun.engine.device import pick_device, set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.optim import try_settings
from kdrun.engine.records import held, open_folder, run_folder
from kdrun.engine.report import Reporter
from kdrun.engine.session import Session
from kdrun.engine.stage import Stopped
from kdrun.engine.summary import Result
from kdrun.engine.tracking import open_trackers, tracked
from kdrun.errors import CheckFailed, Problem, Refused
from kdrun.evaluation import cost


def execute(
    composed: Composed,
    reporter: Reporter,
    folder: Path | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    data: Data | None = None,
) -> Result:
    """Run one configuration to its end. Raises `Refused` before anything is written, also where another process works in the
    folder; `CheckFailed` if the teacher is not what it is said to be, `Stopped` after a signal, `NotFinite` before a bad update."""
    with opened(composed, reporter, folder, resume, ranks or Ranks(), data) as session:
        return session.plan.run(session)


@contextmanager
def opened(
    composed: Composed, reporter: Reporter, folder: Path | None, resume: bool, ranks: Ranks, data: Data | None = None
) -> Iterator[Session]:
    """A run that was checked, in its folder, which is held while it lasts. Raises as `execute`."""
    tree = composed.tree
    open_trackers(tree if ranks.first else {})  # a package that is missing is said before anything is loaded
    device = pick_device(tree["hardware"], ranks.local_rank)
    set_up(tree["hardware"], device)
    data = data or load_data(tree)
    plan = instantiate(tree["plan"], "plan", allowed(tree))
    session = Session(composed, data, device, ranks, reporter, resume, plan)
    built = session.build()
    open_source(tree, built.data, device, ranks)  # it has its own reasons to refuse
    try_settings(tree["optim"], built.objective.phases)
    session.check_teacher(built)
    session.folder = folder or run_folder(composed)
    with held(session.folder, fresh=not resume) if ranks.first else nullcontext():
        if ranks.first and not resume:
            open_folder(session.folder, composed)
        ranks.barrier()
        with tracked(composed, title(composed), session.folder, reporter, ranks) as session.reporter:
            session.reporter.run_started(title(composed), session.folder, facts(composed, built, plan, device))
            yield session


def title(composed: Composed) -> str:
    chosen = composed.choices
    return f"{composed.recipe or 'run'}: {chosen['objective']}, {chosen['teacher']} -> {chosen['student']}"


def facts(composed: Composed, built: Built, plan: Any, device: torch.device) -> dict[str, str]:
    data, optim = built.data, composed.tree["optim"]
    trained = f"{built.total_steps / built.steps_per_epoch:.4g} epochs, {built.total_steps} steps, {optim['name']}, lr {optim['lr']}"
    sizes = ", ".join(f"{len(s)} {n}" for n, s in data.splits.items())
    return {
        "data": f"{data.name}: {sizes}; {data.classes} classes",
        "student": f"{cost.parameters(built.network):,} parameters",
        "schedule": trained if getattr(plan, "train", True) else plan.describe(),
        "seed": str(composed.tree["seed"]),
        "on": provenance.hardware(device),
    }


__all__ = ["CheckFailed", "Problem", "Refused", "Result", "Stopped", "execute"]
