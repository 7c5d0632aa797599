"""Evaluation of a language model by what it writes: completions of test prompts, judged by the data set's own reward.

reward      mean over completions, in percent where a reward is right or wrong
pass_k      share of prompts of which at least one of k completions is right (`samples` of them are drawn, k = samples)
length      tokens of a completion
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import prompts_of
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.evaluation.language import SAMPLES
from kdrun.evaluation.sums import Sums
from kdrun.student.generate import Sampling, complete
from kdrun.types import Batch, Teacher

METRICS = ("reward", "pass_k", "length")


@dataclass(eq=False)
class Generation(Evaluation):
    """How is written, how often, and which number is reported. Raises `Refused` for a field outside its range."""

    uses_teacher = False  # what the teacher says of given texts is not looked at
    writes = True

    primary: str = "reward"
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1  # completions of each prompt
    prompts: int | None = None  # of the test split; null: all
    examples: int = 4  # completions that are written to samples.jsonl
    seed: int = 0

    def own_problems(self) -> list[Problem]:
        found = [
            Problem(f"must be at least {low}, not {getattr(self, name)}", f"evaluation.{name}", "", f"e.g. evaluation.{name}={max(low, 1)}")
            for name, low in (("samples", 1), ("examples", 0), ("prompts", 1))
            if getattr(self, name) is not None and getattr(self, name) < low
        ]
        try:
            Sampling(self.max_new_tokens, self.temperature, self.top_p)
        except ValueError as error:
            found.append(Problem(str(error), "evaluation", "", "e.g. evaluation.temperature=1 evaluation.top_p=1"))
        return found

    def problems(self, data: Data) -> list[Problem]:
        if data.vocabulary is None:
            return [Problem(f"{data.name} is no text", "evaluation", data.name, "evaluation=classification")]
        if not data.judges:
            return [Problem(f"{data.name} does not say what a right completion is", "evaluation", data.name, "evaluation=language")]
        return []

    def names(self, classes: int | None = None) -> list[str]:
        return list(METRICS)

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        # By their ids: a rank sees its share of the rows alone.
        chosen = None if self.prompts is None else torch.cat([split.ids[: self.prompts] for split in data.splits.values()])
        sums = Sums(4).to(device)  # rewards, prompts with a right completion, tokens, prompts
        sums.update(0, 0, 0, 0)  # a rank may have no row
        for batch, _ in rows:
            batch = batch if chosen is None else _picked(batch, torch.isin(batch.ids, chosen.to(batch.ids.device)))
            if not len(batch.ids):
                continue
            prompts, references, texts = self._written(network, batch, data, device)
            rewards = torch.tensor(data.rewards(prompts, references, texts), dtype=torch.float64).view(-1, self.samples)
            sums.update(rewards.sum(), (rewards > 0).any(1).sum(), sum(map(len, texts)), len(rewards))
        reward, right, tokens, asked = sums.compute().tolist()
        if not asked:
            raise RunFailed("the evaluation saw no prompt")
        written = asked * self.samples
        return {"reward": 100 * reward / written, "pass_k": 100 * right / asked, "length": tokens / written}

    def _written(
        self, network: nn.Module, batch: Batch, data: Data, device: torch.device
    ) -> tuple[list[Tensor], list[list[int]], list[list[int]]]:
        """(prompts, references, completions), each prompt `samples` times."""
        assert data.vocabulary is not None
        every = torch.arange(len(batch.ids), device=batch.ids.device).repeat_interleave(self.samples)
        prompts, references = prompts_of(torch.stack([batch.inputs, batch.targets], 1)[every])
        ids = (batch.ids.repeat_interleave(self.samples) * self.samples).cpu() + torch.arange(len(every)) % self.samples
        stop = () if data.vocabulary.eos is None else (data.vocabulary.eos,)
        how = Sampling(self.max_new_tokens, self.temperature, self.top_p, stop=stop)
        told = complete(network, prompts, how, rng.key(self.seed, "generation"), ids, data.vocabulary.pad, device)
        return prompts, references, [t[:n].tolist() for t, n in zip(told.tokens.cpu(), told.lengths.tolist(), strict=True)]

    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """Some completions beside their references, as text: samples.jsonl."""
        if not self.examples or data.vocabulary is None:
            return
        batch = next(data.batches("test", self.examples, device))
        lines: list[dict[str, Any]] = []
        for prompt, reference, text in zip(*self._written(network, batch, data, device), strict=True):
            told = {"prompt": prompt.tolist(), "reference": reference, "written": text}
            lines.append({name: data.vocabulary.decode(ids) for name, ids in told.items()})
        (folder / SAMPLES).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _picked(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.inputs[rows], batch.targets[rows], batch.ids[rows], batch.view[rows], {})
