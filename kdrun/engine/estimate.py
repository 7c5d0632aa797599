"""What a command will cost, from its configuration alone: shapes, memory, steps and time, with a probe of a few real steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kdrun.config.compose import Composed
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data, taken
from kdrun.engine import loop, provenance
from kdrun.engine.build import Built, build_first, load_data
from kdrun.engine.caching import cache_facts
from kdrun.engine.costs import costs_of, facts_of, without_weights
from kdrun.engine.device import pick_device, set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.footprint import bytes_of, footprint, teacher_bytes
from kdrun.engine.report import Reporter
from kdrun.engine.run import title
from kdrun.engine.stage import make_stage
from kdrun.engine.standin import stand_in
from kdrun.engine.workload import Work, batch_of, micro_of, work_of
from kdrun.evaluation import cost
from kdrun.plan.single import teacher_stage
from kdrun.student.taps import model_spec
from kdrun.student.weights import bare
from kdrun.teacher.live import LiveTeacher
from kdrun.types import ModelSpec, Writes

PROBE_STEPS = 3
PROBE_ROWS = 500  # of the training split, at most
PROBE_WEIGHTS = 2**27  # of language models that are made in earnest
PROBE_FLOPS = 3e10  # of one probed step: seconds on a CPU core, nothing on a GPU


def estimate(composed: Composed, probe: bool) -> dict[str, Any]:
    """Parameters, FLOPs, taps, steps, memory and (with `probe`) seconds, as plain data. Raises `Refused` as the run would."""
    tree = without_weights(composed.tree)
    device = pick_device(tree["hardware"])
    set_up(tree["hardware"], device)
    data = stand_in(tree["dataset"], allowed(tree)) or load_data(tree)
    # Language models may not fit into this machine's memory: their shapes do. Small ones are then made in earnest, for the probe.
    shapes = FakeTensorMode(allow_non_fake_inputs=True) if data.vocabulary is not None else None
    whole = tree if shapes is None else {**tree, "student": {**tree["student"], **({"lora": None} if "lora" in tree["student"] else {})}}
    built = build_first(whole, data, device, Ranks(), shapes)
    small = shapes is None or _weights(built) <= PROBE_WEIGHTS
    data, needs = built.data, built.objective.needs()
    spec = model_spec(built.network, data.input_shape, tree["student"].get("taps") or {}, needs.student_taps)
    models = {"student": _model(built.network, spec)}
    taps = {f"student {n}": list(s) for n, s in spec.taps.items()}
    if isinstance(built.teacher, LiveTeacher) and built.teacher.spec is not None:
        models["teacher"] = _model(bare(built.teacher.module), built.teacher.spec)
        taps |= {f"teacher {n}": list(s) for n, s in built.teacher.spec.taps.items()}
    work = work_of(tree, built, models["student"]["flops"], models.get("teacher", {}).get("flops"))
    document: dict[str, Any] = {
        "title": f"{title(composed)} on {data.name}",
        "models": models,
        "taps": taps,
        "steps_per_epoch": built.steps_per_epoch,
        "total_steps": built.total_steps,
        "batch": batch_of(tree, built),
        "micro_batch": micro_of(tree, built),
        "teacher_is_trained_first": teacher_stage(composed.tree, data.fingerprint) is not None,
        "flops": work.training,
        "evaluation_flops": work.evaluation,
    }
    if probe and small:
        real = built if shapes is None else build_first(tree, data, device, Ranks())
        document |= _probe(tree, real, work, document["micro_batch"], device)
    elif not small:
        document["memory_bytes"] = _least_memory(built, bool(tree["student"].get("lora")))
    document |= costs_of(composed, built, data, work, document.get("seconds_per_sample"))
    document["facts"] = facts_of(document, composed, len(data.splits["train"])) | cache_facts(composed.tree, built)
    return document


def _least_memory(built: Built, adapters: bool) -> dict[str, int]:
    """What a model that is too large to try here takes at least: float32 gradients and Adam's two moments beside its weights."""
    own = list(built.network.parameters())
    found = {"weights": bytes_of(own)} | (
        {} if adapters else {"gradients": bytes_of(own), "optimiser state": 8 * cost.parameters(built.network)}
    )
    return found | ({"teacher": bytes_of(list(built.teacher.network.parameters()))} if isinstance(built.teacher, LiveTeacher) else {})


def _weights(built: Built) -> int:
    """Of student and teacher."""
    return cost.parameters(built.network) + (cost.parameters(built.teacher.network) if isinstance(built.teacher, LiveTeacher) else 0)


def _model(network: torch.nn.Module, spec: ModelSpec) -> dict[str, Any]:
    said = ", ".join(["B", *map(str, spec.output)])
    return {"parameters": cost.parameters(network), "flops": cost.flops(network, spec.input_shape), "output": f"[{said}]"}


def _probe(tree: Mapping[str, Any], built: Built, work: Work, micro: int, device: torch.device) -> dict[str, Any]:
    """Real steps on random inputs of a size that this machine does in seconds, for the time, which scales with the samples.

    Memory is counted on shapes alone; of a step that cannot be followed so, it is what the real steps take, scaled likewise.
    """
    samples = max(2, min(micro, len(built.data.splits["train"]), PROBE_ROWS, int(PROBE_FLOPS / max(1, work.sample))))
    small = {
        **tree,
        "source": {**tree["source"], "batch_size": samples},
        "hardware": {**tree["hardware"], "micro_batch": None, "compile": "off"},
        "run": {**tree["run"], "max_steps": PROBE_STEPS + 1},
        "cache": {**tree["cache"], "format": None},
    }
    # Before step 0 an objective may walk all training rows through the teacher; here it sees some of them.
    stage = make_stage(small, replace(built, data=_some_rows(built.data)), device, Ranks(), "student", Reporter())
    memory = None
    if not isinstance(stage.source, Writes):
        stage.learner.train()
        memory = footprint(tree, built, stage.objective.prepare(stage.source.group(0)[0], stage.progress), micro, device)
    activations = _saved(stage) / samples
    started = time.perf_counter()
    for _ in range(PROBE_STEPS):
        loop.train_step(stage, loop.Unwatched())
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / PROBE_STEPS / samples
    states = [v for o in stage.optimizers.values() for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    memory = memory or {
        "weights": bytes_of(list(stage.learner.parameters())),
        "gradients": bytes_of([p for p in stage.learner.parameters() if p.requires_grad]),
        "optimiser state": bytes_of(states),
        "teacher": teacher_bytes(built),
        "activations": int(activations * micro),
    }
    return {"memory_bytes": memory, "seconds_per_sample": seconds, "probe_samples": samples, "machine": provenance.hardware(device)}


def _saved(stage: loop.Stage) -> int:
    """Bytes that autograd saves in a step, which is made."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in stage.learner.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loop.train_step(stage, loop.Unwatched())
    return sum(size for pointer, size in saved.items() if pointer not in weights)


def _some_rows(data: Data) -> Data:
    """The data with `PROBE_ROWS` of its training rows, evenly spread: they may lie class by class."""
    train = data.split("train")
    if data.whole or len(train) <= PROBE_ROWS:
        return data
    return replace(data, splits={**data.splits, "train": taken(train, torch.arange(PROBE_ROWS) * len(train) // PROBE_ROWS)})
