"""Ranks: one object that is trivial for one process and torch.distributed for several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """The processes that share a step. `world` 1 needs no process group."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @staticmethod
    def join() -> Ranks:
        """Join the process group that torchrun announced in the environment, or be alone."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 or "RANK" not in os.environ:
            return Ranks()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if not dist.is_initialized():
            cuda = torch.cuda.is_available() and os.environ.get("KDRUN_DEVICE") != "cpu"
            if cuda:
                torch.cuda.set_device(local)
            dist.init_process_group("nccl" if cuda else "gloo")
        return Ranks(int(os.environ["RANK"]), world, local)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place; stays on the device."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes (one host sync; used off the hot path)."""
        if self.world == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum(torch.tensor(int(flag), device=device)).item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather_with_grad(self, rows: Tensor) -> Tensor:
        """[B_r, ...] of each rank -> [sum B_r, ...] on every rank, in rank order; the gradient flows back to the owner."""
        return self._gather(rows, with_grad=True)

    def gather(self, rows: Tensor) -> Tensor:
        """Like `gather_with_grad` without gradient."""
        return self._gather(rows.detach(), with_grad=False)

    def _gather(self, rows: Tensor, with_grad: bool) -> Tensor:
        if self.world == 1:
            return rows
        sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
        counts = [int(s) for s in sizes]
        most = max(counts)
        # all_gather wants equal shapes; the tail batch of an epoch may differ by one row between ranks.
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) if len(rows) < most else rows.contiguous()
        if with_grad and rows.is_floating_point():
            from torch.distributed.nn.functional import all_gather

            parts = list(all_gather(padded))
        else:
            parts = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(parts, padded.detach())
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])


@contextmanager
def synced(module: Any, last: bool) -> Iterator[None]:
    """Gradients are exchanged over ranks on the last micro-batch of a step only."""
    if isinstance(module, DistributedDataParallel):
        with nullcontext() if last else module.no_sync():
            yield
    else:
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last)  # FSDP2
        yield
