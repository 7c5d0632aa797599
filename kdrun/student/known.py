"""Which networks this package has, and which of them a state dict was made for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

import kdrun.student

BATCHES = "num_batches_tracked"  # a buffer of BatchNorm that files from before torch 0.4.1 do not have


def networks() -> dict[str, Callable[..., nn.Module]]:
    """By dotted name, every function of this package that builds a network from `num_classes` alone."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for info in pkgutil.iter_modules(kdrun.student.__path__, "kdrun.student."):
        for name, function in vars(importlib.import_module(info.name)).items():
            if not inspect.isfunction(function) or function.__module__ != info.name or name.startswith("_"):
                continue
            first, *rest = [*inspect.signature(function).parameters.values(), None]
            if any(p is not None and p.name == "name" and p.default is None for p in rest):
                continue  # it makes what a name says, and there is none
            if first is not None and first.name == "num_classes" and all(p is None or p.default is not p.empty for p in rest):
                found[f"{info.name}.{name}"] = function
    return found


def _variants(factory: Callable[..., nn.Module]) -> Iterator[dict[str, object]]:
    yield {}
    if "shortcut" in inspect.signature(factory).parameters:
        yield {"shortcut": "pad"}


def _shapes(state: Mapping[str, Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(BATCHES))


def fitting(state: Mapping[str, Tensor]) -> list[str]:
    """The networks of this package whose tensors have exactly these shapes, whatever their names."""
    wanted = _shapes(state)
    heads = [shape for shape in wanted if len(shape) == 2]
    if len(heads) != 1:  # each of them has one linear layer
        return []
    fits = []
    for name, factory in networks().items():
        for kwargs in _variants(factory):
            for channels in ({}, {"in_channels": 1}):
                with torch.device("meta"):
                    shapes = _shapes(factory(num_classes=heads[0][0], **kwargs, **channels).state_dict())
                if shapes == wanted:
                    said = ", ".join(f"{key}={value}" for key, value in (kwargs | channels).items())
                    fits.append(f"{name}({said})" if said else name)
                if shapes.total() != wanted.total():  # another stem would not help
                    break
    return fits
