"""Evaluation of a conditional sampler of images: the Frechet distance of the kept classes, and what a classifier says of all.

FID: Heusel et al., NeurIPS 2017, arXiv 1706.08500, from torchmetrics, against the training images of the kept classes.
UA, unlearning accuracy: 1 minus a classifier's accuracy on images that were asked for by the forgotten label, as in SFD
(ICLR 2025, arXiv 2409.11219), whose classifier is a ResNet-34 trained on the real images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.evaluation.sampler import sample
from kdrun.student.build import build
from kdrun.student.generator import Solver
from kdrun.student.weights import load_weights

if TYPE_CHECKING:
    from kdrun.dataset.base import Data

METRICS = ("fid", "ua", "override_rate", "kept_accuracy", "calls")
BY_CLASSIFIER = ("ua", "override_rate", "kept_accuracy")
AT_ONCE = 250  # images in one network call


@dataclass(eq=False)
class ImageSampler(Evaluation):
    """So many samples of every class from a one-step generator (one call each) or a noise predictor (`calls` by `solver`, of diffusers).

    classifier: a network's node with its `checkpoint`, {} for none: ua, override_rate and kept_accuracy (as in `Sampler`,
    percent) are then not measured. It is given inputs normalised by `classifier_mean` and `classifier_std`, the data set's own
    where they are null. Under several ranks each measures all samples.
    """

    primary: str = "fid"
    forget: int = 0
    override: int | None = 1
    samples: int = 5000
    calls: int = 40
    solver: Solver = "DDIMScheduler"
    fid: bool = True
    classifier: dict[str, Any] = field(default_factory=dict)
    classifier_mean: list[float] | None = None
    classifier_std: list[float] | None = None
    seed: int = 0

    def own_problems(self) -> list[Problem]:
        problems = [
            Problem(f"must be at least 1, not {getattr(self, name)}", f"evaluation.{name}", "", f"e.g. evaluation.{name}={example}")
            for name, example in (("calls", 40), ("samples", 5000))
            if getattr(self, name) < 1
        ]
        if self.solver not in get_args(Solver):
            what = f"'{self.solver}' is not one of diffusers' solvers that draw nothing"
            problems.append(Problem(what, "evaluation.solver", "", did_you_mean(self.solver, get_args(Solver))))
        if self.classifier and not self.classifier.get("checkpoint"):
            what = "a classifier that was never trained says nothing"
            problems.append(Problem(what, "evaluation.classifier.checkpoint", "", "the file with its weights"))
        if self.primary in BY_CLASSIFIER and not self.classifier:
            remedy = "evaluation.classifier={_target_: kdrun.student.timm.create, name: resnet34, checkpoint: FILE}"
            problems.append(Problem(f"'{self.primary}' needs a classifier", "evaluation.primary", "", remedy))
        if self.primary == "fid" and not self.fid:
            problems.append(Problem("'fid' is switched off", "evaluation.primary", "", "evaluation.fid=true"))
        return problems

    def names(self, classes: int | None = None) -> list[str]:
        return list(METRICS)

    @torch.no_grad()
    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        """The metrics that there is a measure for. `rows` is not asked: real images are those of the training split.

        Raises:
            Refused: torchmetrics' extra or the classifier's weights are missing, or there is no such label.
        """
        if not 0 <= self.forget < data.classes or data.classes < 2:
            raise Refused(Problem(f"there is no label {self.forget}", "evaluation.forget", data.name, f"0 to {data.classes - 1}"))
        frechet = self._frechet(data, device) if self.fid else None
        judge = self._judge(data, device) if self.classifier else None
        hits = torch.zeros(data.classes, data.classes, dtype=torch.float64, device=device)  # label, class found
        calls = 1
        for label in range(data.classes):
            for z in self._latents(label, data, device):
                images, calls = sample(network, z, torch.full((len(z),), label, device=device), self.calls, self.solver)
                if not images.isfinite().all():
                    return dict.fromkeys(METRICS, math.nan)
                if frechet is not None and label != self.forget:
                    frechet.update(to_pixels(images, data), real=False)
                if judge is not None:
                    hits[label] += judge(images).bincount(minlength=data.classes)
        found = {"calls": float(calls)}
        if frechet is not None:
            found["fid"] = float(frechet.compute())
        return found | (self._accuracies(hits / self.samples) if judge is not None else {})

    def _latents(self, label: int, data: Data, device: torch.device) -> Iterator[Tensor]:
        """Standard normals for the samples of a label, the same for every network."""
        for part in torch.arange(label * self.samples, (label + 1) * self.samples, device=device).split(AT_ONCE):
            yield rng.normal(rng.key(self.seed, "sampler"), data.input_shape, part)

    def _accuracies(self, shares: Tensor) -> dict[str, float]:
        kept = [c for c in range(len(shares)) if c != self.forget]
        replaced = 0.0 if self.override is None else float(shares[self.forget, self.override])
        accuracy = float(shares.diagonal()[kept].mean())
        return {"ua": 100 * (1 - float(shares[self.forget, self.forget])), "override_rate": 100 * replaced, "kept_accuracy": 100 * accuracy}

    def _judge(self, data: Data, device: torch.device) -> Any:
        """images [B, C, H, W] as the sampler speaks them -> classes int64 [B]."""
        network = build(self.classifier, data.classes, data.input_shape, key="evaluation.classifier")
        file, rename = self.classifier["checkpoint"], self.classifier.get("rename") or ()
        load_weights(network, file, rename, key="evaluation.classifier.checkpoint")
        network.to(device).eval()
        mean, std = self.classifier_mean or data.mean, self.classifier_std or data.std
        return lambda images: network((to_pixels(images, data) - _channels(mean, images)) / _channels(std, images)).argmax(1)

    def _frechet(self, data: Data, device: torch.device) -> Any:
        """The Frechet metric with the real images in it."""
        metric = self._frechet_metric().to(device)
        for batch in data.batches("train", AT_ONCE, device):
            kept = batch.inputs[batch.targets != self.forget]
            if len(kept):
                metric.update(to_pixels(kept, data), real=True)
        return metric

    def problems(self, data: Data) -> list[Problem]:
        if not self.fid or find_spec("torch_fidelity") is not None:
            return []
        remedy = 'pip install "kdrun[diffusion]", or evaluation.fid=false'
        return [Problem("FID needs the package torch-fidelity, which is not installed", "evaluation.fid", "", remedy)]

    def _frechet_metric(self) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048, normalize=True)


def to_pixels(images: Tensor, data: Data) -> Tensor:
    """Images as the models see them [B, C, H, W] to the scale [0, 1]."""
    return (images * _channels(data.std, images) + _channels(data.mean, images)).clamp(0, 1)


def _channels(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
