"""Which classes and functions a configuration may name as a network, and the types of what they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from kdrun.config.targets import ALLOWED, find, home_of, members
from kdrun.errors import Problem, Refused, did_you_mean


def _is_network(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, nn.Module)


def _gives_network(function: Callable[..., Any]) -> bool:
    """Whether a function declares that it returns a network, or is a class method of one.

    Asked of the libraries, which have functions that a configuration must not call: torch.load, torch.hub.load, downloaders.
    """
    try:
        returned = get_type_hints(function).get("return")
    except (NameError, TypeError):  # a builtin, or annotations that cannot be read
        returned = None
    return _is_network(returned) or _is_network(getattr(function, "__self__", None))


def resolve(target: Any, allowed: Collection[str], key: str) -> Callable[..., Any]:
    """The class, function or class method that `_target_` names.

    Raises `kdrun.errors.Refused` if it is not set, lies outside the allowed packages (also where an allowed package merely imports it:
    ``torch.os.system``), does not exist, or can be no network.
    """
    found = find(target, allowed, key, "network")
    words = str(target).split(".")
    home = home_of(found, words)
    if not (_is_network(found) or (inspect.isroutine(found) and (home not in ALLOWED or _gives_network(found)))):
        what = f"{target} is no torch.nn.Module class and no function that builds one"
        within = did_you_mean(words[-1], members(found)) if isinstance(found, ModuleType) else ""
        raise Refused(Problem(what, key=key, remedy=within or "name a class derived from torch.nn.Module, or a function that returns one"))
    return found


def argument_types(target: Callable[..., Any]) -> dict[str, Any]:
    """The types of a network's arguments as far as they are declared and YAML can write them: names with None where that is the default.

    A library may take a text where it declares a class (torchvision's weights), so such arguments are left out.
    """
    called = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(called)
    except (NameError, TypeError):  # a builtin, or annotations that cannot be read
        return {}
    parameters = inspect.signature(target).parameters.values()
    named = [p for p in parameters if p.name in hints and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: hints[p.name] | None if p.default is None else hints[p.name] for p in named if _plain(hints[p.name])}


def _plain(hint: Any) -> bool:
    """Whether a type is made of what YAML can write."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return True
    if origin is not None:
        return origin in (Union, UnionType, list, tuple, dict, Sequence, Mapping) and all(a is ... or _plain(a) for a in args)
    return hint in (int, float, bool, str, NoneType)
