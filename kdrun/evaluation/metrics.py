"""The metrics by name: their unit and which direction is better. No torch here, so that listing and the ledger stay light."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricKind:
    """What a metric's number means."""

    unit: str  # "percent", "nats", "ms", ...
    higher_is_better: bool

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two such numbers: percentages differ by points."""
        return "points" if self.unit == "percent" else self.unit


_TOP_K = re.compile(r"top[1-9]\d*")

KINDS: dict[str, MetricKind] = {
    "teacher_top1": MetricKind("percent", True),
    "agreement": MetricKind("percent", True),
    "pair_order": MetricKind("percent", True),
    "ece": MetricKind("percent", False),
    "nll": MetricKind("nats", False),
    "kl_teacher": MetricKind("nats", False),
    "parameters": MetricKind("parameters", False),
    "flops": MetricKind("FLOPs", False),
    "latency_ms": MetricKind("ms", False),
}


def kind(name: str) -> MetricKind | None:
    """The kind of a metric, None for a name that kdrun does not know (its direction must then not be guessed)."""
    if _TOP_K.fullmatch(name):
        return MetricKind("percent", True)
    return KINDS.get(name)
