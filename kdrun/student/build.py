"""From a node of the configuration to a network: any class or function of an allowed package, by its dotted name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from torch import nn

from kdrun.config.targets import ALLOWED, find, home_of, members
from kdrun.errors import Problem, Refused, did_you_mean

RESERVED = frozenset({"_target_", "taps", "checkpoint", "rename"})  # keys of a node that are not arguments of the network


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


def _outside(parameters: Mapping[str, inspect.Parameter], open_ended: bool, classes: int, input_shape: tuple[int, ...]) -> dict[str, int]:
    """What a network is told of the data, by the names that its signature has for it."""
    offered = {
        "num_classes": classes,
        "in_channels": input_shape[0],
        "in_chans": input_shape[0],
        "in_features": math.prod(input_shape),
    }
    told = {name: value for name, value in offered.items() if name in parameters}
    if open_ended and "num_classes" not in told:  # torchvision's and timm's builders pass it on
        told["num_classes"] = classes
    return told


def _arguments(
    target: Callable[..., Any], name: str, given: dict[str, Any], classes: int, input_shape: tuple[int, ...], key: str
) -> dict[str, Any]:
    """The arguments of the call; all that is unknown or missing is refused at once."""
    signature = inspect.signature(target)
    parameters = {n: p for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    arguments = _outside(parameters, open_ended, classes, input_shape) | given
    problems = []
    for unknown in [] if open_ended else sorted(given.keys() - parameters.keys()):
        legal = f"it takes {', '.join(parameters)}" if parameters else "it takes no arguments"
        remedy = "; ".join(filter(None, [did_you_mean(unknown, parameters) if parameters else "", legal]))
        problems.append(Problem(f"{name} has no argument {unknown!r}", key=f"{key}.{unknown}", remedy=remedy))
    for needed, parameter in parameters.items():
        if arguments.get(needed, parameter.default) in (parameter.empty, "???"):
            problems.append(Problem(f"{name} needs {needed!r}", key=f"{key}.{needed}", remedy=f"set {key}.{needed}=..."))
    if problems:
        raise Refused(problems)
    return arguments


def build(
    node: Mapping[str, Any],
    classes: int,
    input_shape: tuple[int, ...],
    *,
    reserved: Collection[str] = RESERVED,
    allowed: Collection[str] = ALLOWED,
    key: str = "student",
) -> nn.Module:
    """The network of a node such as ``{_target_: kdrun.student.resnet.resnet20, taps: {...}, checkpoint: null, shortcut: conv}``.

    It is told the number of classes and the channels or features of `input_shape` (without the batch) as far as its signature has
    `num_classes` and `in_channels`, `in_chans` or `in_features`; what the node itself says of these wins. `reserved`: keys of the node
    that are not arguments (RESERVED and what the caller's group adds). Initialised from the global torch RNG; loads no checkpoint.

    Raises `kdrun.errors.Refused` for a target or argument that cannot be, with the nearest legal names. `key`: the node's place in the
    configuration, for errors.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    assert isinstance(plain, dict)
    name = str(plain.get("_target_"))
    target = resolve(plain.get("_target_"), allowed, f"{key}._target_")
    given = {str(k): v for k, v in plain.items() if k not in reserved and k not in RESERVED}
    arguments = _arguments(target, name, given, classes, input_shape, key)
    try:
        network = target(**arguments)
    except Refused as refused:
        # a factory knows its own arguments, not where they stand
        raise Refused([Problem(p.what, f"{key}.{p.key}" if p.key else key, p.where, p.remedy) for p in refused.problems]) from refused
    except (TypeError, ValueError) as error:
        raise Refused(Problem(f"{name} refuses its arguments: {error}", key=key, remedy=f"it was called with {arguments}")) from error
    if not isinstance(network, nn.Module):
        raise Refused(Problem(f"{name} gave a {type(network).__name__}, not a torch.nn.Module", key=f"{key}._target_"))
    return network
