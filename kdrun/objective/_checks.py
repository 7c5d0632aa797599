"""Ranges of fields, checked the same way by all objectives."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints


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


def require_share(objective: object, *names: str) -> None:
    """Raise ValueError unless every named field lies in [0, 1]: shares of a mixture."""
    for name in names:
        if not 0 <= getattr(objective, name) <= 1:
            raise ValueError(f"{name}={getattr(objective, name)}: legal range [0, 1]")


def require_legal(objective: object, *names: str) -> None:
    """Raise ValueError unless every named field, annotated as a Literal, has one of its values."""
    hints = get_type_hints(type(objective))
    for name in names:
        if getattr(objective, name) not in get_args(hints[name]):
            raise ValueError(f"{name}={getattr(objective, name)!r}: legal values {', '.join(map(str, get_args(hints[name])))}")
