"""The critic of a pipeline: labels from the oracle, a network that begins as the teacher, trained by the one loop, and where it cuts.

Symbolic Knowledge Distillation (NAACL 2022, arXiv 2110.07178): binary cross-entropy on judged rows, the best epoch by precision at a
recall on held-out heads, a threshold by recall there. Together with its critic the teacher is the paper's critical teacher.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.config.schema import STUDENT_KEYS, TEACHER_KEYS
from kdrun.dataset.base import Data, Resident, Split
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.critic import acceptance
from kdrun.evaluation.threshold import Rule, common_threshold, keeps, point
from kdrun.plan.base import Session, Training
from kdrun.plan.corpus import Corpus, group_split
from kdrun.plan.single import with_changes
from kdrun.student.critic import LAST
from kdrun.student.taps import ask

AT_ONCE = 2000  # rows that are scored together
FEWEST = 10  # labels: some to learn from and some to cut by
RECALL = 0.8  # by which the epoch is chosen where nothing is cut
CLASSES = ("wrong", "right")


@dataclass(frozen=True)
class Critic:
    """How rows are judged and cut: the node `critic` of conf/plan/pipeline.yaml."""

    labels: int = 4000
    held_out: float = 0.2
    recall: float | None = 0.8
    rule: Rule = "largest"
    hidden: int | None = None
    dropout: float = 0.0
    prior: float | None = None
    fit: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        checks = (
            ("labels", self.labels >= FEWEST, f"too few labels: {FEWEST} at least", "4000"),
            ("held_out", 0 < self.held_out < 1, "a share of the labels between 0 and 1", "0.2"),
            ("recall", self.recall is None or 0 < self.recall <= 1, "legal range (0, 1], or null for no threshold", "0.8"),
            ("rule", self.rule in ("largest", "released"), "legal values largest, released", "largest"),
            ("hidden", self.hidden is None or self.hidden >= 1, "at least 1, or null", "512"),
            ("dropout", 0 <= self.dropout < 1, "legal range [0, 1)", "0.1"),
            ("prior", self.prior is None or 0 < self.prior < 1, "legal range (0, 1), or null for the labels' own share", "0.77"),
        )
        key = "plan.critic."
        return [
            Problem(f"cannot be {getattr(self, name)}", key + name, "", f"{what}; e.g. {key}{name}={example}")
            for name, fits, what, example in checks
            if not fits
        ]

    # -- labels ---------------------------------------------------------------------------------------------------------

    def judge(self, session: Session, corpus: Corpus) -> dict[str, Any]:
        """Rows for the oracle, drawn by the seed: their positions, its labels, and the part of each, all [L].

        Part 0 is learned from, 1 held out, 2 a second held-out set where the rule takes the mean over two; a head is in one part alone.
        """
        key, dry = rng.key(session.tree["seed"], "labels"), bool(session.tree["run"]["dry"])
        number = min(self.labels, len(corpus)) if dry else self.labels
        if number > len(corpus):
            what = f"{number} labels are asked for, and the teacher wrote {len(corpus)} different rows"
            raise RunFailed(f"{what}\n  remedy  plan.critic.labels={len(corpus)} at most, or a larger plan.generate.samples")
        positions = rng.bits(key, corpus.ids).argsort(stable=True)[:number].sort().values
        chosen = corpus.at(positions)
        held = group_split(chosen.heads, self.held_out, rng.key(key, "held out"))
        second = group_split(chosen.heads, 0.5, rng.key(key, "second set")) & (self.rule == "released")
        part, labels = held * (1 + second.long()), chosen.judged(session.data).long()
        there = [labels[part == p] for p in range(3 if self.rule == "released" else 2)]
        if there[0].unique().tolist() != [0, 1] or not all(bool((some > 0).any()) for some in there[1:]):
            told = ", ".join(f"{int(some.sum())} of {len(some)} held-out ones" for some in there[1:])
            what = f"accepted are {int(there[0].sum())} of {len(there[0])} labels to learn from, {told}"
            raise RunFailed(f"no critic can be trained: {what}\n  remedy  a larger plan.critic.labels, or plan.critic=null")
        return {"positions": positions, "labels": labels, "part": part}

    # -- training -------------------------------------------------------------------------------------------------------

    def tree(self, whole: Mapping[str, Any], vocabulary: int, prior: float) -> dict[str, Any]:
        """The configuration of its training stage: the run's own, but for what the critic is. Raises `Refused` for a wrong key in `fit`."""
        tree = copy.deepcopy(dict(whole))
        model = {k: v for k, v in tree["teacher"].items() if k not in TEACHER_KEYS - STUDENT_KEYS}
        micro = tree["hardware"]["micro_batch"]
        tree["hardware"]["micro_batch"] = micro if isinstance(micro, int) else None  # sizes are those of the student's batches
        tree["optim"] |= {"ema": None, "phases": {}}
        tree |= {
            "student": {
                "_target_": "kdrun.student.critic.text_critic",
                **{"vocabulary": vocabulary, "model": model, "hidden": self.hidden, "dropout": self.dropout, "prior": prior},
                **{"taps": {}, "checkpoint": None, "rename": []},
            },
            "teacher": {"kind": "none"},
            "objective": {"_target_": "kdrun.objective.ce.CE"},
            "source": {
                "_target_": "kdrun.source.loader.Loader",
                **{"batch_size": tree["source"].get("batch_size") or 64, "drop_last": False},
            },
            "evaluation": {
                "_target_": "kdrun.evaluation.critic.Critic",
                **{"recall": self.recall or RECALL, "protocol": "best_val", "every_epochs": 1, "ties": "first", "patience": None},
            },
            "plan": {"_target_": "kdrun.plan.single.Single", "start_from": None},
        }
        with_changes(tree, self.fit, "plan.critic.fit")
        return tree

    def trained(self, session: Session, teacher: nn.Module, corpus: Corpus, judged: Mapping[str, Any]) -> tuple[Training, dict[str, float]]:
        """(the critic of its best epoch, what it cost)."""
        learn = judged["part"] == 0
        labels, rows = judged["labels"], corpus.at(judged["positions"])
        prior = self.prior if self.prior is not None else float((labels[learn].sum() + 1) / (learn.sum() + 2))
        tree, splits = self.tree(session.tree, session.data.classes, prior), {}
        for name, part in (("train", learn), ("validation", ~learn)):
            splits[name] = read_by_critic(rows.at(part.nonzero()[:, 0]), labels[part], session.data)
        shape = tuple(splits["train"].storage.inputs.shape[1:])  # type: ignore[attr-defined]
        data = Data(f"judged {session.data.name}", CLASSES, shape, (), (), splits, session.data.total_ids * corpus.samples)
        built = session.build(tree, data)
        built.network.begin_as(teacher)
        training = session.train("critic", built, tree)
        training.take_best()
        return training, {"steps": training.history[-1]["step"], "rows": int(learn.sum()), "seconds": training.spent()[0]}

    # -- scores and the cut ---------------------------------------------------------------------------------------------

    def cut(self, scores: Tensor, judged: Mapping[str, Any]) -> tuple[float | None, dict[str, float]]:
        """(threshold, how it does on the held-out labels)."""
        if self.recall is None:
            return None, {}
        told, labels, part = scores[judged["positions"]], judged["labels"], judged["part"]
        sets = [(told[part == p], labels[part == p]) for p in range(1, 1 + int(part.max()))]
        tau = common_threshold(self.rule, sets, self.recall)
        found = point(keeps(self.rule, told[part > 0], tau), labels[part > 0])
        return tau, {"critic_tau": tau, "critic_precision": 100 * found.precision, "critic_recall": 100 * found.recall}


def read_by_critic(corpus: Corpus, labels: Tensor, data: Data) -> Split:
    """Rows of prompt and completion with their labels [N], padded on the right to one length."""
    assert data.vocabulary is not None
    rows = [torch.tensor(sample.tokens) for sample in corpus.samples_of()]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=data.vocabulary.pad) if rows else torch.zeros(0, 1).long()
    last = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64)
    return Split(Resident(tokens), labels, corpus.ids, {LAST: last})


@torch.no_grad()
def score(session: Session, critic: nn.Module, corpus: Corpus, data: Data) -> dict[str, Any]:
    """c of every row, float64 [N]: a fixed function of prompt and completion, told once."""
    began = time.perf_counter()
    was = critic.training
    critic.eval()
    split = read_by_critic(corpus, torch.zeros(len(corpus), dtype=torch.int64), session.data)
    whole = replace(data, splits={"train": split}, input_shape=tuple(split.storage.inputs.shape[1:]))  # type: ignore[attr-defined]
    told = [acceptance(ask(critic, batch)).cpu() for batch in whole.batches("train", AT_ONCE, session.device)]
    critic.train(was)
    return {"scores": torch.cat(told), "seconds": time.perf_counter() - began}
