"""Checks that look at several keys together. Each message ends with the change to make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdrun.config.compose import Composed
from kdrun.errors import Problem

POSITIVE = (
    "optim.lr",
    "optim.epochs",
    "optim.steps",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep",
    "run.max_steps",
    "source.batch_size",
    "hardware.procs",
    "hardware.threads",
)

BESIDE_A_TEACHER = ("agreement", "kl_teacher", "teacher_top1", "pair_order", "edge_kl")  # metrics of kdrun.evaluation that need its logits


def cross_checks(composed: Composed) -> list[Problem]:
    return [
        *_ranges(composed),
        *_protocol(composed),
        *_primary(composed),
        *_micro_batch(composed),
        *_hardware(composed),
        *_teacher(composed),
    ]


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _problem(composed: Composed, what: str, key: str, remedy: str) -> Problem:
    return Problem(what, key, composed.origins.get(key, ""), remedy)


def _ranges(composed: Composed) -> Iterator[Problem]:
    for key in POSITIVE:
        value = _get(composed.tree, key)
        if isinstance(value, (int, float)) and value <= 0:
            yield _problem(composed, f"must be above 0, not {value}", key, f"e.g. {key}=1")
    betas = _get(composed.tree, "optim.betas")
    if betas is not None and (len(betas) != 2 or not all(0 <= b < 1 for b in betas)):
        yield _problem(composed, f"two numbers from 0 to below 1 are needed, not {betas}", "optim.betas", "e.g. optim.betas=[0.9,0.999]")
    ema = _get(composed.tree, "optim.ema")
    if isinstance(ema, (int, float)) and not 0 < ema < 1:
        yield _problem(composed, f"a decay lies between 0 and 1, not {ema}", "optim.ema", "e.g. optim.ema=0.999, or null for none")
    seeds = _get(composed.tree, "run.seeds")
    doubled = isinstance(seeds, list) and len(set(map(str, seeds))) != len(seeds)
    if doubled or seeds == [] or (isinstance(seeds, int) and not isinstance(seeds, bool)):
        what, remedy = "seeds must be different from each other, and at least one", "run.seeds=3 for the seeds 1 to 3, or run.seeds=[1,2,3]"
        yield _problem(composed, what, "run.seeds", remedy)


def _protocol(composed: Composed) -> Iterator[Problem]:
    protocol, validation = _get(composed.tree, "evaluation.protocol"), _get(composed.tree, "dataset.validation")
    if protocol == "best_val" and not validation:
        yield _problem(
            composed,
            "best_val needs a validation split, and there is none",
            "evaluation.protocol",
            "dataset.validation=0.1, or evaluation.protocol=last",
        )
    if protocol == "best_test" and composed.origins.get("evaluation.protocol", "").startswith(("command line", "conf/")):
        yield _problem(
            composed,
            "choosing the epoch by test accuracy is refused unless the paper did it and its recipe says so",
            "evaluation.protocol",
            "evaluation.protocol=last, or best_val with dataset.validation=0.1",
        )


def _primary(composed: Composed) -> Iterator[Problem]:
    primary = _get(composed.tree, "evaluation.primary")
    if primary in BESIDE_A_TEACHER and _get(composed.tree, "teacher.kind") == "none":
        remedy = "evaluation.primary=top1; for a teacher that is trained first: teacher.fit.evaluation.primary=top1"
        yield _problem(composed, f"'{primary}' is measured beside a teacher, and there is none", "evaluation.primary", remedy)


def _micro_batch(composed: Composed) -> Iterator[Problem]:
    micro, batch = _get(composed.tree, "hardware.micro_batch"), _get(composed.tree, "source.batch_size")
    sizes = [s for s in (micro if isinstance(micro, list) else [micro]) if isinstance(s, int)]
    if any(s < 1 for s in sizes):
        yield _problem(
            composed, "a micro-batch has at least one sample", "hardware.micro_batch", "hardware.micro_batch=null for the whole batch"
        )
    ranks = _get(composed.tree, "hardware.procs") or 1
    typed = isinstance(micro, list) and len(sizes) == len(micro) and isinstance(batch, int) and isinstance(ranks, int)
    if typed and sum(sizes) * ranks != batch:
        yield _problem(
            composed,
            f"sizes {sizes} make {sum(sizes)} samples a rank; source.batch_size={batch} over {ranks} rank(s) needs {batch / ranks:g}",
            "hardware.micro_batch",
            "make them add up, or give one number",
        )


def _teacher(composed: Composed) -> Iterator[Problem]:
    node = composed.tree.get("teacher")
    if not isinstance(node, dict):
        return
    for given, other in (("mean", "std"), ("std", "mean")):
        if node.get(given) is not None and node.get(other) is None:
            yield _problem(
                composed,
                f"a normalisation is a mean and a std, and teacher.{other} is null",
                f"teacher.{given}",
                f"set teacher.{other} too",
            )


def _hardware(composed: Composed) -> Iterator[Problem]:
    procs, kind = _get(composed.tree, "hardware.procs"), _get(composed.tree, "hardware.kind")
    if _get(composed.tree, "hardware.wrap") == "fsdp2" and _get(composed.tree, "optim.ema"):
        yield _problem(composed, "a moving average of a sharded student is not kept", "optim.ema", "optim.ema=null, or hardware.wrap=ddp")
    if kind == "local" and procs not in (1, None):
        yield _problem(composed, f"{procs} ranks need torchrun", "hardware.procs", f"hardware=multi_gpu hardware.procs={procs}")
    if procs is None and kind == "ranks" and _get(composed.tree, "hardware.device") == "cpu":
        yield _problem(composed, "on the CPU the number of ranks must be said", "hardware.procs", "hardware.procs=2")
