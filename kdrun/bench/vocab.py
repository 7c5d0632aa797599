"""One step of a divergence over a large vocabulary: logits of all tokens at once, against a chunk of tokens at a time.

`python -m kdrun.bench.vocab` runs one case and prints its seconds, its peak memory above the inputs, its loss and how far its gradient is
from that of a reference in float64 on a few rows. The step is that of training: projection of student and teacher, loss, gradients of the
student's hidden states and of its head.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses import token
from kdrun.losses.chunked import RowLoss, chunked_sum, head, stored
from kdrun.losses.divergence import cross_entropy

LOSSES = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
CASES = ("dense", "chunked")
CHECKED = 32  # tokens whose gradient is computed in float64 too
WARM_UP = 64  # tokens of a first step, which is not timed


def loss_named(name: str) -> RowLoss:
    """Of rows of student logits [N, V], and teacher logits [N, V] or labels [N]."""
    choices: dict[str, RowLoss] = {
        "forward_kl": token.forward_kl,
        "reverse_kl": token.reverse_kl,
        "jsd": partial(token.generalised_jsd, beta=0.5),
        "cross_entropy": cross_entropy,
    }
    return choices[name]


class Inputs:
    """Hidden states [N, D], heads [V, D] of student and teacher, labels [N]; logits of standard deviation 3."""

    def __init__(self, vocab: int, tokens: int, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.hidden, self.theirs = (torch.randn(tokens, width, device=device) for _ in range(2))
        self.weight, self.their_weight = (torch.randn(vocab, width, device=device).mul_(3 / width**0.5) for _ in range(2))
        self.labels = torch.randint(vocab, (tokens,), device=device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def first(self, tokens: int, dtype: torch.dtype) -> Inputs:
        """The same for the first tokens, in another precision."""
        part = object.__new__(Inputs)
        part.hidden, part.theirs = (t.detach()[:tokens].to(dtype) for t in (self.hidden, self.theirs))
        part.weight, part.their_weight = (t.detach().to(dtype) for t in (self.weight, self.their_weight))
        part.labels = self.labels[:tokens]
        part.hidden.requires_grad_()
        return part


def step(case: str, name: str, given: Inputs) -> Tensor:
    """The mean loss over the tokens."""
    loss, count = loss_named(name), len(given.labels)
    if case == "dense":
        logits = F.linear(given.hidden, given.weight)
        with torch.no_grad():
            target = given.labels if name == "cross_entropy" else F.linear(given.theirs, given.their_weight)
        return loss(logits, target).mean()
    targets = stored(given.labels) if name == "cross_entropy" else head(given.theirs, given.their_weight)
    weights = torch.full((count,), 1 / count, device=given.hidden.device)
    return chunked_sum(given.hidden, given.weight, None, targets, loss, weights).sum


def measured(case: str, name: str, vocab: int, tokens: int, width: int) -> dict[str, Any]:
    """One timed step of a case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = Inputs(vocab, tokens, width, device)
    # In float64 the dense form of a few tokens is the truth for both.
    small = given.first(min(CHECKED, tokens), torch.float64)
    step("dense", name, small).backward(inputs=[small.hidden])
    truth = small.hidden.grad
    assert truth is not None
    mine = given.first(min(CHECKED, tokens), torch.float32)
    torch.autograd.backward(step(case, name, mine), inputs=[mine.hidden])
    assert mine.hidden.grad is not None
    off = float((mine.hidden.grad.double() - truth).norm() / truth.norm())
    del small, mine
    torch.autograd.backward(step(case, name, given.first(min(WARM_UP, tokens), torch.float32)))
    before, peak = memory(device)
    _settle(device)
    started = time.perf_counter()
    value = step(case, name, given)
    value.backward()
    _settle(device)
    seconds = time.perf_counter() - started
    return {"case": case, "seconds": seconds, "bytes": peak() - before, "loss": float(value.detach()), "gradient_off": off}


def memory(device: torch.device) -> tuple[int, Any]:
    """(bytes in use now, a function that gives the peak from now on)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated()), lambda: int(torch.cuda.max_memory_allocated())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak of the resident set begins anew (proc(5))
    return _status("VmRSS"), lambda: _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--loss", choices=LOSSES, default="forward_kl")
    for name in ("vocab", "tokens", "width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    print(json.dumps(measured(given.case, given.loss, given.vocab, given.tokens, given.width)))


if __name__ == "__main__":
    main()
