"""Evaluation of a language model as a source of knowledge: which share of what it writes is right, by the data set's own reward.

accept          of `samples` completions of each test prompt, in percent: the metric of Symbolic Knowledge Distillation (arXiv 2110.07178)
greedy_accept   of the most likely completion alone; where the likeliest one is mostly right it hides what sampling shows
unique_tails    different completions among the samples of a prompt, their mean

The plan `pipeline` adds what it knows of its corpora and of the teacher: see `PIPELINE`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.errors import RunFailed
from kdrun.evaluation.base import Rows
from kdrun.evaluation.generation import Generation
from kdrun.evaluation.sums import Sums

METRICS = ("accept", "greedy_accept", "unique_tails")
PIPELINE = (
    "teacher_accept",  # the teacher's own score, measured the same way
    "corpus_accept",  # share of the rows that the student learns from that is right
    "corpus_size",  # these rows
    "corpus_tails",  # different completions among them
    "written_accept",  # of all that the teacher wrote, repeats included
    "unique_accept",  # of that without repeats, before any critic
    "critic_precision",  # on held-out labels, at the threshold
    "critic_recall",
    "critic_tau",  # the threshold
)


@dataclass(eq=False)
class Acceptance(Generation):
    """How is written and how often. Raises `Refused` for a field outside its range."""

    primary: str = "accept"
    top_p: float = 0.9
    samples: int = 10

    def names(self, classes: int | None = None) -> list[str]:
        return [*METRICS, *PIPELINE]

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        batches = list(rows)
        greedy = replace(self, samples=1, temperature=0.0)
        sampled, best = (how._summed(network, batches, data, device) for how in (self, greedy))
        rewards, different, prompts = sampled.tolist()
        if not prompts:
            raise RunFailed("the evaluation saw no prompt")
        return {
            "accept": 100 * rewards / (prompts * self.samples),
            "greedy_accept": 100 * best[0].item() / prompts,
            "unique_tails": different / prompts,
        }

    def _summed(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> Tensor:
        """[rewards, different completions of each prompt, prompts], summed over all ranks."""
        # By their ids: a rank sees its share of the rows alone.
        chosen = None if self.prompts is None else torch.cat([split.ids[: self.prompts] for split in data.splits.values()])
        sums = Sums(3).to(device)
        for batch, _ in rows:
            some = torch.ones_like(batch.ids, dtype=torch.bool) if chosen is None else torch.isin(batch.ids, chosen.to(batch.ids.device))
            if not bool(some.any()):
                continue
            batch = batch._replace(inputs=batch.inputs[some], targets=batch.targets[some], ids=batch.ids[some])
            prompts, references, texts, _ = self._written(network, batch, data, device)
            sums.update(sum(data.rewards(prompts, references, texts)), sum(map(len, self._different(texts))), len(batch.ids))
        return sums.compute()

    def _different(self, texts: list[list[int]]) -> list[set[tuple[int, ...]]]:
        """The different completions of each prompt."""
        return [{tuple(text) for text in texts[i : i + self.samples]} for i in range(0, len(texts), self.samples)]
