"""Nodes of the configuration, composed as kdrun composes them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


def options(group: str) -> list[str]:
    """The names that may be chosen; files with an underscore are parts of others."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if not file.name.startswith("_"))


@functools.cache
def _composed(group: str, name: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+{group}={name}", *overrides])
    return OmegaConf.to_container(config[group], resolve=True, throw_on_missing=False)


def node(group: str, name: str, *overrides: str) -> dict[str, Any]:
    return copy.deepcopy(_composed(group, name, *overrides))
