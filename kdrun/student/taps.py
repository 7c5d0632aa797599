"""Feature taps: values from inside any network, returned beside its logits.

A tap is named by a module path as in ``network.named_modules()``. ``layer3`` is the module's output, ``fc@in`` its first positional
input. A negative index counts from the end, as in Python: ``layer3.-1.relu2`` is in the last block of the stage, however deep the
network is. A module that runs several times in one forward gives its last value.

The hooks are installed once, when a network is wrapped, and their values are RETURNED: `torch.compile(..., fullgraph=True)` then
traces them like any other value, and nothing is left behind on a module. (A hook that is added after the first compiled call never
fires, and gives no error.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.types import Batch, ModelSpec

INPUT = "@in"


@dataclass(eq=False)
class _Box:
    """Where the hooks of one wrapper leave their values during its forward; shut outside of it."""

    taken: dict[str, Tensor] | None = None

    def put(self, name: str, value: Any) -> None:
        if self.taken is None:
            return
        if isinstance(value, (tuple, list)):
            value = value[0]
        # A copy, because what follows may write into the tensor: an in-place ReLU, a residual `x += ...`.
        self.taken[name] = value.clone()


@dataclass(eq=False)
class _Hook:
    """A class and not a closure, so that a deep copy of a wrapper (an EMA of it) writes into the copy's own box."""

    box: _Box
    name: str


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.box.put(self.name, output)


class _InputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self.box.put(self.name, args[0])


def _submodule(network: nn.Module, path: str) -> nn.Module | None:
    """The module at a path whose negative indices count from the end, or None."""
    module = network
    for word in path.split("."):
        children = dict(module.named_children())
        if word.startswith("-") and word[1:].isdigit():
            index = len(children) + int(word)
            child = list(children.values())[index] if index >= 0 else None
        else:
            child = children.get(word)
        if child is None:
            return None
        module = child
    return module


def _resolve(
    network: nn.Module, taps: Mapping[str, str], wanted: Iterable[str], key: str, asked: Mapping[str, str]
) -> dict[str, tuple[nn.Module, bool]]:
    """For each wanted name the module to hook, and whether it is its input that is wanted."""
    found: dict[str, tuple[nn.Module, bool]] = {}
    problems = []
    paths = [name for name, _ in network.named_modules() if name]
    for name in wanted:
        path = taps.get(name, name)
        module = _submodule(network, path.removesuffix(INPUT))
        if module is not None:
            found[name] = (module, path.endswith(INPUT))
        elif name in taps:
            what = f"names {path!r}, which is no module of {type(network).__name__}"
            problems.append(Problem(what, key=f"{key}.{name}", remedy=did_you_mean(path.removesuffix(INPUT), paths)))
        else:
            what = f"unknown tap {name!r} of {type(network).__name__}"
            problems.append(Problem(what, key=asked.get(name, key), remedy=did_you_mean(name.removesuffix(INPUT), [*taps, *paths])))
    if problems:
        raise Refused(problems)
    return found


def _install(
    network: nn.Module, box: _Box, taps: Mapping[str, str], wanted: Iterable[str], key: str, asked: Mapping[str, str]
) -> list[RemovableHandle]:
    return [
        module.register_forward_pre_hook(_InputHook(box, name)) if of_input else module.register_forward_hook(_OutputHook(box, name))
        for name, (module, of_input) in _resolve(network, taps, wanted, key, asked).items()
    ]


def logits_of(network: nn.Module, output: Any) -> Tensor:
    """What a network says: a tensor, or the field of that name in the outputs of transformers. Of a language model whose matrix is larger
    than its vocabulary, the true tokens alone."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise TypeError(f"its forward returns {type(output).__name__}, not logits [B, C]")
    return logits[..., : network.vocabulary] if reads_tokens(network) else logits


def reads_tokens(network: nn.Module) -> bool:
    """Whether it is a language model: it takes token ids [B, T] and says logits [B, T, V]. Such a network has `vocabulary`, its V."""
    return hasattr(network, "vocabulary")


def zeros_for(network: nn.Module, input_shape: Sequence[int], rows: int) -> Tensor:
    """An input of zeros on the network's device: token ids, or numbers of its weights' type."""
    anchor = next(network.parameters(), torch.zeros(()))
    return torch.zeros(rows, *input_shape, device=anchor.device, dtype=torch.int64 if reads_tokens(network) else anchor.dtype)


class Tapped(nn.Module):
    """A network that returns its taps: forward(x [B, ...]) -> (logits [B, C], {name: tensor [B, ...]}).

    `taps` names module paths; `wanted` are the names that are asked for, keys of `taps` or module paths themselves: only these are
    hooked. The bare network, whose state dict has plain keys, is `.module`; while it is called by itself the hooks do nothing.

    Raises `kdrun.errors.Refused`, with the nearest legal names, for a tap that the network does not have. `key` is what errors call
    the taps' place in the configuration.
    """

    def __init__(self, module: nn.Module, taps: Mapping[str, str], wanted: Iterable[str] = (), key: str = "taps") -> None:
        super().__init__()
        self.module = module
        self._box = _Box()
        _install(module, self._box, taps, wanted, key, {})

    def forward(self, x: Tensor, extra: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        taken: dict[str, Tensor] = {}
        self._box.taken = taken
        logits = logits_of(self.module, self.module(x, **taken_by(self.module, extra or {})))
        self._box.taken = None
        return logits, taken


def taken_by(network: nn.Module, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a network's forward takes beside its input: the names that its `takes` lists (a graph's edges, a time, a label)."""
    return {name: extra[name] for name in getattr(network, "takes", ())}


def ask(network: nn.Module, batch: Batch) -> Tensor:
    """What a bare network says of a batch: logits [B, C], or whatever tensor it speaks."""
    return logits_of(network, network(batch.inputs, **taken_by(network, batch.extra)))


def stand_ins(network: nn.Module, rows: int, like: Tensor) -> dict[str, Tensor]:
    """Values for what a network takes beside its input, for tracing shapes: its own `example(rows)`."""
    if not getattr(network, "takes", ()):
        return {}
    return {name: value.to(like.device) for name, value in network.example(rows).items()}  # type: ignore[operator]


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradient; afterwards every module's mode and the random state are what they were."""
    modes = [(module, module.training) for module in network.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            network.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def model_spec(
    module: nn.Module,
    input_shape: tuple[int, ...],
    taps: Mapping[str, str],
    wanted: Iterable[str] | None = None,
    key: str = "taps",
    asked: Mapping[str, str] | None = None,
) -> ModelSpec:
    """The outside of a network: classes it speaks of and shapes of its taps, from a forward of one sample of zeros.

    `input_shape` and the shapes are without the batch. `wanted`: as in `Tapped`; None is all of `taps`. BatchNorm statistics, modes
    and random state are left as they are. On the meta device it costs nothing but the trace. `asked`: for errors, the place in the
    configuration that names a tap, where that is not `key`.

    Raises `kdrun.errors.Refused` for an unknown tap, for a tap whose module did not run, and for a network that cannot take this input.
    """
    wanted = list(taps if wanted is None else wanted)
    x = zeros_for(module, input_shape, 1)
    box = _Box(taken={})
    asked = asked or {}
    handles = _install(module, box, taps, wanted, key, asked)
    try:
        with untouched(module, x.device):
            logits = logits_of(module, module(x, **stand_ins(module, 1, x)))
    except Exception as error:  # whatever a foreign network raises on an input that it was not made for
        what = f"{type(module).__name__} cannot run on an input of shape {list(input_shape)}: {error}"
        remedy = "choose a network for this input, or give it the argument that sets its input (in_channels, img_size, ...)"
        raise Refused(Problem(what, key=key.rpartition(".")[0], remedy=remedy)) from error
    finally:
        for handle in handles:
            handle.remove()
    taken = box.taken or {}
    missing = [name for name in wanted if name not in taken]
    if missing:
        what = f"did not pass a tensor in the forward of {type(module).__name__}: {', '.join(missing)}"
        where = asked.get(missing[0], key)
        raise Refused(Problem(what, key=where, remedy="tap a module that its forward calls with a positional input"))
    classes = int(logits.shape[-1 if reads_tokens(module) else 1]) if logits.dim() > 1 else 0
    shapes = {name: tuple(taken[name].shape[1:]) for name in wanted}
    return ModelSpec(classes, tuple(input_shape), shapes, tuple(logits.shape[1:]))


def tap_shapes(
    module: nn.Module, input_shape: tuple[int, ...], taps: Mapping[str, str], wanted: Iterable[str] | None = None, key: str = "taps"
) -> dict[str, tuple[int, ...]]:
    """Shapes of the taps without the batch, by name: `model_spec` without the rest."""
    return dict(model_spec(module, input_shape, taps, wanted, key).taps)
