"""The teacher writes: completions of every prompt, kept a chunk of prompts at a time, so that a killed run goes on where it was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.errors import Problem
from kdrun.plan.base import Session
from kdrun.plan.corpus import Corpus, Prompts
from kdrun.student.generate import Sampling, complete


@dataclass(frozen=True)
class Generate:
    """How the teacher writes: the node `generate` of conf/plan/pipeline.yaml."""

    samples: int = 10
    max_new_tokens: int = 12
    temperature: float = 1.0
    top_p: float = 0.5
    top_k: int | None = None
    chunk: int = 500

    def problems(self) -> list[Problem]:
        found = [
            Problem(f"must be at least 1, not {getattr(self, name)}", f"plan.generate.{name}", "", f"e.g. plan.generate.{name}=10")
            for name in ("samples", "chunk")
            if getattr(self, name) < 1
        ]
        try:
            self.sampling(())
        except ValueError as error:
            found.append(Problem(str(error), "plan.generate", "", "e.g. plan.generate.temperature=1 plan.generate.top_p=0.9"))
        return found

    def sampling(self, stop: tuple[int, ...]) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, stop)

    def told(self) -> dict[str, Any]:
        """The settings that decide what is written, for the provenance of a row."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens", "samples")}


def write(session: Session, network: nn.Module, prompts: Prompts, how: Generate) -> tuple[Corpus, dict[str, float]]:
    """(all completions, what they cost). A chunk is a function of the weights, the seed and its prompts, whatever the chunk size."""
    completions: list[list[int]] = []
    log_probs: list[Tensor] = []
    seconds = 0.0
    for number, places in enumerate(torch.arange(len(prompts)).split(how.chunk)):
        chunk = session.kept(f"generate/{number:06d}", partial(_chunk, session, network, prompts, places, how))
        lengths = chunk["lengths"].tolist()
        completions += [row[:n] for row, n in zip(chunk["tokens"].tolist(), lengths, strict=True)]
        log_probs.append(chunk["log_probs"])
        seconds += chunk["seconds"]
    every = torch.arange(len(prompts)).repeat_interleave(how.samples)
    draws = torch.arange(len(every)) % how.samples
    corpus = Corpus(prompts, every, draws, torch.cat(log_probs), completions, how.samples)
    return corpus, {"rows": len(corpus), "tokens": sum(map(len, completions)), "seconds": seconds}


def _chunk(session: Session, network: nn.Module, prompts: Prompts, places: Tensor, how: Generate) -> dict[str, Any]:
    vocabulary = session.data.vocabulary
    assert vocabulary is not None
    began = time.perf_counter()
    every = places.repeat_interleave(how.samples)
    texts = [torch.tensor(prompts.tokens[p]) for p in every.tolist()]
    # Copies of a prompt differ by their number, which is made part of the id.
    ids = prompts.ids[every] * how.samples + torch.arange(len(every)) % how.samples
    stop = () if vocabulary.eos is None else (vocabulary.eos,)
    told = complete(network, texts, how.sampling(stop), rng.key(session.tree["seed"], "generate"), ids, vocabulary.pad, session.device)
    told = told._replace(tokens=told.tokens.cpu(), lengths=told.lengths.cpu(), log_probs=told.log_probs.cpu())
    return {**told._asdict(), "log_probs": told.log_probs.sum(1), "seconds": time.perf_counter() - began}
