"""Texts that the student writes itself (or its teacher does), one group of prompts per optimiser step: on-policy distillation.

On-policy: GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649), which mixes rollouts and data by `share`; OPSD (arXiv 2601.18734). A text
is a function of the weights, the seed, the step and the sample, so it is the same after a resume and on any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.dataset.base import Data, Request
from kdrun.dataset.tokens import POSITIONS, Ragged, Sample, TokenSplit, prompts_of
from kdrun.errors import Problem, Refused
from kdrun.losses.policy import group_advantages
from kdrun.source.base import Place, Spec, Stateless
from kdrun.source.loader import EpochLoader, Loader
from kdrun.student.generate import Completions, Sampling, complete
from kdrun.teacher.context import INPUTS, SHIFT
from kdrun.types import Batch

BEHAVIOUR, ADVANTAGE, REWARD = "behaviour", "advantage", "reward"  # rows of extra: [B, T] log-probabilities, [B, T], [B]
Writer = Literal["student", "teacher"]


@dataclass(frozen=True)
class Rollout(Spec):
    """How prompts are drawn and completed. Raises ValueError for a field outside its range."""

    batch_size: int = 32
    per_prompt: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    share: float = 1.0
    writer: Writer = "student"
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: legal range [0, 1]")
        if self.writer not in get_args(Writer):
            raise ValueError(f"writer={self.writer!r}: legal values {', '.join(get_args(Writer))}")
        self.sampling(())

    def sampling(self, stop: tuple[int, ...]) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, stop)

    def stream(self, data: Data, split: str, place: Place) -> RolloutStream:
        """Raises `Refused` for data that is no text, and for sizes that do not fit."""
        if data.vocabulary is None or not isinstance(data.split(split), TokenSplit):
            raise Refused(Problem(f"{data.name} has no prompts", "source", data.name, "source=loader, or a data set of text"))
        if isinstance(place.micro_batch, (list, tuple)):
            what = "sizes of micro-batches for completions that do not exist yet"
            raise Refused(Problem(what, "hardware.micro_batch", data.name, "one number, or null"))
        return RolloutStream(self, Loader(self.batch_size).stream(data, split, place), place)


@dataclass(eq=False)
class RolloutStream(Stateless):
    """Implements `kdrun.types.Source`: a step's texts are a function of the writer's weights, the seed and the step."""

    spec: Rollout
    prompts: EpochLoader
    place: Place
    steps_per_epoch: int = field(init=False)
    _networks: tuple[nn.Module, ...] = field(default=(), init=False, repr=False)
    _tokens: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.spec.steps_per_epoch or self.prompts.steps_per_epoch

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """The networks that write. Raises `Refused` where the teacher is to write and there is none."""
        if self.spec.writer == "teacher" and teacher is None:
            raise Refused(Problem("there is no teacher to write", "source.writer", "", "source.writer=student, or a live teacher"))
        self._networks = (student,) if self.spec.writer == "student" or teacher is None else (teacher,)

    def report(self) -> dict[str, float]:
        return {"generated_tokens": float(self._tokens)}

    def seconds(self) -> float:
        return self._seconds

    def group(self, step: int) -> list[Batch]:
        """The micro-batches of optimiser step `step` (from 0) on this rank."""
        of_data = float(rng.uniform(rng.key(self.place.seed, "rollout or data"), torch.tensor([step]))[0]) >= self.spec.share
        if of_data or not self._networks:  # no network is attached where a few steps are only timed
            return self.prompts.group(step)
        index, view = map(torch.cat, zip(*self.prompts.pieces(step), strict=True))
        each = self.spec.per_prompt
        whole = self._written(index.repeat_interleave(each), view[:1], step)
        sizes = self.place.cut(len(index) * each, self.prompts.largest_share(step) * each)
        return [_rows(whole, part) for part in torch.arange(len(index) * each).split(sizes)]

    def _written(self, index: Tensor, view: Tensor, step: int) -> Batch:
        data, split = self.prompts.data, self.prompts.data.split(self.prompts.split)
        assert isinstance(split, TokenSplit)
        assert data.vocabulary is not None
        request = Request(index, split.ids[index], view.expand(len(index)), self.place.seed, False)
        rows = split.storage.fetch(request, torch.device("cpu"))
        prompts, references = prompts_of(rows)
        copies = torch.arange(len(index)) % self.spec.per_prompt
        began = time.perf_counter()
        key = rng.key(self.place.seed, "rollout", step)
        stop = () if data.vocabulary.eos is None else (data.vocabulary.eos,)
        # Copies of a prompt differ by their number, which is made part of the id.
        told = complete(
            self._networks[0],
            prompts,
            self.spec.sampling(stop),
            key,
            request.ids * self.spec.per_prompt + copies,
            data.vocabulary.pad,
            self.place.device,
        )
        self._tokens += int(told.lengths.sum())
        self._seconds += time.perf_counter() - began
        texts = [tokens[:n].tolist() for tokens, n in zip(told.tokens.cpu(), told.lengths.tolist(), strict=True)]
        rewards = torch.tensor(data.rewards(prompts, references, texts)) if data.judges else None
        return self._batch(request, prompts, texts, told, rewards, split)

    def _batch(
        self, request: Request, prompts: list[Tensor], texts: list[list[int]], told: Completions, rewards: Tensor | None, split: TokenSplit
    ) -> Batch:
        """All of this rank's completions as one batch."""
        pad, device = self.prompts.data.vocabulary.pad, self.place.device  # type: ignore[union-attr]
        stacked = _joined(prompts, texts, pad)
        targets = stacked[:, 1]
        extra = {POSITIONS: stacked[:, 2], BEHAVIOUR: _laid_out(told.log_probs.cpu().float(), targets)}
        if rewards is not None:
            advantages = group_advantages(rewards.view(-1, self.spec.per_prompt), "unbiased").flatten()
            extra |= {REWARD: rewards, ADVANTAGE: torch.where(targets >= 0, advantages[:, None], 0.0)}
        if split.privileged is not None:
            theirs, _ = prompts_of(split.privileged.fetch(request, torch.device("cpu")))
            extra[INPUTS] = _joined(theirs, texts, pad)[:, 0]
            extra[SHIFT] = torch.tensor([len(a) - len(b) for a, b in zip(theirs, prompts, strict=True)])
        return Batch(stacked[:, 0], targets, request.ids, request.view, extra).to(device)


def _joined(prompts: list[Tensor], texts: list[list[int]], pad: int) -> Tensor:
    """Prompts and completions as a batch [B, 3, T] of inputs, targets and positions; the completion is scored."""
    rows = [[Sample([*p.tolist(), *t], [False] * len(p) + [True] * len(t))] for p, t in zip(prompts, texts, strict=True)]
    every = torch.arange(len(rows))
    return Ragged.of(rows, pad).fetch(Request(every, every, every, 0, False), torch.device("cpu"))


def _laid_out(values: Tensor, targets: Tensor) -> Tensor:
    """Values of completions [B, L] at the places that score them, [B, T]; 0 elsewhere."""
    found = torch.zeros(targets.shape)
    scored = targets >= 0
    inside = torch.arange(values.shape[1]) < scored.sum(1, keepdim=True)
    found[scored] = values[inside]
    return found


def _rows(batch: Batch, part: Tensor) -> Batch:
    part = part.to(batch.ids.device)
    extra: Mapping[str, Any] = {name: rows[part] for name, rows in batch.extra.items()}
    return Batch(batch.inputs[part], batch.targets[part], batch.ids[part], batch.view[part], dict(extra))
