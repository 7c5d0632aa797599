"""FSDP2: a student whose weights, gradients and optimiser state do not fit one device are sharded over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kdrun.engine.distributed import Ranks

# Smaller blocks are left to their parent: a collective for each would cost more than it saves.
SMALLEST_BLOCK = 100_000
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(learner: nn.Module, ranks: Ranks, device: torch.device) -> FSDPModule:
    """Shard every large block of the student, the student, and the learner around them.

    The loop multiplies a loss by the number of ranks because DistributedDataParallel averages gradients; FSDP2 does too.
    The student is a unit of its own so that evaluation can call it without the learner.
    """
    mesh = init_device_mesh(device.type, (ranks.world,))
    student: Any = learner.student
    for block in (*blocks(student.module), student.module):
        fully_shard(block, mesh=mesh)
    return fully_shard(learner, mesh=mesh)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The members of the network's sequences (residual stages, transformer layers) that are worth a shard of their own."""
    found = []
    for module in network.modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            found += [child for child in module if sum(p.numel() for p in child.parameters()) >= SMALLEST_BLOCK]
    inner = {id(m) for block in found for m in block.modules() if m is not block}
    return [block for block in found if id(block) not in inner]


def is_sharded(module: Any) -> bool:
    return isinstance(module, FSDPModule)


def full_weights(module: nn.Module) -> dict[str, Any]:
    """All weights and buffers, whole, on the CPU of the first rank (the others get {}); a collective."""
    return get_model_state_dict(module, options=FULL)


def optimizer_state(learner: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state for a checkpoint, whole; a collective where it is sharded."""
    if not is_sharded(learner):
        return optimizer.state_dict()
    return dict(get_optimizer_state_dict(learner, optimizer, options=FULL))


def load_weights(learner: nn.Module, weights: dict[str, Any]) -> None:
    """Put whole weights back; a collective where they are sharded."""
    if is_sharded(learner):
        set_model_state_dict(learner, weights, options=StateDictOptions(full_state_dict=True))
    else:
        learner.load_state_dict(weights)


def load_optimizer(learner: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a whole optimiser state back; a collective where it is sharded."""
    if is_sharded(learner):
        set_optimizer_state_dict(learner, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


def whole(value: Tensor) -> Tensor:
    """A plain tensor of a value that may be spread over ranks (a gradient norm)."""
    return value.full_tensor() if isinstance(value, DTensor) else value
