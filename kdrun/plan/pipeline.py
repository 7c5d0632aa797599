"""A teacher that is asked in words and heard in words: write, deduplicate, judge, criticise, filter, train on what is left.

Symbolic Knowledge Distillation (West et al., NAACL 2022, arXiv 2110.07178): the teacher's samples are written down as a corpus D, cleaned
by a critic c, and the student learns  L = -(1/|D_tau|) sum log q(y | x)  over D_tau = {(x, y) in D: c(x, y) > tau}. Without a critic and
with repeats kept it is plain sequence-level distillation by sampling. No gradient reaches teacher or critic while the student learns.

Stages: generate (kept a chunk at a time), deduplicate, label, critic (the one loop), score, filter, student (the one loop).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.config.check import instantiate
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import TokenSplit
from kdrun.errors import Problem, Refused, RunFailed, did_you_mean
from kdrun.evaluation.acceptance import PIPELINE
from kdrun.evaluation.threshold import keeps
from kdrun.plan.base import Plan, Session
from kdrun.plan.corpus import Corpus, Prompts, first_of_each, prompts_in, write_provenance
from kdrun.plan.critic import Critic, score
from kdrun.plan.writing import Generate, write

CORPUS = "corpus.jsonl"  # every row that was written, in the run's folder


@dataclass(eq=False)
class Pipeline(Plan):
    """Settings: conf/plan/pipeline.yaml. Raises `Refused` for one outside its range."""

    generate: Generate = field(default_factory=Generate)
    deduplicate: bool = True
    critic: Critic | None = field(default_factory=Critic)

    def __post_init__(self) -> None:
        self.generate = _settings(Generate, self.generate, "plan.generate")
        self.critic = None if self.critic is None else _settings(Critic, self.critic, "plan.critic")
        problems = [*self.generate.problems(), *(self.critic.problems() if self.critic else [])]
        if problems:
            raise Refused(problems)

    def describe(self) -> str:
        critic, written = self.critic, f"the teacher writes {self.generate.samples} completions of every prompt"
        if critic is None:
            return f"{written}; one student is trained on them"
        return f"{written}; a critic is trained on {critic.labels} judged ones; one student is trained on what the critic keeps"

    # -- before anything is spent -----------------------------------------------------------------------------------

    def problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        if data.vocabulary is None or not isinstance(data.split("train"), TokenSplit):
            return [Problem(f"{data.name} has no prompts", "dataset", data.name, "a data set of text, e.g. dataset=events")]
        found = []
        if tree["teacher"].get("kind") != "live":
            found.append(
                Problem("there is no teacher to write", "teacher", "", "teacher=causal_lm, or plan=single to learn from given texts")
            )
        if self.start_from == "teacher":
            what = "what a pipeline trains is smaller than its teacher, or another network"
            found.append(Problem(what, "plan.start_from", "", "plan.start_from=null"))
        needs = instantiate(tree["objective"], "objective", allowed(tree)).needs()
        if needs.teacher_logits or needs.teacher_taps or needs.teacher_network:
            what = "this objective listens to the teacher, which here is heard by its texts alone"
            found.append(Problem(what, "objective", "", "objective=sft"))
        primary = str(tree["evaluation"]["primary"])
        if primary in PIPELINE:
            what = f"'{primary}' is a number of the pipeline, not of the student"
            found.append(Problem(what, "evaluation.primary", "", "evaluation.primary=accept"))
        return found or self._critic_problems(tree, data)

    def _critic_problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        if self.critic is None:
            return []
        if data.oracle is None:
            what = f"{data.name} has no oracle to judge what a teacher writes"
            return [Problem(what, "plan.critic", data.name, "plan.critic=null, or a world that knows, e.g. dataset=events")]
        most = len(prompts_in(data)) * self.generate.samples
        if self.critic.labels > most:
            what = f"{self.critic.labels} labels are asked for; no more than {most} completions are written"
            return [Problem(what, "plan.critic.labels", data.name, f"plan.critic.labels={most} at most")]
        try:
            self.critic.tree(tree, data.classes, 0.5)
        except Refused as refused:
            return refused.problems
        return []

    # -- the stages -------------------------------------------------------------------------------------------------

    def run(self, session: Session) -> Any:
        first = session.build()
        facts = session.ready_teacher(first)
        teacher, data = first.teacher.network, session.data
        costs: dict[str, dict[str, float]] = {}
        written, costs["generate"] = write(session, teacher, self._prompts(session), self.generate)
        corpus, repeats = self._unique(written)
        keep, scores, label, metrics = self._criticised(session, teacher, corpus, costs)
        left = corpus.at(keep.nonzero()[:, 0])
        if not len(left):
            raise RunFailed(
                f"the critic keeps none of {len(corpus)} rows\n  remedy  a larger plan.critic.recall, or plan.critic.rule=largest"
            )
        metrics |= self._told(data, facts, session.tree, written, corpus, keep)
        different = f", {len(corpus)} different" if self.deduplicate else ""
        session.reporter.note(f"{len(written)} rows written{different}, {len(left)} kept")
        if session.ranks.first:
            shared = {"teacher": facts.get("sha256"), "sampling": self.generate.told(), "seed": session.tree["seed"]}
            columns = {"repeats": repeats, "score": scores, "label": label, "kept": keep}
            write_provenance(session.folder / CORPUS, corpus, data, shared, columns)
        # The student sees texts: what its teacher says otherwise is not asked for.
        tree = {**session.tree, "teacher": {"kind": "none"}}
        training = session.train(None, session.build(tree, left.as_training(data)), tree)
        costs["student"] = {"steps": training.history[-1]["step"], "rows": len(left), "seconds": training.spent()[0]}
        return session.finish(training, metrics, {"stages": costs})

    def _prompts(self, session: Session) -> Prompts:
        prompts = prompts_in(session.data)
        if not session.tree["run"]["dry"]:
            return prompts
        few = self.generate.chunk
        return Prompts(prompts.tokens[:few], prompts.ids[:few], prompts.heads[:few])

    def _unique(self, written: Corpus) -> tuple[Corpus, Tensor]:
        """(what the next stages see, how often each of its rows was written)."""
        if not self.deduplicate:
            return written, torch.ones(len(written), dtype=torch.int64)
        positions, repeats = first_of_each(written.prompt, written.completions)
        return written.at(positions), repeats

    def _criticised(
        self, session: Session, teacher: nn.Module, corpus: Corpus, costs: dict[str, dict[str, float]]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, float]]:
        """(which rows are kept, their scores, their labels or -1, how the critic does); the cost of its stages is noted."""
        if self.critic is None:
            return torch.ones(len(corpus), dtype=torch.bool), None, None, {}
        judged = session.kept("label", partial(self.critic.judge, session, corpus))
        costs["label"] = {"rows": len(judged["labels"])}
        training, costs["critic"] = self.critic.trained(session, teacher, corpus, judged)
        told = session.kept("score", partial(score, session, training.exported(), corpus, training.built.data))
        costs["score"] = {"rows": len(corpus), "seconds": told["seconds"]}
        tau, metrics = self.critic.cut(told["scores"], judged)
        label = torch.full((len(corpus),), -1).index_copy_(0, judged["positions"], judged["labels"])
        return keeps(self.critic.rule, told["scores"], tau), told["scores"], label, metrics

    def _told(
        self, data: Data, facts: Mapping[str, Any], tree: Mapping[str, Any], written: Corpus, corpus: Corpus, keep: Tensor
    ) -> dict[str, float]:
        """Sizes and accept rates of the corpora. The one place where the oracle is asked about rows that nobody paid a label for."""
        left = corpus.at(keep.nonzero()[:, 0])
        found: dict[str, float] = {"corpus_size": len(left), "corpus_tails": len({tuple(text) for text in left.completions})}
        primary = tree["evaluation"]["primary"]
        if primary in facts:
            found["teacher_accept"] = float(facts[primary])
        if data.oracle is not None:
            right = corpus.judged(data).double()
            found |= {"unique_accept": 100 * float(right.mean())} if self.deduplicate else {}
            found |= {"corpus_accept": 100 * float(right[keep].mean()), "written_accept": 100 * float(written.judged(data).double().mean())}
        return found


def _settings(kind: type, node: Any, key: str) -> Any:
    """A node of the configuration as its dataclass. Raises `Refused` for a key that it does not have."""
    if not isinstance(node, Mapping):
        return node
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = sorted(node.keys() - fields.keys())
    if unknown:
        raise Refused([Problem("unknown key", f"{key}.{name}", "", did_you_mean(str(name), fields)) for name in unknown])
    return kind(**node)
