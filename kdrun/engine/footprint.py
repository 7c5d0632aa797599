"""How much memory one optimiser step takes, from a step on tensors that have a shape and no content: no arithmetic and no memory.

Counted is every byte that is allocated while the step runs, as torch's allocator would be asked for it: what autograd saves, what is
alive for a moment (among it the teacher's forward, which saves nothing), gradients, and the state that an optimiser makes at its first
step (the momentum of SGD, the two moments of Adam). Not counted are the libraries' own workspaces and what an allocator holds in reserve.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrun.engine.build import Built
from kdrun.engine.device import DTYPES
from kdrun.engine.loop import add_up
from kdrun.engine.optim import build_optimizer, for_phase
from kdrun.teacher.live import LiveTeacher
from kdrun.types import COUPLED_UNITS, Batch, Progress, Signal

NOT_COUNTED = 1.0  # items of a unit: a divisor changes no shape


class Allocated(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def footprint(tree: Mapping[str, Any], built: Built, batch: Batch, rows: int, device: torch.device) -> dict[str, int] | None:
    """Bytes of a step whose micro-batches have `rows` rows like those of `batch`, prepared by the objective; None where the step
    cannot be followed without content (a method that looks at values to decide on shapes).

    `weights` and `teacher` are there before the first step; `gradients`, `optimiser state` and `activations` (the rest of the peak)
    come with it. Nothing of the run is changed: weights, statistics, random state and the objective are as before.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return _footprint(tree, built, batch, rows, device)
    except Exception:  # whatever a method or a foreign network raises on tensors without content: an estimate is no reason to fail
        return None


def _footprint(tree: Mapping[str, Any], built: Built, batch: Batch, rows: int, device: torch.device) -> dict[str, int]:
    objective, learner = built.objective, built.learner
    progress = Progress(0, built.total_steps, built.steps_per_epoch)
    shapes, counter = FakeTensorMode(allow_non_fake_inputs=True), Allocated()
    weights = {n: shapes.from_tensor(p.detach()).requires_grad_(p.requires_grad) for n, p in learner.named_parameters()}
    state = weights | {n: shapes.from_tensor(b) for n, b in learner.named_buffers()}
    kind = DTYPES[tree["hardware"]["dtype"]]
    autocast = torch.autocast(device.type, kind) if kind else nullcontext()
    peak = grown = gradients = 0
    with shapes, counter:
        many = _grown(batch, rows)
        with autocast:
            signal: Signal = built.teacher.signal(many, objective.needs())
        for phase in objective.phases:
            trained = {n: p for n, p in weights.items() if n.startswith(objective.trained_in(phase)) and p.requires_grad}
            optimizer = build_optimizer([nn.Parameter(p.detach()) for p in trained.values()], for_phase(tree["optim"], phase))
            with autocast:
                terms, _ = functional_call(learner, state, (many, signal, phase))
            units = {term.unit for term in terms.values()} | {*COUPLED_UNITS}
            loss = add_up(terms, objective.weights(progress), dict.fromkeys(units, torch.tensor(NOT_COUNTED)))
            own = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            gradients = max(gradients, bytes_of([g for g in own if g is not None]))
            peak, counter.peak = max(peak, counter.peak), counter.now
            before = counter.now
            for parameter, gradient in zip((p for g in optimizer.param_groups for p in g["params"]), own, strict=True):
                parameter.grad = gradient
            optimizer.step()
            states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
            grown += bytes_of(states)
            peak = max(peak, counter.peak - (counter.now - before))  # what the update itself takes for a moment
            optimizer.zero_grad(set_to_none=True)
            del loss, terms, own, states, gradient, parameter
    return {
        "weights": bytes_of(list(learner.parameters())) + bytes_of(list(learner.buffers())),
        "gradients": gradients,
        "optimiser state": grown,
        "teacher": teacher_bytes(built),
        "activations": max(0, peak - gradients),
    }


def _grown(batch: Batch, rows: int) -> Batch:
    """A batch of so many rows, of which only the shapes are true. What all rows share stays as it is."""
    own = len(batch.ids)

    def grow(t: Tensor) -> Tensor:
        return torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device=t.device) if t.dim() and t.shape[0] == own else t

    extra = {name: grow(t) for name, t in batch.extra.items()}
    return Batch(grow(batch.inputs), grow(batch.targets), grow(batch.ids), grow(batch.view), extra)


def teacher_bytes(built: Built) -> int:
    if not isinstance(built.teacher, LiveTeacher):
        return 0
    return bytes_of([*built.teacher.module.parameters(), *built.teacher.module.buffers()])


def bytes_of(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
