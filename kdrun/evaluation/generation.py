"""Evaluation of a language model by what it writes: completions of test prompts, judged by the data set's own reward.

reward      mean over completions, in percent where a reward is right or wrong
pass_k      share of prompts of which at least one of k completions is right (`samples` of them are drawn, k = samples)
length      tokens of a completion
rouge_l     with `rouge`: Rouge-L of completion and reference (Lin, 2004), the F-measure of their longest common subsequence of words, mean
            over completions in percent, as the public code of MiniLLM and DistiLLM has it; data then need no reward
nll         with `given`: nats per scored token of the given texts
oracle_nll  with `truth`, in worlds that know it: nats per written token under the exact distribution (Yu et al., AAAI 2017, SeqGAN)
own_rkl     with `truth`: the same less the writer's own nats: per token, KL(q || truth) of whole texts as far as the samples tell, q the
            distribution that they were drawn from
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import rouge_score

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import prompts_of
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.evaluation.language import AT_ONCE, SAMPLES
from kdrun.evaluation.sums import Sums
from kdrun.losses.token import IGNORED, token_cross_entropy
from kdrun.student.generate import Sampling, complete
from kdrun.student.taps import ask, taken_by
from kdrun.types import Batch, Teacher

JUDGED = ("reward", "pass_k")
METRICS = (*JUDGED, "length")
TRUE = ("oracle_nll", "own_rkl")


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
    rouge: bool = False
    stemmer: bool = False  # Porter's, of the package nltk, as public code has it
    given: bool = False  # what is said of the given texts too
    truth: bool = False
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
        if self.truth and data.world is None:
            what = f"{data.name} does not know the exact distribution of its texts"
            return [Problem(what, "evaluation.truth", data.name, "evaluation.truth=false, or dataset=topics")]
        if not data.judges and (not (self.rouge or self.truth) or self.primary in JUDGED):
            remedy = "evaluation=language, or evaluation.rouge=true evaluation.primary=rouge_l"
            return [Problem(f"{data.name} does not say what a right completion is", "evaluation", data.name, remedy)]
        if self.rouge and self.stemmer and find_spec("nltk") is None:
            remedy = 'pip install "kdrun[text]", or evaluation.stemmer=false'
            return [Problem("words are stemmed by the package nltk, which is not installed", "evaluation.stemmer", "", remedy)]
        return []

    def names(self, classes: int | None = None) -> list[str]:
        return [*METRICS, *(["rouge_l"] if self.rouge else []), *(["nll"] if self.given else []), *(TRUE if self.truth else ())]

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        # By their ids: a rank sees its share of the rows alone.
        chosen = None if self.prompts is None else torch.cat([split.ids[: self.prompts] for split in data.splits.values()])
        # rewards, prompts with a right completion, Rouge-L, nats by the truth and its own, tokens, prompts; of given texts nats, tokens
        written, given = Sums(7).to(device), Sums(2).to(device)
        written.update(*[0] * 7)  # a rank may have no row
        given.update(0, 0)
        for batch, _ in rows:
            if self.given:
                given.update(*_said(network, batch))
            batch = batch if chosen is None else _picked(network, batch, torch.isin(batch.ids, chosen.to(batch.ids.device)))
            if not len(batch.ids):
                continue
            prompts, references, texts, own = self._written(network, batch, data, device)
            judged = data.rewards(prompts, references, texts) if data.judges else [0.0] * len(texts)
            rewards = torch.tensor(judged, dtype=torch.float64).view(-1, self.samples)
            overlap = self._overlap(data, references, texts) if self.rouge else 0.0
            true = _true(data, prompts, texts) if self.truth else 0.0
            written.update(rewards.sum(), (rewards > 0).any(1).sum(), overlap, true, own, sum(map(len, texts)), len(rewards))
        reward, right, overlap, true, own, tokens, asked = written.compute().tolist()
        if not asked:
            raise RunFailed("the evaluation saw no prompt")
        completions, (nats, scored) = asked * self.samples, given.compute().tolist()
        found = {"reward": 100 * reward / completions, "pass_k": 100 * right / asked} if data.judges else {}
        found |= {"length": tokens / completions}
        found |= {"rouge_l": 100 * overlap / completions} if self.rouge else {}
        found |= {"oracle_nll": true / tokens, "own_rkl": (true - own) / tokens} if self.truth else {}
        return found | ({"nll": nats / scored} if self.given else {})

    def _overlap(self, data: Data, references: Sequence[list[int]], texts: Sequence[list[int]]) -> float:
        """The sum of Rouge-L over completions, each in [0, 1]."""
        assert data.vocabulary is not None
        read = data.vocabulary.text
        pairs = ((read(text), read(reference)) for text, reference in zip(texts, references, strict=True))
        found = [
            rouge_score(text, reference, use_stemmer=self.stemmer, rouge_keys="rougeL")["rougeL_fmeasure"] for text, reference in pairs
        ]
        return float(torch.stack(found).double().sum())

    def _written(
        self, network: nn.Module, batch: Batch, data: Data, device: torch.device
    ) -> tuple[list[Tensor], list[list[int]], list[list[int]], float]:
        """(prompts, references, completions, nats of these), each prompt `samples` times."""
        assert data.vocabulary is not None
        every = torch.arange(len(batch.ids), device=batch.ids.device).repeat_interleave(self.samples)
        prompts, references = prompts_of(torch.stack([batch.inputs, batch.targets], 1)[every])
        ids = (batch.ids.repeat_interleave(self.samples) * self.samples).cpu() + torch.arange(len(every)) % self.samples
        stop = () if data.vocabulary.eos is None else (data.vocabulary.eos,)
        how = Sampling(self.max_new_tokens, self.temperature, self.top_p, stop=stop)
        told = complete(network, prompts, how, rng.key(self.seed, "generation"), ids, data.vocabulary.pad, device)
        texts = [t[:n].tolist() for t, n in zip(told.tokens.cpu(), told.lengths.tolist(), strict=True)]
        return prompts, references, texts, -float(told.log_probs.sum())

    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """Some completions beside their references, as text: samples.jsonl."""
        if not self.examples or data.vocabulary is None:
            return
        batch = next(data.batches("test", self.examples, device))
        lines: list[dict[str, Any]] = []
        for prompt, reference, text in zip(*self._written(network, batch, data, device)[:3], strict=True):
            told = {"prompt": prompt.tolist(), "reference": reference, "written": text}
            lines.append({name: data.vocabulary.decode(ids) for name, ids in told.items()})
        (folder / SAMPLES).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _picked(network: nn.Module, batch: Batch, rows: Tensor | slice) -> Batch:
    extra = {name: values[rows] for name, values in taken_by(network, batch.extra).items()}
    return Batch(batch.inputs[rows], batch.targets[rows], batch.ids[rows], batch.view[rows], extra)


@torch.no_grad()
def _said(network: Any, batch: Batch) -> tuple[float, int]:
    """(nats, scored tokens) of the given texts, so many rows at once that their logits stay small."""
    nats, at_once = 0.0, max(1, AT_ONCE // (batch.inputs.shape[1] * network.vocabulary))
    for begin in range(0, len(batch.ids), at_once):
        part = _picked(network, batch, slice(begin, begin + at_once))
        labels = torch.where(part.targets >= 0, part.targets, IGNORED)
        nats += float(token_cross_entropy(ask(network, part), labels).double().sum())
    return nats, int((batch.targets >= 0).sum())


def _true(data: Data, prompts: Sequence[Tensor], texts: Sequence[list[int]]) -> float:
    """Nats of completions after their prompts under the exact distribution."""
    assert data.world is not None
    rows = [torch.cat([prompt.cpu(), torch.tensor(text, dtype=torch.int64)]) for prompt, text in zip(prompts, texts, strict=True)]
    stacked = pad_sequence(rows, batch_first=True)
    log_probs = torch.log_softmax(data.world(stacked[:, :-1]).double(), -1)
    # Ids beyond the tokens condition alone: they stand in prompts.
    each = log_probs.gather(-1, stacked[:, 1:, None].clamp(max=log_probs.shape[-1] - 1))[..., 0]
    return -sum(float(each[i, len(prompts[i]) - 1 : len(row) - 1].sum()) for i, row in enumerate(rows))
