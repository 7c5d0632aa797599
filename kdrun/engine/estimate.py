"""What a run will cost, from its configuration alone: shapes, memory, steps and time, with a probe of a few real steps."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kdrun.config.check import instantiate
from kdrun.config.compose import Composed
from kdrun.config.targets import ALLOWED, allowed, component
from kdrun.dataset.base import Data, Request, Split, Storage, taken
from kdrun.dataset.tokens import TokenSplit
from kdrun.dataset.vocabulary import Symbols
from kdrun.engine import loop, provenance
from kdrun.engine.build import Built, build_first, load_data
from kdrun.engine.caching import cache_facts
from kdrun.engine.device import pick_device, set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.report import Reporter
from kdrun.engine.run import title
from kdrun.engine.stage import make_stage
from kdrun.evaluation import cost
from kdrun.plan.single import teacher_stage
from kdrun.student.taps import model_spec
from kdrun.student.weights import bare
from kdrun.teacher.live import LiveTeacher
from kdrun.types import ModelSpec

PROBE_STEPS = 3
PROBE_ROWS = 500  # of the training split, at most
PROBE_WEIGHTS = 2**27  # of language models that are made in earnest
PROBE_FLOPS = 3e10  # of one probed step: seconds on a CPU core, nothing on a GPU


class _StandIn:
    """Rows of the right shape and number without their content."""

    prefetches = False

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self.rows, self.shape = rows, shape

    def __len__(self) -> int:
        return self.rows

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        return torch.randn(len(request.positions), *self.shape, device=device)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, self.fetch(request, device)

    def digest(self, into: Any) -> None:
        into.update(repr(self.shape).encode())


def stand_in(node: Mapping[str, Any], packages: Collection[str] = ALLOWED) -> Data | None:
    """The data set's outside, from its stated sizes; None where they are not stated and it must be loaded. One whose targets are not a
    class for each row makes its own splits: `stand_in(storage, ids, input_shape, classes)` of its class."""
    sizes, shape, classes = node.get("sizes"), node.get("input_shape"), node.get("classes")
    if not sizes or not shape or not classes or node.get("teacher_tokenizer"):
        return None
    held = round(float(node.get("validation") or 0) * sizes["train"])
    train = int(node.get("subset") or sizes["train"] - held)
    make = getattr(component(node.get("_target_"), packages, "dataset"), "stand_in", _classes_in_turn)
    splits, first = {}, 0
    for name, rows in (("train", train), ("validation", held), ("test", int(node.get("subset_test") or sizes["test"]))):
        if not rows:
            continue
        splits[name] = make(_StandIn(rows, tuple(shape)), torch.arange(first, first + rows), tuple(shape), classes)
        first += rows
    names = tuple(map(str, range(classes)))
    mean, std = (tuple(node.get(key) or ()) for key in ("mean", "std"))
    data = Data(str(node["name"]), names, tuple(shape), mean, std, splits, first)
    return _as_text(data, node) if isinstance(data.split("train"), TokenSplit) else data


def _as_text(data: Data, node: Mapping[str, Any]) -> Data:
    """With what a text brings beside its rows."""
    splits = {
        name: replace(s, privileged=s.storage) if node.get("privileged") and isinstance(s, TokenSplit) else s
        for name, s in data.splits.items()
    }
    reward = (lambda right, written: 0.0) if node.get("reward") else None
    return replace(data, splits=splits, vocabulary=Symbols(data.class_names), reward=reward)


def _classes_in_turn(storage: Storage, ids: Tensor, shape: Sequence[int], classes: int) -> Split:
    return Split(storage, torch.arange(len(ids)) % classes, ids)


def estimate(composed: Composed, probe: bool) -> dict[str, Any]:
    """Parameters, FLOPs, taps, steps, memory and (with `probe`) seconds, as plain data. Raises `Refused` as the run would."""
    tree = dict(composed.tree)
    # Weights cost no time here and may need a network; the outside of a model is the same without them.
    for who in ("teacher", "student"):
        tree[who] = {**tree[who], **{key: False for key in ("pretrained", "pretrained_backbone") if key in tree[who]}}
    device = pick_device(tree["hardware"])
    set_up(tree["hardware"], device)
    data = stand_in(tree["dataset"], allowed(tree)) or load_data(tree)
    # Language models may not fit into this machine's memory: their shapes do. Small ones are then made in earnest, for the probe.
    shapes = FakeTensorMode(allow_non_fake_inputs=True) if data.vocabulary is not None else None
    whole = tree if shapes is None else {**tree, "student": {**tree["student"], **({"lora": None} if "lora" in tree["student"] else {})}}
    built = build_first(whole, data, device, Ranks(), shapes)
    small = shapes is None or _weights(built) <= PROBE_WEIGHTS
    data = built.data
    needs = built.objective.needs()
    spec = model_spec(built.network, data.input_shape, tree["student"].get("taps") or {}, needs.student_taps)
    models = {"student": _model(built.network, spec)}
    taps = {f"student {n}": list(s) for n, s in spec.taps.items()}
    if isinstance(built.teacher, LiveTeacher) and built.teacher.spec is not None:
        models["teacher"] = _model(bare(built.teacher.module), built.teacher.spec)
        taps |= {f"teacher {n}": list(s) for n, s in built.teacher.spec.taps.items()}
    batch = int(tree["source"].get("batch_size") or len(data.split("train")))
    micro = tree["hardware"]["micro_batch"] or batch
    micro = max(micro) if isinstance(micro, list) else min(int(micro), batch)
    document: dict[str, Any] = {
        "title": f"{title(composed)} on {data.name}",
        "models": models,
        "taps": taps,
        "steps_per_epoch": built.steps_per_epoch,
        "total_steps": built.total_steps,
        "batch": batch,
        "micro_batch": micro,
        "teacher_is_trained_first": teacher_stage(composed.tree, data.fingerprint) is not None,
    }
    if probe and small:
        real = built if shapes is None else build_first(tree, data, device, Ranks())
        document |= _probe(tree, real, models, micro, device)
    elif not small:
        document["memory_bytes"] = _least_memory(built, bool(tree["student"].get("lora")))
    document["flops"] = (3 * models["student"]["flops"] + models.get("teacher", {"flops": 0})["flops"]) * batch * built.total_steps
    document["facts"] = _facts(document, composed, len(data.splits["train"])) | cache_facts(tree, built)
    return document


def _least_memory(built: Built, adapters: bool) -> dict[str, int]:
    """What a model that is too large to try here takes at least: float32 gradients and Adam's two moments beside its weights."""
    own = list(built.network.parameters())
    found = {"weights": _bytes(own)} | (
        {} if adapters else {"gradients": _bytes(own), "optimiser state": 8 * cost.parameters(built.network)}
    )
    return found | ({"teacher": _bytes(list(built.teacher.network.parameters()))} if isinstance(built.teacher, LiveTeacher) else {})


def _weights(built: Built) -> int:
    """Of student and teacher."""
    return cost.parameters(built.network) + (cost.parameters(built.teacher.network) if isinstance(built.teacher, LiveTeacher) else 0)


def _model(network: torch.nn.Module, spec: ModelSpec) -> dict[str, Any]:
    said = ", ".join(["B", *map(str, spec.output)])
    return {"parameters": cost.parameters(network), "flops": cost.flops(network, spec.input_shape), "output": f"[{said}]"}


def _probe(
    tree: Mapping[str, Any], built: Built, models: Mapping[str, Mapping[str, Any]], micro: int, device: torch.device
) -> dict[str, Any]:
    """Real steps on random inputs of a size that this machine does in seconds; memory and time scale with the samples."""
    per_sample = 3 * models["student"]["flops"] + models.get("teacher", {"flops": 0})["flops"]
    samples = max(2, min(micro, len(built.data.splits["train"]), PROBE_ROWS, int(PROBE_FLOPS / max(1, per_sample))))
    small = {
        **tree,
        "source": {**tree["source"], "batch_size": samples},
        "hardware": {**tree["hardware"], "micro_batch": None, "compile": "off"},
        "cache": {**tree["cache"], "format": None},
    }
    # Before step 0 an objective may walk all training rows through the teacher; here it sees some of them.
    stage = make_stage(small, replace(built, data=_some_rows(built.data)), device, Ranks(), "student", Reporter())
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in stage.learner.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loop.train_step(stage, _NoHooks())
    activations = sum(size for pointer, size in saved.items() if pointer not in weights) / samples
    started = time.perf_counter()
    for _ in range(PROBE_STEPS):
        loop.train_step(stage, _NoHooks())
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / PROBE_STEPS / samples
    states = [v for o in stage.optimizers.values() for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    memory = {
        "weights and gradients": 2 * _bytes(list(stage.learner.parameters())),
        "optimiser state": _bytes(states),
        "teacher": _bytes(list(built.teacher.module.parameters())) if isinstance(built.teacher, LiveTeacher) else 0,
        "activations": int(activations * micro),
    }
    return {"memory_bytes": memory, "seconds_per_sample": seconds, "probe_samples": samples, "machine": provenance.hardware(device)}


def _some_rows(data: Data) -> Data:
    """The data with `PROBE_ROWS` of its training rows, evenly spread: they may lie class by class."""
    train = data.split("train")
    if data.whole or len(train) <= PROBE_ROWS:
        return data
    return replace(data, splits={**data.splits, "train": taken(train, torch.arange(PROBE_ROWS) * len(train) // PROBE_ROWS)})


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _NoHooks:
    def logged(self, step: int, record: dict[str, Any]) -> None: ...
    def step_done(self, step: int) -> None: ...
    def stop_requested(self) -> bool:
        return False


def _facts(document: Mapping[str, Any], composed: Composed, samples: int) -> dict[str, str]:
    """The estimate in words."""
    steps, per_epoch, batch = document["total_steps"], document["steps_per_epoch"], document["batch"]
    epochs = steps / per_epoch
    found = {"schedule": f"{epochs:.4g} epochs of {per_epoch} steps of {batch} samples: {steps:,} steps"}
    plan = instantiate(composed.tree["plan"], "plan", allowed(composed.tree))
    if not getattr(plan, "train", True):
        return {"plan": plan.describe()}
    if plan.describe():
        found["plan"] = f"{plan.describe()}; the figures here are of the first stage"
    if document["teacher_is_trained_first"]:
        found["teacher"] = "has no checkpoint: it is trained first by the same loop (once, then kept)"
    if "memory_bytes" in document:
        parts = document["memory_bytes"]
        shown = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items() if size)
        tried = f"; micro-batch of {document['micro_batch']}), beside torch itself and the data"
        tried = tried if "activations" in parts else "), beside activations, which are not tried at this size"
        found["memory"] = f"{sum(parts.values()) / 2**20:,.0f} MiB ({shown}{tried}"
    found["compute"] = (
        f"{document['flops']:.2g} FLOPs in all: three forward passes' worth of the student, one of the teacher; evaluation not counted"
    )
    if "seconds_per_sample" in document:
        seconds = document["seconds_per_sample"] * samples * epochs
        found["time"] = (
            f"{_duration(seconds)} for the student on {document['machine']} "
            f"(probed with {document['probe_samples']} samples a step; evaluation not counted)"
        )
    seeds = composed.tree["run"]["seeds"] or [composed.tree["seed"]]
    arms = 1 + (len(composed.tree["rivals"]) if composed.tree["run"]["rivals"] else 0)
    if len(seeds) * arms > 1:
        found["runs"] = f"{len(seeds) * arms} ({arms} arms, {len(seeds)} seeds)"
    return found


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
