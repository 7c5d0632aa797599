"""kdrun train: one run, or a method beside its rivals over seeds."""

from __future__ import annotations

from kdrun.cli.options import ConfigDir, Json, Overrides, Quiet

DEFAULT_RECIPE = "pld_digits"


def train(overrides: Overrides = None, config_dir: ConfigDir = None, json: Json = False, quiet: Quiet = False) -> None:
    """Train a student. Without arguments: the recipe pld_digits (teacher, student alone, KD and PLD on scikit-learn's digits)."""
    from kdrun.config.check import check
    from kdrun.config.compose import compose

    composed = compose(overrides or [], config_dir or [], default_recipe=None if _own_tree(overrides) else DEFAULT_RECIPE)
    check(composed)
    from kdrun.cli.session import run_session

    run_session(composed, json=json, quiet=quiet)


def _own_tree(overrides: list[str] | None) -> bool:
    """Whether the user names parts but no recipe: then the bare defaults of conf/config.yaml are meant."""
    keys = {o.partition("=")[0] for o in overrides or []}
    return bool(keys & {"dataset", "student", "teacher"}) and "recipe" not in keys
