"""Device, memory format and process-wide settings."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch

from kdrun.config.paths import kept
from kdrun.errors import Problem, Refused

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "auto": None}  # auto: what kdrun.engine.choices finds
# Of mallopt(3): its parameters' numbers in glibc's malloc.h, and their values in bytes.
M_TRIM_THRESHOLD, NEVER_TRIM = -1, 2**31 - 1
M_MMAP_THRESHOLD, HEAP_BLOCK = -3, 2**30


def pick_device(hardware: Mapping[str, Any], local_rank: int = 0) -> torch.device:
    """The device of this process. Raises `Refused` where a GPU is asked for and there is none."""
    wanted = hardware["device"]
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Refused(Problem("there is no usable GPU here", "hardware.device", "", "hardware=cpu; `kdrun doctor` says what torch sees"))
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def placement_problems(tree: Mapping[str, Any], objective: Any) -> list[Problem]:
    """Why the teacher cannot be where the configuration wants it."""
    place = tree["teacher"].get("placement", "same")
    if place == "same":
        return []
    key, remedy = "teacher.placement", "same, cpu, or a GPU of this machine such as cuda:1"
    try:
        device = torch.device(place)
    except RuntimeError:
        return [Problem(f"'{place}' is no device", key, "", remedy)]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return [Problem(f"there is no {place} here", key, "", remedy)]
    if objective.needs().teacher_network:
        what = f"{type(objective).__name__} asks the teacher's network itself, so it must be where the student is"
        return [Problem(what, key, "", "teacher.placement=same")]
    return []


def set_up(hardware: Mapping[str, Any], device: torch.device, keep_memory: bool = True) -> None:
    """Process-wide settings that change speed, not results beyond float tolerance."""
    if hardware.get("threads"):
        torch.set_num_threads(int(hardware["threads"]))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept() / "inductor"))  # compiled code, for the next run
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif keep_memory:
        keep_freed_memory()
    if hardware.get("deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Let this process keep what it frees: glibc gives large blocks back at once, and to fault them in anew costs every step of a
    convolutional network thousands of page faults on a CPU. Nothing where the C library is another."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
    mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK)


def settle(device: torch.device) -> None:
    """Wait until an accelerator has done what it was asked to do: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def channels_last(hardware: Mapping[str, Any], input_shape: tuple[int, ...]) -> bool:
    """Whether images are held channels-last: faster convolutions on CPU and GPU, same results to float tolerance."""
    return len(input_shape) == 3 and hardware["channels_last"] in ("auto", True)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
