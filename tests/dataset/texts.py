"""Token sequences of uneven length, tiny language models of transformers, and runs on texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrun.dataset.base import Data
from kdrun.dataset.tokens import Ragged, Sample, TokenSplit
from kdrun.dataset.topics import TopicData
from kdrun.dataset.vocabulary import Symbols
from kdrun.student.language import causal_lm
from kdrun.student.weights import save_student
from kdrun.types import Batch

V, PADDED = 13, 16  # true tokens, rows of a model's matrix
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large enough that the models have opinions
    "vocab_size": PADDED,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
GPT2 |= {"vocab_size": PADDED, **{f"{place}_pdrop": 0.0 for place in ("embd", "attn", "resid")}}  # its embedding is its head
MODELS = {"llama": LLAMA, "gpt2": GPT2}


def tiny(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A language model with two layers, float64 as far as transformers computes in it."""
    torch.manual_seed(seed)
    return causal_lm(V, config={**MODELS[name], **changes}).double()


def samples(lengths: Sequence[int], seed: int = 0, prompt: int = 2) -> list[Sample]:
    """One sequence of each length, scored after its prompt."""
    g = torch.Generator().manual_seed(seed)
    return [Sample(torch.randint(V, (n,), generator=g).tolist(), [i >= prompt for i in range(n)]) for n in lengths]


def data_of(rows: Sequence[Sequence[Sample]], pad: int = 0) -> Data:
    """The same rows to train and to test on."""
    names = tuple(f"w{i}" for i in range(V))
    longest = max(sum(len(s.tokens) for s in row) for row in rows)
    splits = {
        part: TokenSplit.of(Ragged.of(rows, pad), torch.arange(len(rows)) + first) for part, first in (("train", 0), ("test", len(rows)))
    }
    return Data("texts", names, (longest - 1,), (), (), splits, 2 * len(rows), vocabulary=Symbols(names))


def batch_of(rows: Sequence[Sequence[Sample]], pad: int = 0, index: Tensor | None = None) -> Batch:
    """These rows as one batch of that data set."""
    index = torch.arange(len(rows)) if index is None else index
    return data_of(rows, pad).rows("train", index, torch.zeros_like(index), seed=0)


def alone(sequences: Sequence[Sample]) -> list[list[Sample]]:
    """A row for each."""
    return [[sequence] for sequence in sequences]


class UnevenTexts(TopicData):
    """A data set of a run (run.allow=[tests]) with the keys of another: sequences of 3 to 11 tokens."""

    def load(self) -> Data:
        names, splits, first = tuple(f"w{i}" for i in range(V)), {}, 0
        for part, size in (("train", self.n_train), ("test", self.n_test)):
            lengths = [3 + (5 * i + i // 4) % 9 for i in range(size)]
            splits[part] = TokenSplit.of(Ragged.of(alone(samples(lengths, seed=first))), torch.arange(first, first + size))
            first += size
        return Data("uneven", names, (10,), (), (), splits, first, vocabulary=Symbols(names))


def written(kind: str) -> str:
    """A model's configuration as a command line has it."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in MODELS[kind].items()) + "}"


def uneven_run(teacher: Path, student: str = "llama") -> list[str]:
    """Overrides: 33 texts in steps of 11, two epochs, a teacher of the other kind from a file."""
    other = {"llama": "gpt2", "gpt2": "llama"}[student]
    with torch.random.fork_rng():
        save_student(tiny(other, seed=7).float(), teacher)
    return [
        "dataset=topics",
        "dataset._target_=tests.dataset.texts.UnevenTexts",
        "dataset.n_train=33",
        "dataset.n_test=12",
        "student=causal_lm",
        f"student.config={written(student)}",
        "teacher=causal_lm",
        f"teacher.config={written(other)}",
        f"teacher.checkpoint={teacher}",
        "evaluation=language",
        "source.batch_size=11",
        "optim.epochs=2",
        "optim.lr=0.05",
        "hardware=cpu",
        "hardware.threads=1",
        "run.log_every=1",
        "run.allow=[tests]",
    ]
