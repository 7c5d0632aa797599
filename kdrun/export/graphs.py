"""A student as a graph that needs none of its code: torch.export's .pt2 and ONNX, with a free batch size, held against the student."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.errors import CheckFailed, Problem, Refused
from kdrun.student.taps import logits_of, reads_tokens, stand_ins

TRACED = 2  # rows of the example: torch.export takes 0 and 1 for special
CHECKED = 256  # samples of the test split on which a graph is held against the student
BATCH = 64
# Largest difference of a logit, as a share of the largest logit (at least 1): what fp32 sums lose when they are taken in another order,
# as other kernels do; a wrong layer is off by orders of magnitude more. (Ours.)
TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Parity:
    """How far a graph is from the student on real samples of the test split."""

    samples: int
    max_difference: float  # of a logit
    largest: float  # logit in absolute value
    agreement: float  # share of equal argmax over classes
    tolerance: float  # of the difference, absolute

    @property
    def holds(self) -> bool:
        return self.max_difference <= self.tolerance  # NaN does not

    def __str__(self) -> str:
        return f"max difference {self.max_difference:.2g} (tolerance {self.tolerance:.2g}), argmax equal in {self.agreement:.2%}"


class Plain(nn.Module):
    """A student that takes tensors in order and says logits alone, in fp32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.names = network, tuple(getattr(network, "takes", ()))

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        return logits_of(self.network, self.network(x, **dict(zip(self.names, beside, strict=False))))


def cannot(network: nn.Module, data: Data) -> str | None:
    """Why there can be no graph of this student; None where one can be tried."""
    if data.whole:
        return "what it says of a node depends on the edges of one whole graph, so it has no free batch size"
    return None


def missing_packages(formats: tuple[str, ...]) -> list[Problem]:
    absent = [p for p in PACKAGES if importlib.util.find_spec(p) is None] if "onnx" in formats else []
    if not absent:
        return []
    what = f"ONNX needs {', '.join(absent)}, which {'are' if len(absent) > 1 else 'is'} not installed"
    return [Problem(what, "--format onnx", "", 'pip install "kdrun[export]"')]


def samples(network: nn.Module, data: Data) -> Iterator[tuple[Tensor, ...]]:
    """What the student takes, for real samples of the test split: batches of several sizes, the last one of a single sample."""
    done = 0
    for batch in data.batches("test", BATCH):
        made = stand_ins(network, len(batch.ids), batch.inputs)  # a time or a class that the data do not have
        beside = [batch.extra.get(name, made.get(name)) for name in made]
        rows = (batch.inputs, *(value for value in beside if value is not None))
        yield rows
        done += len(batch.ids)
        if done >= CHECKED:
            break
    yield tuple(row[:1] for row in rows)


def trace(network: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """torch.export of a student. Raises whatever that raises."""
    batch = torch.export.Dim.DYNAMIC
    free: dict[int, Any] = {0: batch, 1: batch} if reads_tokens(network) else {0: batch}  # of texts the length too
    inputs = tuple(row[:TRACED].contiguous() for row in example)
    beside = tuple(free if row.ndim >= len(free) else {0: batch} for row in inputs[1:])
    shapes = (free, beside) if beside else (free,)
    with quiet():
        return torch.export.export(Plain(network).eval(), inputs, dynamic_shapes=shapes, strict=False)


def write_torch(program: torch.export.ExportedProgram, file: Path) -> Run:
    """Write a .pt2; the function that runs what was written."""
    with quiet():
        torch.export.save(program, str(file))
        loaded = torch.export.load(str(file)).module()
    return lambda inputs: loaded(*inputs)


def write_onnx(program: torch.export.ExportedProgram, file: Path) -> Run:
    """Write an ONNX file; the function that runs what was written, in onnxruntime on the CPU."""
    with quiet():
        torch.onnx.export(
            program, kwargs=None, dynamo=True, input_names=["input"], output_names=["logits"], external_data=False, verbose=False
        ).save(str(file))  # type: ignore[union-attr]
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        given = {name: row.numpy() for name, row in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


@torch.inference_mode()
def parity(network: nn.Module, run: Run, data: Data) -> Parity:
    """Hold a written graph against the student."""
    plain, count, items, equal = Plain(network).eval(), 0, 0, 0
    difference = largest = torch.zeros(())
    for inputs in samples(network, data):
        ours, theirs = plain(*inputs), run(inputs)
        if ours.shape != theirs.shape:
            raise CheckFailed(f"the graph says {list(theirs.shape)} where the student says {list(ours.shape)}")
        difference = torch.maximum(difference, (ours - theirs).abs().max())  # NaN stays
        largest = torch.maximum(largest, ours.abs().max())
        classes = -1 if reads_tokens(network) else 1
        same = ours.argmax(classes) == theirs.argmax(classes)
        count, items, equal = count + len(ours), items + same.numel(), equal + int(same.sum())
    return Parity(count - 1, float(difference), float(largest), equal / items, TOLERANCE * max(1.0, float(largest)))


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def refused(what: str, network: nn.Module, error: Exception) -> Refused:
    said = f"{what} cannot take this {type(network).__name__}: {first_line(error)}"
    return Refused(Problem(said, "--format", "", "--format safetensors, whose weights load into the network's own code"))


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters talk on both streams and by warnings; what matters they raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
