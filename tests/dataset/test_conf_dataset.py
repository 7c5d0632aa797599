from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).parents[2] / "conf" / "dataset"
FILES = sorted(CONF.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_option_builds_and_is_named_like_its_file(file: Path) -> None:
    node = yaml.safe_load(file.read_text())
    module, _, name = node.pop("_target_").rpartition(".")
    assert getattr(importlib.import_module(module), name)(**node).name == file.stem


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_option_begins_by_saying_what_it_is(file: Path) -> None:
    assert re.match(r"# \w.{20,}", file.read_text())
