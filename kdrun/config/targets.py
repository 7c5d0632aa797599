"""Which classes and functions a configuration may name by `_target_`, and how they are found.

A dotted name is code that will run, so it must lie in an allowed package, be DEFINED in one (``torch.os.system`` is only
imported by one), and be of the kind that its place asks for.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from kdrun.errors import Problem, Refused, did_you_mean

ALLOWED = ("kdrun", "torch", "torchvision", "timm", "transformers", "torch_geometric", "diffusers")  # packages that `_target_` may name
UNSET = (None, "", "???")
# What the classes of a group must offer.
MUST_HAVE = {"dataset": "load", "objective": "terms", "evaluation": "measure", "source": "open", "plan": "run", "track": "numbers"}


def allowed(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The packages that a configuration may name: the usual ones and those of its run.allow."""
    return (*ALLOWED, *(tree["run"].get("allow") or []))


def find(target: Any, allowed: Collection[str], key: str, what: str) -> Any:
    """The object behind a dotted name, if it may be named. Raises `Refused`; `what` is what it should be, for the message."""
    if target in UNSET:
        raise Refused(Problem(f"no {what} is chosen", key=key, remedy=f"set it to a dotted name: my.{what.capitalize()}"))
    words = str(target).split(".")
    if words[0] not in allowed:
        said = f"{target} is outside the packages that may be named: {', '.join(allowed)}"
        raise Refused(Problem(said, key=key, remedy=f"if you trust that package: run.allow=[{words[0]}]"))
    found = _import(words, key)
    home = home_of(found, words)
    if home not in allowed:
        said = f"{target} comes from {home}, outside the packages that may be named: {', '.join(allowed)}"
        raise Refused(Problem(said, key=key, remedy=f"name a {what} by the module that defines it"))
    return found


def component(target: Any, allowed: Collection[str], group: str) -> type:
    """The class of a dataset, objective, evaluation or source. Raises `Refused` for anything else."""
    key, kind = f"{group}._target_", group.partition(".")[0]
    found = find(target, allowed, key, group)
    if not inspect.isclass(found) or not hasattr(found, MUST_HAVE[kind]):
        near = did_you_mean(str(target).rpartition(".")[2], members(found)) if isinstance(found, ModuleType) else ""
        raise Refused(
            Problem(f"{target} is no class with a method '{MUST_HAVE[kind]}'", key=key, remedy=near or f"name a class made as a {group}")
        )
    return found


def home_of(found: Any, words: list[str]) -> str:
    """The top-level package that defines an object."""
    return (getattr(found, "__module__", None) or words[0]).partition(".")[0]


def members(owner: Any) -> list[str]:
    """Names that may follow a module's or class's own in a dotted name."""
    names = [name for name in dir(owner) if not name.startswith("_")]
    if isinstance(owner, ModuleType) and hasattr(owner, "__path__"):
        names += [info.name for info in pkgutil.iter_modules(owner.__path__)]
    return names


def _import(words: list[str], key: str) -> Any:
    """The object of a dotted name: packages are imported as far as they go, the rest are attributes."""
    found: Any = None
    for i, word in enumerate(words):
        path = ".".join(words[: i + 1])
        if i and hasattr(found, word):
            found = getattr(found, word)
            continue
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):  # it exists, and something that IT imports does not
                remedy = f"pip install {error.name}"
                raise Refused(Problem(f"{path} needs the package {error.name}, which is not installed", key=key, remedy=remedy)) from error
            if not i:
                remedy = f"install {word}, or start kdrun where Python finds it (PYTHONPATH)"
                raise Refused(Problem(f"no package {word!r}", key=key, remedy=remedy)) from error
            owner = ".".join(words[:i])
            raise Refused(Problem(f"{owner} has no {word!r}", key=key, remedy=did_you_mean(word, members(found)))) from error
    return found
