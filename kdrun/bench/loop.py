"""Training steps per second: the engine's, the same step written by hand, the engine's with a filled cache, and the usual research loop.

    engine   kdrun's loop as a run has it, the teacher live
    cached   the same, what the teacher says read from a cache that is there already
    hand     the same data, networks, loss, optimiser, memory format, precision and compilation in ten lines of PyTorch
    usual    PIL images through torchvision's transforms in a DataLoader with a worker for each core, nothing but eager float32

`python -m kdrun.bench.loop CASE --steps N OVERRIDE...` runs one case and prints its rate. Images are random: of the size and with the
transform that the data set states, so that no files are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.dataset.augment import Normalise, PadCropFlip
from kdrun.dataset.base import Data, Resident, Split
from kdrun.engine import loop
from kdrun.engine.build import Built, build_first, load_data
from kdrun.engine.choices import Choice, Way, choose
from kdrun.engine.device import DTYPES, pick_device, set_up, settle
from kdrun.engine.distributed import Ranks
from kdrun.engine.optim import build_optimizer
from kdrun.engine.report import Reporter
from kdrun.engine.stage import make_stage
from kdrun.errors import Problem, Refused
from kdrun.evaluation import cost
from kdrun.student.weights import bare
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Output, Progress, Signal

CASES = ("engine", "cached", "hand", "usual")
WARM_UP = 5  # steps before the clock starts: allocation, and compilation where there is any
IMAGES = 4096  # random ones
PEAK_MATMUL, PEAK_CHANNELS, PEAK_SIZE = 1024, 64, 32  # of what the machine's peak is measured on


def parts(overrides: Sequence[str], keep_memory: bool = True) -> tuple[dict[str, Any], Built, torch.device]:
    """What a run has before its first step: the tree, the parts on their device. Weights are drawn, not loaded: they cost the same."""
    composed = compose(list(overrides))
    check(composed)
    tree = composed.tree
    for who in ("teacher", "student"):
        tree[who] = {**tree[who], **{key: False for key in ("pretrained", "pretrained_backbone") if key in tree[who]}}
    device = pick_device(tree["hardware"])
    set_up(tree["hardware"], device, keep_memory)
    data = random_images(tree["dataset"]) or load_data(tree)
    tree["run"]["log_every"] = 10**9
    return tree, replace(build_first(tree, data, device, Ranks()), total_steps=10**6), device


def random_images(node: Mapping[str, Any]) -> Data | None:
    """Images of the size and with the padding, crop and flip that a data set states; None for other data."""
    shape, classes = node.get("input_shape"), node.get("classes")
    if node.get("crop") != "pad" or not shape or not classes or len(shape) != 3:
        return None
    pixels = torch.randint(256, (IMAGES, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = PadCropFlip(Normalise(tuple(node["mean"]), tuple(node["std"])), int(node["padding"]), float(node["flip"]))
    ids = torch.arange(IMAGES)
    split = Split(Resident(pixels, transform), ids % classes, ids)
    test = Split(Resident(pixels[:64], transform), ids[:64] % classes, IMAGES + ids[:64])
    names = tuple(map(str, range(classes)))
    return Data("random images", names, tuple(shape), tuple(node["mean"]), tuple(node["std"]), {"train": split, "test": test}, IMAGES + 64)


class Notes(Reporter):
    """Keeps what a stage says of its choices."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def engine(overrides: Sequence[str], steps: int, cached: bool) -> dict[str, Any]:
    """The engine's rate, where the time of a step goes, and the share of the machine's peak that it reaches."""
    with tempfile.TemporaryDirectory() as root:
        more = ["cache=dense", f"run.root={root}"] if cached else []
        tree, built, device = parts([*overrides, *more])
        notes = Notes()
        stage = make_stage(tree, built, device, Ranks(), "student", notes)

        def walk(count: int, first: int | None = None) -> float:
            stage.step = stage.step if first is None else first
            started = time.perf_counter()
            for _ in range(count):
                loop.train_step(stage, loop.Unwatched())
            settle(device)
            return time.perf_counter() - started

        walk(WARM_UP + steps if cached else WARM_UP)
        seconds = walk(steps, WARM_UP)  # with a cache, steps whose rows are there
        spent = split_of(stage, lambda: walk(steps, WARM_UP))
    batch = int(tree["source"]["batch_size"])
    rate = steps * batch / seconds
    found: dict[str, Any] = {"rate": rate, "split": spent, "notes": notes.told}
    if isinstance(built.teacher, LiveTeacher) and not cached:
        shape = built.data.input_shape
        flops = 3 * cost.flops(built.network, shape) + cost.flops(bare(built.teacher.module), shape)
        found["peak_share"] = flops * rate / peak_flops(device)
    return found


def split_of(stage: loop.Stage, walk: Callable[[], float]) -> dict[str, float]:
    """Percent of a step's time, clocked around what the loop calls; "backward and rest" is what is left."""
    spent = dict.fromkeys(("data", "teacher", "student and loss", "optimiser"), 0.0)

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            settle(stage.device)
            started = time.perf_counter()
            said = call(*args, **kwargs)
            settle(stage.device)
            spent[name] += time.perf_counter() - started
            return said

        return timed

    stage.source.group = clocked("data", stage.source.group)  # type: ignore[method-assign]
    stage.teacher.signal = clocked("teacher", stage.teacher.signal)  # type: ignore[method-assign]
    stage.forward = clocked("student and loss", stage.forward)
    for optimizer in stage.optimizers.values():
        optimizer.step = clocked("optimiser", optimizer.step)  # type: ignore[method-assign]
    whole = walk()
    shares = {name: 100 * seconds / whole for name, seconds in spent.items()}
    return {**shares, "backward and rest": 100 - sum(shares.values())}


def hand(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """The rate of the same step without the engine."""
    tree, built, device = parts(overrides)
    stage = make_stage(tree, built, device, Ranks(), "student", Reporter())
    step = by_hand(tree, built, device, choose(stage, built, tree, Reporter(), None))
    source = built.data
    batch = int(tree["source"]["batch_size"])
    rows = len(source.split("train"))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))

    def walk(first: int, count: int) -> float:
        started = time.perf_counter()
        for number in range(first, first + count):
            index = order[torch.arange(number * batch, (number + 1) * batch) % rows]
            step(source.rows("train", index, torch.zeros_like(index), 0, True, device))
        settle(device)
        return time.perf_counter() - started

    walk(0, WARM_UP)
    return {"rate": steps * batch / walk(WARM_UP, steps)}


def by_hand(tree: Mapping[str, Any], built: Built, device: torch.device, choice: Choice) -> Callable[[Batch], None]:
    """A training step in plain PyTorch. Raises `Refused` for objectives that look at more than logits."""
    objective, needs = built.objective, built.objective.needs()
    student, teacher = built.network.train(), bare(built.teacher.module).eval() if isinstance(built.teacher, LiveTeacher) else None
    if needs.student_taps or needs.teacher_taps or needs.teacher_network or len(objective.phases) > 1:
        raise Refused(Problem("the step by hand is that of an objective on logits", "objective", "", "objective=kd, ce, dkd, pld, ..."))
    optimizer = build_optimizer(list(student.parameters()), tree["optim"])
    weights = objective.weights(Progress(0, 10**6, 100))
    autocast = DTYPES[choice.dtype]
    if built.memory_format == torch.channels_last:
        student = student.to(memory_format=choice.student.memory_format)
        teacher = None if teacher is None else teacher.to(memory_format=choice.teacher.memory_format)
    if choice.student.compiled:
        student = torch.compile(student)  # type: ignore[assignment]
    if choice.teacher.compiled and teacher is not None:
        teacher = torch.compile(teacher, options={"freezing": True} if device.type == "cpu" else None)  # type: ignore[assignment]

    def step(batch: Batch) -> None:
        inputs = batch.inputs
        packed = inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            with torch.no_grad():
                said = None if teacher is None else teacher(packed if choice.teacher.channels_last else inputs)
            output = Output(student(packed if choice.student.channels_last else inputs), {}, {})
            terms = objective.terms(output, Signal(said, {}), batch, "student", nn.ModuleDict())
            loss = torch.stack([weights[name] * term.sum for name, term in terms.items()]).sum() / len(inputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def usual(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """The rate of the loop that most research code has. Raises `Refused` for data that are no such images."""
    from torchvision import transforms

    plain = ["hardware.compile=off", "hardware.dtype=fp32", "hardware.channels_last=false"]
    tree, built, device = parts([*overrides, *plain], keep_memory=False)
    node, storage = tree["dataset"], built.data.split("train").storage
    if built.data.name != "random images" or not isinstance(storage, Resident):
        what = f"the usual loop is one of small images with padding, crop and flip, and {tree['dataset'].get('name')} has others"
        raise Refused(Problem(what, "dataset", "", "dataset=cifar100, or --no-usual"))
    padding, size = int(node["padding"]), int(node["input_shape"][1])
    crop = [transforms.RandomCrop(size, padding=padding), transforms.RandomHorizontalFlip(float(node["flip"]))]
    transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(node["mean"], node["std"])])
    rows = Pictures(storage.inputs.permute(0, 2, 3, 1).numpy(), built.data.split("train").targets, transform)
    batch = int(tree["source"]["batch_size"])
    loader = torch.utils.data.DataLoader(
        rows, batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True, persistent_workers=True
    )
    step = by_hand(tree, built, device, Choice(Way(False, False), Way(False, False), "fp32", ""))

    def batches() -> Any:
        while True:
            yield from loader

    stream = batches()

    def walk(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            inputs, targets, ids = (t.to(device) for t in next(stream))
            step(Batch(inputs, targets, ids, torch.zeros_like(ids), {}))
        settle(device)
        return time.perf_counter() - started

    walk(WARM_UP)
    return {"rate": steps * batch / walk(steps)}


class Pictures(torch.utils.data.Dataset[tuple[Tensor, Tensor, int]]):
    """Pixels [N, H, W, C] as PIL images through a transform."""

    def __init__(self, pixels: Any, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.pixels, self.targets, self.transform = pixels, targets, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[row])), self.targets[row], row


def peak_flops(device: torch.device) -> float:
    """FLOPs a second of the better of a large matrix product and a channels-last 3x3 convolution, float32."""
    a = torch.randn(PEAK_MATMUL, PEAK_MATMUL, device=device)
    x = torch.randn(64, PEAK_CHANNELS, PEAK_SIZE, PEAK_SIZE, device=device).contiguous(memory_format=torch.channels_last)
    w = torch.randn(PEAK_CHANNELS, PEAK_CHANNELS, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    jobs: list[tuple[float, Callable[[], Tensor]]] = [
        (2.0 * PEAK_MATMUL**3, lambda: a @ a),
        (2.0 * 64 * PEAK_SIZE**2 * PEAK_CHANNELS**2 * 9, lambda: F.conv2d(x, w, padding=1)),
    ]
    found = []
    for flops, job in jobs:
        job()
        seconds = []
        for _ in range(10):
            settle(device)
            started = time.perf_counter()
            job()
            settle(device)
            seconds.append(time.perf_counter() - started)
        found.append(flops / min(seconds))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    run = {"engine": lambda o, s: engine(o, s, False), "cached": lambda o, s: engine(o, s, True), "hand": hand, "usual": usual}[given.case]
    print(json.dumps({"case": given.case, **run(given.overrides, given.steps)}))


if __name__ == "__main__":
    main()
