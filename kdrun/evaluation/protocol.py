"""Which epoch's number a run reports. Papers differ in this, and a number without its protocol cannot be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.evaluation.metrics import KINDS, kind

Protocol = Literal["last", "best_val", "median_last_k", "best_test"]


class Reported(NamedTuple):
    """The number of a run, and in words how it was chosen."""

    value: float
    description: str


def reported(
    history: Sequence[Mapping[str, Any]], protocol: Protocol, primary: str = "top1", last_k: int = 5, ties: str = "first"
) -> Reported:
    """The primary metric on test that a protocol reports.

    `history` holds {"epoch", "validation": metrics or None, "test": metrics or None} by rising epoch. A best epoch is
    the one whose metric is best in the metric's own direction: of equals the earliest, with ties="last" the latest. An
    epoch whose metric is not a number is never best. Fewer than `last_k` test evaluations give the median of those there
    are, and are so described. Raises `Refused` if the history lacks what the protocol looks at.
    """
    if not history:
        raise Refused(Problem("nothing was evaluated", "evaluation", "", "evaluate at least once, at the last epoch"))
    if protocol == "last":
        entry = history[-1]
        return Reported(_metric(entry, "test", primary), f"test {primary} at the last epoch ({entry['epoch']:.4g})")
    if protocol == "best_val":
        best = best_epoch(history, "validation", primary, "dataset.validation=0.1", ties)
        return Reported(_metric(best, "test", primary), f"test {primary} at epoch {best['epoch']:.4g}, chosen by validation {primary}")
    if protocol == "best_test":
        best = best_epoch(history, "test", primary, "evaluation.protocol=last", ties)
        return Reported(_metric(best, "test", primary), f"epoch {best['epoch']:.4g}, selected on test: as published, not comparable")
    if protocol == "median_last_k":
        entries = [entry for entry in history if entry.get("test")][-last_k:]
        values = [_metric(entry, "test", primary) for entry in entries or history[-1:]]
        fewer = f" (of {last_k} asked for)" if len(values) < last_k else ""
        # A sort of values with NaN among them depends on their order, and so would the median.
        middle = math.nan if any(map(math.isnan, values)) else statistics.median(values)
        return Reported(middle, f"median of the last {len(values)} test evaluations{fewer}")
    raise Refused(Problem(f"unknown protocol '{protocol}'", "evaluation.protocol", "", did_you_mean(protocol, get_args(Protocol))))


def _metric(entry: Mapping[str, Any], split: str, name: str) -> float:
    metrics = entry.get(split)
    if not metrics:
        what = f"epoch {entry['epoch']} has no {split} metrics, and the protocol reports them"
        raise Refused(Problem(what, "evaluation.protocol", "", f"evaluate on {split} at that epoch, e.g. evaluation.every_epochs=1"))
    if name not in metrics:
        raise Refused(Problem(f"'{name}' was not measured on {split}", "evaluation.primary", "", did_you_mean(name, metrics)))
    return float(metrics[name])


def best_epoch(history: Sequence[Mapping[str, Any]], split: str, name: str, remedy: str = "", ties: str = "first") -> Mapping[str, Any]:
    """The entry whose metric on a split is best. Raises `Refused` where no entry has a number there."""
    entries = [entry for entry in history if entry.get(split)]
    if not entries:
        raise Refused(Problem(f"no epoch was evaluated on {split}", "evaluation.protocol", "", remedy))
    metric = kind(name)
    if metric is None:
        what = f"it is not known whether a higher or a lower '{name}' is better"
        raise Refused(Problem(what, "evaluation.primary", "", did_you_mean(name, ("top1", *KINDS))))
    numbers = [entry for entry in entries if not math.isnan(_metric(entry, split, name))]
    if not numbers:
        what = f"{name} on {split} is not a number at any epoch: the run diverged"
        raise Refused(Problem(what, "evaluation.protocol", "", "lower optim.lr, or report evaluation.protocol=last"))
    ordered = numbers if ties == "first" else numbers[::-1]  # max and min give the first of equals
    return (max if metric.higher_is_better else min)(ordered, key=lambda entry: _metric(entry, split, name))
