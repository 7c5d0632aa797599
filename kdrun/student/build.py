"""From a node of the configuration to a network: any class or function of an allowed package, by its dotted name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from kdrun.config.networks import resolve
from kdrun.config.targets import ALLOWED
from kdrun.errors import Problem, Refused, did_you_mean

RESERVED = frozenset({"_target_", "taps", "checkpoint", "rename"})  # keys of a node that are not arguments of the network


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


def call_of(
    node: Mapping[str, Any],
    classes: int,
    input_shape: tuple[int, ...],
    *,
    reserved: Collection[str] = RESERVED,
    allowed: Collection[str] = ALLOWED,
    key: str = "student",
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `build` calls, and with which arguments. Raises as it does; nothing is made."""
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    assert isinstance(plain, dict)
    name = str(plain.get("_target_"))
    target = resolve(plain.get("_target_"), allowed, f"{key}._target_")
    given = {str(k): v for k, v in plain.items() if k not in reserved and k not in RESERVED}
    arguments = _arguments(target, name, given, classes, input_shape, key)
    return target, arguments


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
    target, arguments = call_of(node, classes, input_shape, reserved=reserved, allowed=allowed, key=key)
    name = str(node.get("_target_"))
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
