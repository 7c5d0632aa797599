"""Tab completion of overrides: recipes, groups and their options. Reads folder listings only."""

from __future__ import annotations


def complete_override(incomplete: str) -> list[str]:
    """`rec` -> recipe=, `objective=d` -> objective=dist objective=dkd."""
    from kdrun.config.paths import GROUPS, SearchPath

    names = {"recipe": "recipes", **{g: g for g in GROUPS}}
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in names if name.startswith(key)]
    if key not in names:
        return []
    return [f"{key}={option}" for option in SearchPath.of().options(names[key]) if option.startswith(value)]
