"""Texts that the student writes itself (or its teacher does), one group of prompts per optimiser step: on-policy distillation.

On-policy: GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649), which mixes rollouts and data by `share`; OPSD (arXiv 2601.18734); DistiLLM
(arXiv 2402.03898), which mixes data, rollouts and earlier ones (`replay`, see `kdrun.source.replay`). A text is a function of the weights,
the seed, the step and the sample, so it is the same after a resume and on any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdrun import rng
from kdrun.dataset.base import Data, Request
from kdrun.dataset.tokens import POSITIONS, Ragged, Sample, TokenSplit, prompts_of
from kdrun.errors import Problem, Refused
from kdrun.losses.policy import group_advantages
from kdrun.source.base import Place, Spec, Stateless
from kdrun.source.loader import EpochLoader, Loader
from kdrun.source.replay import Kind, Replay, Text
from kdrun.student.engines import Engine, writer_of
from kdrun.student.engines import Writer as Writes
from kdrun.student.generate import Mixed, Sampling
from kdrun.teacher.context import INPUTS, SHIFT
from kdrun.types import Batch

BEHAVIOUR, ADVANTAGE, REWARD = "behaviour", "advantage", "reward"  # rows of extra: [B, T] log-probabilities, [B, T], [B]
LOSS = "nll"  # the validation metric that a replay buffer hears
Writer = Literal["student", "teacher", "mixture"]


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
    mixture: float = 0.2
    engine: Engine = "own"
    engine_options: dict[str, Any] = field(default_factory=dict)
    replay: bool = False
    replay_capacity: int = 1000
    replay_start: float = 0.0
    replay_step: float = 0.1
    replay_eps: float = 0.1
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "per_prompt", "replay_capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("share", "mixture", "replay_start", "replay_step"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: legal range [0, 1]")
        if self.replay_eps < 0:
            raise ValueError(f"replay_eps={self.replay_eps}: legal range [0, inf)")
        if self.replay and self.share < 1:
            raise ValueError(f"share={self.share}: with replay=true the buffer's threshold says which steps are written, so it must be 1")
        if self.replay and self.replay_capacity < self.batch_size * self.per_prompt:
            what = f"fewer than the {self.batch_size * self.per_prompt} texts of a step"
            raise ValueError(f"replay_capacity={self.replay_capacity}: {what}")
        if self.writer not in get_args(Writer):
            raise ValueError(f"writer={self.writer!r}: legal values {', '.join(get_args(Writer))}")
        if self.engine not in get_args(Engine):
            raise ValueError(f"engine={self.engine!r}: legal values {', '.join(get_args(Engine))}")
        if self.engine != "own" and self.writer == "mixture":
            raise ValueError(f"engine={self.engine!r}: with writer=mixture two networks write each token, which engine=own does")
        if self.engine != "vllm" and self.engine_options:
            raise ValueError(f"engine_options={self.engine_options}: settings of engine=vllm")
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
        if self.engine == "vllm" and place.world > 1:
            what = f"vllm writes beside a training in one process, and there are {place.world}"
            raise Refused(Problem(what, "source.engine", "", "hardware.procs=1, or source.engine=own"))
        return (ReplayStream if self.replay else RolloutStream)(self, Loader(self.batch_size).stream(data, split, place), place)


@dataclass(eq=False)
class RolloutStream(Stateless):
    """Implements `kdrun.types.Source`: a step's texts are a function of the writer's weights, the seed and the step."""

    spec: Rollout
    prompts: EpochLoader
    place: Place
    steps_per_epoch: int = field(init=False)
    _networks: tuple[nn.Module, ...] = field(default=(), init=False, repr=False)
    _total_steps: int = field(default=0, init=False)
    _autocast: torch.dtype | None = field(default=None, init=False)
    _tokens: int = field(default=0, init=False)
    _texts: dict[Kind, int] = field(init=False)  # of this rank, by where they came from
    _seconds: float = field(default=0.0, init=False)
    _write: Writes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.spec.steps_per_epoch or self.prompts.steps_per_epoch
        self._texts = dict.fromkeys(get_args(Kind), 0)
        self._write = writer_of(self.spec.engine, self.spec.engine_options)

    def attach(self, student: nn.Module, teacher: nn.Module | None, total_steps: int = 0, autocast: torch.dtype | None = None) -> None:
        """The networks that write. Raises `Refused` where the teacher is to write and there is none."""
        writer = self.spec.writer
        if writer == "student":
            self._networks = (student,)
        elif teacher is None:
            raise Refused(Problem("there is no teacher to write", "source.writer", "", "source.writer=student, or a live teacher"))
        else:
            self._networks = (teacher,) if writer == "teacher" else (student, teacher)
        self._total_steps, self._autocast = total_steps, autocast

    def report(self) -> dict[str, float]:
        return {"generated_tokens": float(self._tokens), **{f"{kind}_texts": float(count) for kind, count in self._texts.items()}}

    def seconds(self) -> float:
        return self._seconds

    def group(self, step: int) -> list[Batch]:
        """The micro-batches of optimiser step `step` (from 0) on this rank."""
        # No network is attached where a few steps are only timed.
        kind = self._kind(step) if self._networks else "given"
        if kind == "given":
            batches = self.prompts.group(step)
            self._texts[kind] += sum(len(batch.ids) for batch in batches)
            return batches
        texts = self._fresh(step) if kind == "fresh" else self._replayed(step)
        self._texts[kind] += len(texts)
        whole = self._batch(texts)
        sizes = self.place.cut(len(texts), self.prompts.largest_share(step) * self.spec.per_prompt)
        return [_rows(whole, part) for part in torch.arange(len(texts)).split(sizes)]

    def _draw(self, step: int) -> float:
        return float(rng.uniform(rng.key(self.place.seed, "rollout or data"), torch.tensor([step]))[0])

    def _kind(self, step: int) -> Kind:
        return "fresh" if self._draw(step) < self.spec.share else "given"

    def _replayed(self, step: int) -> list[Text]:
        raise NotImplementedError

    def _fresh(self, step: int) -> list[Text]:
        """What is written of this rank's prompts, copies of a prompt one after the other."""
        data, split, each = self.prompts.data, self._split(), self.spec.per_prompt
        assert data.vocabulary is not None
        index, view = (torch.cat(parts).repeat_interleave(each) for parts in zip(*self.prompts.pieces(step), strict=True))
        prompts, references = prompts_of(split.storage.fetch(self._request(index, view), torch.device("cpu")))
        copies = torch.arange(len(index)) % each
        began = time.perf_counter()
        key = rng.key(self.place.seed, "rollout", step)
        mixed = Mixed(self._networks[1], self.spec.mixture) if self.spec.writer == "mixture" else None
        stop = () if data.vocabulary.eos is None else (data.vocabulary.eos,)
        # Copies of a prompt differ by their number, which is made part of the id.
        with torch.autocast(self.place.device.type, self._autocast) if self._autocast else nullcontext():
            told = self._write(
                self._networks[0],
                prompts,
                self.spec.sampling(stop),
                key,
                split.ids[index] * each + copies,
                data.vocabulary.pad,
                self.place.device,
                mixed,
            )
        self._tokens += int(told.lengths.sum())
        self._seconds += time.perf_counter() - began
        lengths, log_probs = told.lengths.tolist(), told.log_probs.float()
        texts = [tokens[:n].tolist() for tokens, n in zip(told.tokens.cpu(), lengths, strict=True)]
        rewards = torch.tensor(data.rewards(prompts, references, texts)) if data.judges else torch.zeros(len(texts))
        advantages = group_advantages(rewards.view(-1, each), "unbiased").flatten()
        said = [values[:n].tolist() for values, n in zip(log_probs.cpu(), lengths, strict=True)]
        rows = zip(index.tolist(), view.tolist(), texts, said, rewards.tolist(), advantages.tolist(), strict=True)
        return [Text(*row) for row in rows]

    def _split(self) -> TokenSplit:
        split = self.prompts.data.split(self.prompts.split)
        assert isinstance(split, TokenSplit)
        return split

    def _request(self, index: Tensor, view: Tensor) -> Request:
        return Request(index, self._split().ids[index], view, self.place.seed, False)

    def _batch(self, texts: Sequence[Text]) -> Batch:
        """Prompts and completions as one batch."""
        split, data = self._split(), self.prompts.data
        assert data.vocabulary is not None
        pad, cpu = data.vocabulary.pad, torch.device("cpu")
        each = lambda name, dtype: torch.tensor([getattr(text, name) for text in texts], dtype=dtype)  # noqa: E731
        request = self._request(each("row", torch.int64), each("view", torch.int64))
        prompts, _ = prompts_of(split.storage.fetch(request, cpu))
        written = [text.tokens for text in texts]
        stacked = _joined(prompts, written, pad)
        targets = stacked[:, 1]
        extra = {POSITIONS: stacked[:, 2], BEHAVIOUR: _laid_out([text.log_probs for text in texts], targets)}
        if data.judges:
            advantages = each("advantage", torch.float32)
            extra |= {REWARD: each("reward", torch.float32), ADVANTAGE: torch.where(targets >= 0, advantages[:, None], 0.0)}
        if split.privileged is not None:
            theirs, _ = prompts_of(split.privileged.fetch(request, cpu))
            extra[INPUTS] = _joined(theirs, written, pad)[:, 0]
            extra[SHIFT] = torch.tensor([len(a) - len(b) for a, b in zip(theirs, prompts, strict=True)])
        return Batch(stacked[:, 0], targets, request.ids, request.view, extra).to(self.place.device)


@dataclass(eq=False)
class ReplayStream(RolloutStream):
    """Data, fresh texts and earlier ones (`kdrun.source.replay`). Implements `kdrun.types.Hears`.

    Every rank keeps the texts of all ranks, so that a step's draw from the buffer does not depend on how many there are.
    """

    memory: Replay = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = self.spec
        self.memory = Replay(spec.replay_capacity, spec.replay_start, spec.replay_step, spec.replay_eps)

    def hear(self, metrics: Mapping[str, float]) -> None:
        self.memory.hear(metrics[LOSS])

    def _kind(self, step: int) -> Kind:
        return self.memory.kind(self._draw(step), step / max(1, self._total_steps))

    def _fresh(self, step: int) -> list[Text]:
        texts = super()._fresh(step)
        self.memory.texts.extend(text for part in self._of_all_ranks(texts) for text in part)
        return texts

    def _replayed(self, step: int) -> list[Text]:
        each = self.spec.per_prompt
        drawn = self.memory.drawn(self.prompts.size(step) * each, rng.key(self.place.seed, "replay"), step)
        mine = torch.arange(self.prompts.size(step)).tensor_split(self.place.world)[self.place.rank]
        return drawn[int(mine[0]) * each : (int(mine[-1]) + 1) * each]

    def _of_all_ranks(self, texts: list[Text]) -> list[list[Text]]:
        if self.place.world == 1:
            return [texts]
        parts: list[list[Text]] = [[] for _ in range(self.place.world)]
        dist.all_gather_object(parts, texts)
        return parts

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)


def _joined(prompts: list[Tensor], texts: list[list[int]], pad: int) -> Tensor:
    """Prompts and completions as a batch [B, 3, T] of inputs, targets and positions; the completion is scored."""
    rows = [[Sample([*p.tolist(), *t], [False] * len(p) + [True] * len(t))] for p, t in zip(prompts, texts, strict=True)]
    every = torch.arange(len(rows))
    return Ragged.of(rows, pad).fetch(Request(every, every, every, 0, False), torch.device("cpu"))


def _laid_out(values: Sequence[Sequence[float]], targets: Tensor) -> Tensor:
    """Values of completions, one for each of their tokens, at the places that score them, float32 [B, T]; 0 elsewhere."""
    found = torch.zeros(targets.shape)
    found[targets >= 0] = torch.tensor([value for row in values for value in row])
    return found


def _rows(batch: Batch, part: Tensor) -> Batch:
    part = part.to(batch.ids.device)
    extra: Mapping[str, Any] = {name: rows[part] for name, rows in batch.extra.items()}
    return Batch(batch.inputs[part], batch.targets[part], batch.ids[part], batch.view[part], dict(extra))
