"""What a record says of its own estimate: predicted and actual side by side. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"peak_memory_bytes": "peak memory", "seconds_per_step": "a step", "seconds": "in all", "cache_bytes": "cache"}


def forecast_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each number that was predicted and measured, with the estimator's error. Of the peak what came above the memory that
    was in use before the first step."""
    predicted, actual = summary.get("predicted") or {}, summary.get("actual") or {}
    found = []
    for key, name in NAMES.items():
        said, was = predicted.get(key), actual.get(key)
        if said is None or not was:
            continue
        above, note = 0, ""
        if key == "peak_memory_bytes":
            above = predicted["before_first_step_bytes"]
            note = f" above {_amount(key, above)} before the first step"
            if was <= max(predicted["peak_before_bytes"], above):  # the two are read from the system at different moments
                found.append(f"{name:<12}not above {_amount(key, was)}, which the process had used before the first step")
                continue
        off = 100 * (said - was) / (was - above)
        found.append(f"{name:<12}{_amount(key, said - above)} predicted, {_amount(key, was - above)} measured{note}: off by {off:+.0f} %")
    return found


def _amount(key: str, value: float) -> str:
    if key.endswith("bytes"):
        return f"{value / 2**20:,.0f} MiB" if value >= 100 * 2**20 else f"{value / 2**20:.3g} MiB"
    return f"{1e3 * value:,.3g} ms" if key == "seconds_per_step" else f"{value:,.3g} s"
