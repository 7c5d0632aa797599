"""Device, precision and compilation: what was chosen and why, in one line each."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch

from kdrun.errors import Problem, Refused

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


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


def set_up(hardware: Mapping[str, Any], device: torch.device) -> None:
    """Process-wide settings that change speed, not results beyond float tolerance."""
    if hardware.get("threads"):
        torch.set_num_threads(int(hardware["threads"]))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if hardware.get("deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def decide_compile(hardware: Mapping[str, Any], device: torch.device, total_steps: int, compilable: bool = True) -> tuple[bool, str]:
    """(compile?, the reason). `auto` compiles on a GPU for runs that are long enough to pay for it, and not on a CPU,
    where compiled convolutions are measured to be slower for some pairs."""
    wanted = hardware["compile"]
    if not compilable:
        return False, "compile off: this objective cannot be compiled"
    if wanted != "auto":
        return wanted == "on", f"compile {wanted}: as asked"
    if device.type != "cuda":
        return False, "compile off: auto does not compile on a CPU (hardware.compile=on tries)"
    if total_steps < 500:
        return False, f"compile off: {total_steps} steps would not repay about a minute of compilation"
    return True, f"compile on: {total_steps} steps on a GPU"


def channels_last(hardware: Mapping[str, Any], input_shape: tuple[int, ...]) -> bool:
    """Whether images are held channels-last: faster convolutions on CPU and GPU, same results to float tolerance."""
    return len(input_shape) == 3 and hardware["channels_last"] in ("auto", True)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
