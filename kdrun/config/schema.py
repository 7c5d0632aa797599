"""The typed shape of the fixed parts of the tree. Parts that name a class by `_target_` are typed by that class.

A field's type is what `kdrun.config.check` holds a value against; ranges are checked in `rules`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

# What a recipe's paper is about; the ledger can be narrowed to one.
Family = Literal["image", "dense", "graph", "federated", "cross-modal", "language", "diffusion", "search", "theory", "security"]


@dataclass(frozen=True)
class Run:
    dir: str | None = None
    root: str = "outputs"
    seeds: list[int] | int | None = None  # n: the seeds 1 to n; composed to a list
    rivals: bool = False
    packed: bool = False
    dry: bool = False
    max_steps: int | None = None
    log_every: int = 50
    diagnose: bool = False
    checkpoint_every: float = 1
    keep: int = 2
    ledger: bool = False
    allow: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves. `milestones` below 1 are fractions of the run, others are epochs."""

    name: Literal["constant", "cosine", "multistep", "poly"] = "constant"
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    power: float = 0.9  # poly: of the share of the run that is left


@dataclass(frozen=True)
class Optim:
    name: str = "momentum"  # any optimiser name of timm
    lr: float = 0.05
    weight_decay: float = 0.0
    momentum: float | None = None
    betas: list[float] | None = None
    eps: float | None = None
    epochs: float = 1
    steps: int | None = None  # optimiser steps instead of epochs
    schedule: Schedule = Schedule()
    clip_norm: float | None = None
    clip_value: float | None = None
    ema: float | None = None
    phases: dict[str, Any] = field(default_factory=dict)  # keys of this group by phase, for objectives of several


@dataclass(frozen=True)
class Slurm:
    executor: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_task: int = 8
    memory_gb: int | None = None
    timeout_min: int = 1440
    wait: bool = True


@dataclass(frozen=True)
class Hardware:
    kind: Literal["local", "ranks", "slurm"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    procs: int | None = 1  # ranks on one machine; null: one per GPU
    wrap: Literal["ddp", "fsdp2"] = "ddp"
    micro_batch: int | list[int] | None = None
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"
    compile: Literal["auto", "on", "off"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    threads: int | None = None
    deterministic: bool = False
    slurm: Slurm = Slurm()


@dataclass(frozen=True)
class Cache:
    """What is kept of a live teacher (`kdrun.cache`)."""

    format: Literal["dense", "int8", "topk"] | None = None
    dtype: Literal["fp16", "fp32"] = "fp16"
    k: int = 100
    limit_gb: float = 50.0
    path: str | None = None


@dataclass(frozen=True)
class Claim:
    metric: str = "top1"
    value: float = 0.0
    tolerance: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class TeacherKeys:
    """Keys of the teacher group beside the model's own arguments."""

    kind: str = "none"
    policy: Literal["eval"] = "eval"
    claim: Claim | None = None
    renormalise: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    input_size: list[int] | None = None
    classes: int | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    speaks: Literal["classes", "tensor"] = "classes"
    decay: float = 0.999  # kind ema: of the moving average of the student
    corrupt: float = 0.0  # so many of the training samples get what the teacher says of another one
    placement: str = "same"  # of its weights: the student's device, or another one
    prompt: Literal["own", "privileged"] = "own"  # privileged: it reads the prompts that the data set has for it
    extra: str | None = None  # kind truth: the row of Batch.extra that speaks
    checkpoint: str | None = None
    rename: list[list[str]] = field(default_factory=list)
    taps: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentKeys:
    checkpoint: str | None = None
    rename: list[list[str]] = field(default_factory=list)
    taps: dict[str, str] = field(default_factory=dict)
    speaks: Literal["classes", "tensor"] = "classes"  # tensor: its forward gives no class scores and is not held against the class count


@dataclass(frozen=True)
class Paper:
    title: str = ""
    authors: str = ""
    arxiv: str | None = None
    venue: str | None = None
    year: int = 0
    code: str | None = None


@dataclass(frozen=True)
class Published:
    metric: str = "top1"
    table: str = ""
    protocol: str = "last"
    n: int | None = None
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Top:
    """The keys of the whole tree; the groups are typed apart."""

    seed: int = 1
    run: Run = Run()
    name: str | None = None
    method: str | None = None
    paper: Paper | None = None
    scale: Literal["bench", "paper"] = "bench"
    family: Family | None = None
    about: str | None = None
    published: list[Published] = field(default_factory=list)
    rivals: dict[str, list[str]] = field(default_factory=dict)
    claims: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    optim: Optim = Optim()
    hardware: Hardware = Hardware()
    cache: Cache = Cache()
    track: dict[str, Any] = field(default_factory=dict)  # each tracker is typed by the class that it names
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


STUDENT_KEYS = {f.name for f in fields(StudentKeys)}
TEACHER_KEYS = {f.name for f in fields(TeacherKeys)}
FIXED = {"run": Run, "optim": Optim, "hardware": Hardware, "cache": Cache}


def with_new_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree that an earlier version wrote, with the keys that have come since at their defaults: what they were before."""
    fresh = asdict(Top())
    found = {**{key: fresh[key] for key in ("track", "cache", "family") if key not in tree}, **tree}
    return found | {group: {**asdict(kind()), **(found.get(group) or {})} for group, kind in FIXED.items()}
