"""A small world in which every objective of conf/objective can be asked for its terms: 12 samples, 5 classes, a step of 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from kdrun.objective.base import Objective
from kdrun.types import COUPLED_UNITS, Batch, Connectors, Context, ModelSpec, Output, Progress, Signal, Term

CONF = Path(__file__).parents[2] / "conf" / "objective"
ALL = sorted(path.stem for path in CONF.glob("*.yaml"))
DIFFUSION = {"denoise", "sfd"}  # they noise or generate what the networks see: no logits of a toy; see their own tests
DETECTION = {"detection"}  # its forward gives no logits but losses; see its own tests
LANGUAGE = {"sft", "lm_kd", "taid", "opsd", "grpo", "uld", "dpo", "simpo", "minillm"}  # see their own tests
NAMES = sorted({*ALL} - DIFFUSION - DETECTION - LANGUAGE)

CLASSES, STEP = 5, 8
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])  # by sample id; class 4 never occurs
STUDENT_TAPS: dict[str, tuple[int, ...]] = {"f2": (3, 4, 4), "pooled": (6,)}
TEACHER_TAPS: dict[str, tuple[int, ...]] = {"f2": (4, 2, 2), "pooled": (7,)}
SMALL: dict[str, dict[str, Any]] = {  # fields whose paper value needs a larger world, and taps that are there
    "crd": {"negatives": 4, "width": 8},
    "acam_kd": {"student_taps": ["f2"], "teacher_taps": ["f2"]},
    "map_mse": {"student_taps": ["f2"], "teacher_taps": ["f2"]},
}
EDGES = torch.tensor([[2, 3, 5, 6], [3, 2, 6, 5]])  # of a graph on the step's rows; no cut of a test goes through an edge
PROGRESS = Progress(step=0, total_steps=100, steps_per_epoch=10)

# The tensors of the hand-computed examples.
ZS = torch.tensor([[1, 0, -1], [0, 2, 1]], dtype=torch.float64)
ZT = torch.tensor([[2, 1, -1], [1, 3, 0]], dtype=torch.float64)
Y = torch.tensor([0, 2])


@dataclass
class Toy:
    """One objective with the inputs of one optimiser step; logits and taps of the student are leaves with gradient."""

    objective: Objective
    connectors: Connectors
    logits: Tensor
    taps: dict[str, Tensor]
    signal: Signal
    batch: Batch
    kept: dict[str, Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.logits, *self.taps.values()]

    def tensors(self) -> list[Tensor]:
        """All that student and teacher say."""
        assert self.signal.logits is not None
        return [*self.leaves(), self.signal.logits, *self.signal.taps.values()]

    def terms(self, rows: slice = slice(None)) -> dict[str, Term]:
        """The terms of the samples `rows` as one micro-batch; what they keep lands in `kept`."""
        batch = self.objective.prepare(pick_batch(self.batch, rows), PROGRESS)
        output = Output(self.logits[rows], {k: v[rows] for k, v in self.taps.items()}, {})
        assert self.signal.logits is not None
        signal = Signal(self.signal.logits[rows], {k: v[rows] for k, v in self.signal.taps.items()})
        terms = self.objective.terms(output, signal, batch, "student", self.connectors)
        self.kept = output.keep
        return terms

    def step(self) -> Tensor:
        """The loss of the step, after which the objective's state has moved as the loop moves it."""
        loss = add_up(self.objective, self.terms(), STEP)
        with torch.no_grad():
            self.objective.after_step(self.batch.ids, self.kept, PROGRESS)
        return loss


def pick_batch(batch: Batch, rows: slice) -> Batch:
    extra = {k: v[rows] if k != "edge_index" else pick_edges(v, rows) for k, v in batch.extra.items()}
    return Batch(batch.inputs[rows], batch.targets[rows], batch.ids[rows], batch.view[rows], extra)


def pick_edges(edges: Tensor, rows: slice) -> Tensor:
    """The edges [2, E] inside a stretch of rows, counted from its first."""
    start, stop, _ = rows.indices(STEP)
    return edges[:, ((edges >= start) & (edges < stop)).all(0)] - start


def add_up(objective: Objective, terms: Mapping[str, Term], samples: int, classes: int = CLASSES) -> Tensor:
    """What the loop minimises: sum of weight * sum / count."""
    weights = objective.weights(PROGRESS)
    edges = EDGES.shape[1]
    counts = {"sample": samples, "label": samples, "edge": edges, "edge_or_self": edges + samples, "covered": samples}
    counts |= {unit: number(samples, classes) for unit, number in COUPLED_UNITS.items()}
    return torch.stack([weights[name] * term.sum / counts[term.unit] for name, term in terms.items()]).sum()


def make(name: str, **values: Any) -> Objective:
    """The objective that conf/objective/<name>.yaml names, with its defaults but for the small world and `values`."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(node, dict)
    cls = get_class(node.pop("_target_"))
    return cls(**{str(k): v for k, v in node.items()} | SMALL.get(name, {}) | values)


def field_names(objective: Objective | type[Objective]) -> set[str]:
    return {f.name for f in fields(objective)}


def context(seed: int = 0, labels: Tensor = LABELS) -> Context:
    shape = (3, 8, 8)
    student, teacher = ModelSpec(CLASSES, shape, STUDENT_TAPS), ModelSpec(CLASSES, shape, TEACHER_TAPS)
    return Context(student, teacher, CLASSES, labels, seed, steps_per_epoch=10, total_steps=100)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0, **values: Any) -> Toy:
    """A toy step of the objective `name`: connectors with frozen statistics, seeded normal inputs times `scale`."""
    objective = make(name, **values)
    torch.manual_seed(seed)
    connectors = objective.setup(context()).to(torch.float64 if dtype == torch.float64 else torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(STEP, *shape, generator=generator, dtype=torch.float64)).to(dtype)

    ids = torch.randperm(len(LABELS), generator=generator)[:STEP]
    batch = Batch(torch.zeros(STEP, 1), LABELS[ids], ids, torch.ones(STEP, dtype=torch.int64), {"edge_index": EDGES})
    signal = Signal(normal(CLASSES), {k: normal(*shape) for k, shape in TEACHER_TAPS.items()})
    taps = {k: normal(*shape).requires_grad_() for k, shape in STUDENT_TAPS.items()}
    logits = normal(CLASSES).requires_grad_()
    drawn = torch.rand(STEP, CLASSES - 1, generator=generator, dtype=torch.float64)  # no mass on the class that never occurs
    soft = torch.nn.functional.pad(drawn / drawn.sum(1, keepdim=True), (0, 1))
    batch.extra["soft_targets"] = soft.to(torch.float64 if dtype == torch.float64 else torch.float32)
    batch.extra.update(peer_targets=batch.extra["soft_targets"], covered=torch.ones(STEP, dtype=torch.bool))
    return Toy(objective, connectors, logits, taps, signal, batch, {})


def logit_terms(objective: Objective, zs: Tensor, zt: Tensor, y: Tensor) -> dict[str, Term]:
    """The terms of an objective that looks at logits alone."""
    ids = torch.arange(len(y))
    return objective.terms(Output(zs, {}, {}), Signal(zt, {}), Batch(zs, y, ids, ids, {}), "student", torch.nn.ModuleDict())


def tap_terms(objective: Objective, tap: str, fs: Tensor, ft: Tensor, connectors: Connectors) -> dict[str, Term]:
    """The terms of an objective that looks at one tap on both sides."""
    ids = torch.zeros(len(fs), dtype=torch.int64)
    output, signal = Output(fs.new_zeros(len(fs), 2), {tap: fs}, {}), Signal(None, {tap: ft})
    return objective.terms(output, signal, Batch(fs, ids, ids, ids, {}), "student", connectors)


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d leaf, zeros where the loss does not look."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
