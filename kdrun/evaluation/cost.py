"""What a model costs: parameters, FLOPs of one sample, time of a forward pass.

Every function leaves the module's train/eval flags and buffers and torch's random state as it found them.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdrun.student.taps import stand_ins, zeros_for


def parameters(module: nn.Module) -> int:
    """The number of parameters, trained or frozen; one that is shared counts once."""
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """FLOPs of the forward pass of ONE sample of shape `input_shape` (without the batch), in eval mode.

    A multiply-add is 2 FLOPs, twice the "MACs" that many papers print under the name of FLOPs. Counted are matrix
    products, convolutions and attention; not biases, norms, activations and pooling.
    """
    with _untouched(module), torch.no_grad(), _no_fast_path(), FlopCounterMode(display=False) as counter:
        sample = zeros_for(module, input_shape, 1)
        module(sample, **stand_ins(module, 1, sample))
    return int(counter.get_total_flops())


def latency(module: nn.Module, input_shape: Sequence[int], batch_size: int = 1, repeats: int = 20) -> dict[str, float]:
    """Wall-clock time of a forward pass on the module's device, in eval and inference mode, after warm-up.

    Returns `median_ms`, `min_ms` and `max_ms` of a batch of `batch_size` over `repeats` passes, and `samples_per_s` at the
    median. The clock waits for the device. Uses the process's current number of threads.
    """
    # Imported here, and its logger quietened: on a machine with the CUDA toolkit and no GPU the import prints a warning.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    sample = zeros_for(module, input_shape, batch_size)
    beside = stand_ins(module, batch_size, sample)
    known = {"module": module, "sample": sample, "beside": beside}
    timer = Timer("module(sample, **beside)", globals=known, num_threads=torch.get_num_threads())
    with _untouched(module), torch.inference_mode():
        seconds = [timer.timeit(1).median for _ in range(repeats)]  # each is preceded by untimed passes of the Timer's own
    median = statistics.median(seconds)
    return {
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "samples_per_s": batch_size / median,
    }


def table(
    student: nn.Module,
    teacher: nn.Module | None,
    input_shape: Sequence[int],
    *,
    with_latency: bool = False,
    batch_size: int = 1,
    repeats: int = 20,
) -> list[dict[str, str | float]]:
    """One row per model: `model` ("student", "teacher"), `parameters`, `flops`, and `latency_ms` (median) if asked for."""
    rows: list[dict[str, str | float]] = []
    for name, module in (("student", student), ("teacher", teacher)):
        if module is None:
            continue
        row: dict[str, str | float] = {"model": name, "parameters": parameters(module), "flops": flops(module, input_shape)}
        if with_latency:
            row["latency_ms"] = latency(module, input_shape, batch_size, repeats)["median_ms"]
        rows.append(row)
    return rows


def _anchor(module: nn.Module) -> Tensor:
    """A tensor on the module's device, of its floating dtype where it has one."""
    tensors = list(chain(module.parameters(), module.buffers()))
    return next((t for t in tensors if t.is_floating_point()), tensors[0].float() if tensors else torch.zeros(()))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without gradient, torch's encoder layer and attention become one fused operator, which the counter takes for 0 FLOPs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; on leaving, the flag of every submodule, every buffer and the random state are as before."""
    flags = [(m, m.training) for m in module.modules()]
    buffers = [(m, name, b, b.clone()) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    device = _anchor(module).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for owner, flag in flags:
                owner.training = flag
            for owner, name, buffer, value in buffers:
                # A forward may have written into the buffer, or put another tensor in its place.
                setattr(owner, name, buffer)
                with torch.no_grad():
                    buffer.copy_(value)
