"""JSON as its standard has it (RFC 8259): without NaN and infinity, which Python writes by default and strict readers refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON: null for a number that is not finite, text for what JSON has no word for."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def metrics_of(told: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers of a record that was read: null stands for one that was not finite, as a run that diverged leaves it."""
    numbers = {name: math.nan if value is None else value for name, value in (told or {}).items()}
    return {name: value for name, value in numbers.items() if isinstance(value, (int, float))}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
