"""Where each leaf of a composed configuration comes from: file and line, recipe condition, or command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from kdrun.config import files
from kdrun.config.paths import GROUPS, SearchPath

Origins = dict[str, str]  # dotted leaf -> "conf/objective/pld.yaml:7"


def leaves(file: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every leaf of a YAML file. A list or an empty mapping is a leaf."""
    node = files.nodes(file)
    if isinstance(node, yaml.MappingNode):
        yield from _walk(node, prefix)


def _walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}.{key.value}" if prefix else str(key.value)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _walk(value, name)
        else:
            yield name, key.start_mark.line + 1


def group_origins(search: SearchPath, group: str, name: str, prefix: str) -> Origins:
    """Origins of one option: its parts first (the defaults list), then the file itself."""
    file = search.file(group, name)
    if file is None:
        return {}
    found: Origins = {}
    for entry in files.load(file).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= group_origins(search, group, entry, prefix)
        elif isinstance(entry, dict):
            for key, choice in entry.items():
                found |= group_origins(search, str(key).lstrip("/").split("@")[0], str(choice), prefix)
    short = search.short(file)
    found |= {leaf: f"{short}:{line}" for leaf, line in leaves(file, prefix) if not leaf.startswith(f"{prefix}.defaults")}
    return found


def file_origins(search: SearchPath, choices: dict[str, str], recipe: str | None) -> Origins:
    """Origins of everything that files say, the recipe's plain body last. `choices` are group -> option."""
    root = search.conf_dirs()[0] / "config.yaml"
    found: Origins = {leaf: f"{search.short(root)}:{line}" for leaf, line in leaves(root) if not leaf.startswith("defaults")}
    for group in GROUPS:
        for name in choices.get(group, "").split(","):
            found |= group_origins(search, group, name, group)
    recipe_file = search.file("recipes", recipe) if recipe else None
    if recipe_file is not None:
        short = search.short(recipe_file)
        for leaf, line in leaves(recipe_file):
            if leaf != "defaults":
                found[leaf] = f"{short}:{line}"
    return found
