"""Optimisers and schedules from timm, and the moving average of the student, as the optim group says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdrun.errors import Problem, Refused, did_you_mean


def build_optimizer(parameters: list[nn.Parameter], optim: Mapping[str, Any]) -> torch.optim.Optimizer:
    """One parameter group: weight decay reaches every parameter, as in the published CIFAR protocol."""
    keys = {"lr": optim["lr"], "weight_decay": optim["weight_decay"]}
    if optim.get("momentum") is not None:
        keys["momentum"] = optim["momentum"]
    if optim.get("betas") is not None:
        keys["betas"] = tuple(optim["betas"])
    if optim.get("eps") is not None:
        keys["eps"] = optim["eps"]
    try:
        return create_optimizer_v2(parameters, opt=optim["name"], **keys)
    except (ValueError, KeyError, IndexError, AssertionError, TypeError) as error:
        names = [str(n) for n in list_optimizers()]
        if optim["name"] not in names:
            raise Refused(
                Problem(f"timm has no optimiser named '{optim['name']}'", "optim.name", "", did_you_mean(optim["name"], names))
            ) from error
        raise Refused(
            Problem(f"{optim['name']} refuses its settings: {error}", "optim", "", "set the ones it has no use for to null")
        ) from error


def for_phase(optim: Mapping[str, Any], phase: str) -> Mapping[str, Any]:
    """The optim group as one phase uses it. Raises `Refused` where optim.phases names a key that there is not."""
    own = dict(optim["phases"].get(phase) or {})
    unknown = sorted({*own} - ({*optim} - {"phases", "epochs", "steps", "ema"}))
    if unknown:
        raise Refused([Problem("unknown key", f"optim.phases.{phase}.{key}", "", did_you_mean(key, optim)) for key in unknown])
    return {**optim, **own, "schedule": {**optim["schedule"], **(own.get("schedule") or {})}}


def try_settings(optim: Mapping[str, Any], phases: Iterable[str] = ("student",)) -> None:
    """Build the optimisers on one number and throw them away. Raises `Refused` as the real ones would, before anything is spent."""
    phases = list(phases)
    unknown = sorted({*optim["phases"]} - {*phases})
    if unknown:
        raise Refused([Problem("the objective has no such phase", f"optim.phases.{p}", "", did_you_mean(p, phases)) for p in unknown])
    for phase in phases:
        build_optimizer([nn.Parameter(torch.zeros(1))], for_phase(optim, phase))


def build_schedule(optimizer: torch.optim.Optimizer, schedule: Mapping[str, Any], steps_per_epoch: int, total_steps: int) -> Scheduler:
    """A schedule that is a pure function of the optimiser step (timm, updates in steps)."""
    # Without "prefix" the warm-up is part of the run: it moves neither a milestone nor the end.
    warmup = {
        "warmup_t": round(schedule["warmup_epochs"] * steps_per_epoch),
        "warmup_lr_init": 0.0,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if schedule["name"] == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total_steps, lr_min=schedule["min_lr"], **warmup)
    if schedule["name"] == "poly":
        return PolyLRScheduler(optimizer, t_initial=total_steps, power=schedule["power"], lr_min=schedule["min_lr"], **warmup)
    milestones = schedule["milestones"] if schedule["name"] == "multistep" else []
    # "Below 1" is a fraction of the run; otherwise epochs. The rate is lower from the step after so many steps are done, as
    # in the published protocols; timm compares its milestones with step + 1, hence the 1.
    steps = [(round(m * total_steps) if m < 1 else round(m * steps_per_epoch)) + 1 for m in milestones]
    return MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=schedule["gamma"], **warmup)


def build_ema(student: nn.Module, decay: float | None) -> AveragedModel | None:
    """The exponential moving average of the student's weights, buffers included; it is what is evaluated and exported."""
    return None if decay is None else AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
