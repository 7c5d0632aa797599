"""kdrun train: one run, or a method beside its rivals over seeds."""

from __future__ import annotations

from kdrun.cli.options import ConfigDir, Json, Overrides, Quiet, default_recipe


def train(overrides: Overrides = None, config_dir: ConfigDir = None, json: Json = False, quiet: Quiet = False) -> None:
    """Train a student. Without arguments: the recipe pld_digits (teacher, student alone, KD and PLD on scikit-learn's digits)."""
    from kdrun.config.check import check
    from kdrun.config.compose import compose

    composed = compose(overrides or [], config_dir or [], default_recipe=default_recipe(overrides))
    check(composed)
    from kdrun.cli.session import run_session

    run_session(composed, json=json, quiet=quiet)
