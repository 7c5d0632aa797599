"""Ranges of fields, checked the same way by all objectives."""

from __future__ import annotations

import math


def require_nonnegative(objective: object, *names: str) -> None:
    """Raise ValueError unless every named field lies in [0, inf): weights of terms, lengths of warm-ups."""
    for name in names:
        if not 0 <= getattr(objective, name) < math.inf:
            raise ValueError(f"{name}={getattr(objective, name)}: legal range [0, inf)")


def require_positive(objective: object, *names: str) -> None:
    """Raise ValueError unless every named field lies in (0, inf): temperatures, sizes."""
    for name in names:
        if not 0 < getattr(objective, name) < math.inf:
            raise ValueError(f"{name}={getattr(objective, name)}: legal range (0, inf)")
