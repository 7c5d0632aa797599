"""How what a teacher says of one item becomes bytes, and comes back.

An item is a sample, whatever the shape of what is said of it ([C], or [C, H, W] of pixels), or a scored token of a text ([V]).

    dense   every number, float16 or float32
    int8    256 steps between the least and the largest number of an item: |error| <= (max - min) / 510
    topk    the K largest as log-probabilities at the temperature of the objective, their ids, and the log-probability of all others
            together; exact for a loss that looks at these K + 1 outcomes, none of the others can be told apart

Features (taps) are kept as they are, in `dtype`. The layout is numpy's, without padding: a record an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdrun.errors import RunFailed
from kdrun.types import Kept

Name = Literal["dense", "int8", "topk"]
Records = NDArray[np.void]
LARGEST_HALF = 65504.0
STEPS = 255  # of int8
TAP = "tap "  # before the name of a feature's field


class Decoded:
    """What was read: logits [M, ...], or the kept part of them, and taps [M, ...]."""

    def __init__(self, logits: Tensor | None, kept: Kept | None, taps: dict[str, Tensor]) -> None:
        self.logits, self.kept, self.taps = logits, kept, taps


@dataclass(frozen=True)
class Format:
    """`shape`: of the logits of an item, None where they are not asked for; `taps`: of the features, by name."""

    name: Name
    shape: tuple[int, ...] | None
    taps: Mapping[str, tuple[int, ...]]
    dtype: Literal["fp16", "fp32"] = "fp16"
    k: int = 100
    temperature: float = 1.0

    def describe(self) -> dict[str, Any]:
        """What must be the same for two caches to hold the same bytes."""
        found: dict[str, Any] = {"name": self.name, "logits": None if self.shape is None else list(self.shape), "dtype": self.dtype}
        found["taps"] = {name: list(shape) for name, shape in sorted(self.taps.items())}
        return found | ({"k": self.k, "temperature": self.temperature} if self.name == "topk" else {})

    def __str__(self) -> str:
        return {"dense": f"dense {self.dtype}", "int8": "int8", "topk": f"top {self.k} + the rest"}[self.name]

    @property
    def tolerance(self) -> float:
        """How far two readings of an item by one teacher may be apart, as a share of the range of what is compared: a forward pass of
        another batch differs in the last bits, then the format rounds."""
        return {"fp32": 1e-4, "fp16": 2e-3}[self.dtype] if self.name != "int8" else 1e-2

    @property
    def record(self) -> np.dtype[np.void]:
        """The bytes of an item."""
        number = "<f2" if self.dtype == "fp16" else "<f4"
        fields: list[tuple[Any, ...]] = []
        if self.shape is not None and self.name == "dense":
            fields = [("logits", number, self.shape)]
        elif self.shape is not None and self.name == "int8":
            fields = [("steps", "u1", self.shape), ("least", "<f4"), ("step", "<f4")]
        elif self.shape is not None:
            index = "<u2" if self.shape[0] <= 2**16 else "<u4"
            fields = [("ids", index, (self.k,)), ("log_probs", number, (self.k,)), ("log_rest", "<f4")]
        return np.dtype([*fields, *((TAP + name, number, shape) for name, shape in sorted(self.taps.items()))])

    def encode(self, logits: Tensor | None, taps: Mapping[str, Tensor]) -> Records:
        """Logits [M, ...] and taps [M, ...] to records [M]. Raises `RunFailed` for a number that half precision cannot hold."""
        given: dict[str, Tensor] = {TAP + name: taps[name] for name in self.taps}
        if self.shape is not None and logits is not None:
            given |= self._parts(logits.detach().float())
        rows = len(next(iter(given.values())))
        records = np.zeros(rows, self.record)
        for name, value in given.items():
            if records[name].dtype == np.float16 and float(value.detach().abs().nan_to_num(posinf=0).amax() if rows else 0) > LARGEST_HALF:
                raise RunFailed(f"the teacher says numbers above {LARGEST_HALF:.0f}, which float16 cannot hold: cache.dtype=fp32")
            records[name] = value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy()
        return records

    def _parts(self, logits: Tensor) -> dict[str, Tensor]:
        if self.name == "dense":
            return {"logits": logits}
        if self.name == "int8":
            flat = logits.flatten(1)
            least, most = flat.amin(1), flat.amax(1)
            step = (most - least) / STEPS
            scaled = (flat - least[:, None]) / step.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            return {"steps": scaled.round().to(torch.uint8).view(logits.shape), "least": least, "step": step}
        log_probs = torch.log_softmax(logits / self.temperature, -1)
        largest, ids = log_probs.topk(self.k, -1)
        # Summed over the others: 1 minus the kept mass would cancel where that is nearly all.
        rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
        return {"ids": ids, "log_probs": largest, "log_rest": rest}

    def decode(self, records: Records, device: torch.device | str) -> Decoded:
        """Records [M] to float32 tensors on the device."""

        def field(name: str) -> Tensor:
            raw = np.ascontiguousarray(records[name])
            wanted = np.int64 if raw.dtype.kind == "u" and raw.dtype.itemsize > 1 else raw.dtype
            return torch.from_numpy(raw.astype(wanted)).to(device, non_blocking=True)

        taps = {name: field(TAP + name).float() for name in self.taps}
        if self.shape is None:
            return Decoded(None, None, taps)
        if self.name == "topk":
            return Decoded(None, Kept(field("ids"), field("log_probs").float(), field("log_rest")), taps)
        if self.name == "dense":
            return Decoded(field("logits").float(), None, taps)
        flat = field("steps").flatten(1).float() * field("step")[:, None] + field("least")[:, None]
        return Decoded(flat.view(-1, *self.shape), None, taps)
