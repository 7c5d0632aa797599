"""Rounds of querying a teacher under a labelling budget: select points of the pool, ask, train a student on all that is known, again.

Selection sees the student's predictions on the pool and one number, how many points of the pool the teacher is expected
to mislabel; the teacher speaks of the chosen points only, and each is counted. Labels of the pool are looked at for the
report alone, after the answers are in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun import rng
from kdrun.config.check import instantiate
from kdrun.config.schema import STUDENT_KEYS
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data, Split, taken
from kdrun.errors import Problem, Refused
from kdrun.objective.soft_ce import ROW
from kdrun.plan.base import Plan, Session, Training
from kdrun.source.selection import Acquisition, Pool, select
from kdrun.student.build import build as build_network
from kdrun.student.taps import Tapped, ask, model_spec
from kdrun.types import Needs

ASKED = Needs(teacher_logits=True)
AT_ONCE = 500  # rows of a forward pass over the pool


@dataclass(eq=False)
class Rounds(Plan):
    """Each round asks `budget` further points. Fields as in conf/plan/rounds.yaml."""

    rounds: int = 4
    budget: int = 150
    labelled: int | None = None
    acquisition: Acquisition = "rad"
    gain: Literal["margin", "entropy"] = "margin"
    lam: float = 0.0
    mistakes: float | None = None
    warm_start: bool = False
    feature: str | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "budget", "labelled"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.lam < 0:
            raise ValueError(f"lam={self.lam}: legal range [0, inf), a mislabelled point costs something or nothing")
        if self.acquisition not in get_args(Acquisition):
            raise ValueError(f"acquisition={self.acquisition!r}: legal values {', '.join(get_args(Acquisition))}")
        if self.mistakes is not None and not 0 <= self.mistakes < 1:
            raise ValueError(f"mistakes={self.mistakes}: a share from 0 to below 1, or null to measure it on the validation split")
        if self.acquisition == "coreset" and self.feature is None:
            raise ValueError("acquisition=coreset needs plan.feature, a tap of the student such as f1 or pooled")

    def describe(self) -> str:
        return f"{self.rounds + 1} students: on the labelled rows, then after each of {self.rounds} rounds of {self.budget} queries"

    def problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        if data.whole or data.split("train").targets.ndim > 1:
            what = f"{data.name} has no single samples to ask about, one class each"
            return [Problem(what, "dataset", "", "a data set of single samples with a class, e.g. dataset=regions")]
        found = self._pool_problems(data)
        if ROW not in instantiate(tree["objective"], "objective", allowed(tree)).needs().extra:
            what = "this objective learns from the labels, also of points that nobody was asked about"
            found.append(Problem(what, "objective", "", "objective=soft_ce, which learns from the answers"))
        if self.mistakes is None and "validation" not in data.splits:
            remedy = "dataset.validation=0.1, or the share of mistakes itself: plan.mistakes=0.2"
            what = "the teacher's share of mistakes is measured on validation rows, and there are none"
            found.append(Problem(what, "plan.mistakes", "", remedy))
        kind = tree["teacher"].get("kind", "none")
        if kind == "none":
            found.append(Problem("there is no teacher to ask", "teacher", "", "choose one, e.g. teacher=resnet56 (`kdrun ls teachers`)"))
        elif kind not in ("live", "truth"):
            remedy = "a teacher of its own, e.g. teacher=resnet56 (`kdrun ls teachers`)"
            found.append(Problem(f"a teacher of kind '{kind}' is the student itself, and knows no more", "teacher", "", remedy))
        return found + self._feature_problems(tree, data)

    def _pool_problems(self, data: Data) -> list[Problem]:
        rows, asked = len(data.split("train")), self.rounds * self.budget
        known = known_rows(data, self.labelled, 0).sum().item()  # whichever they are, they are so many
        pool = rows - known
        if self.labelled is None and pool == 0:
            what = "every training row has its label, so there is nothing to ask about"
            return [Problem(what, "plan.labelled", data.name, f"plan.labelled={max(1, rows - asked)}: so many labels to begin with")]
        if known == 0:
            what = "no training row has a label, so there is nothing to begin with"
            return [Problem(what, "plan.labelled", data.name, f"plan.labelled={max(1, rows - asked)}")]
        if pool >= asked:
            return []
        what = f"{self.rounds} rounds of {self.budget} queries, and the pool has {pool} points"
        if pool < self.rounds:
            return [
                Problem(what, "plan.labelled", data.name, f"fewer labels to begin with: {rows} rows are {known} labelled ones and the pool")
            ]
        return [Problem(what, "plan.budget", data.name, f"plan.budget={pool // self.rounds} at most")]

    def _feature_problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        """The tap is asked for after the first student is trained, and must be there before."""
        if self.feature is None:
            return []
        student = tree["student"]
        try:
            packages = allowed(tree)
            network = build_network(student, data.classes, data.input_shape, reserved=STUDENT_KEYS, allowed=packages, key="student")
        except Refused:
            return []  # told where the student is built
        try:
            model_spec(
                network, data.input_shape, student.get("taps") or {}, (self.feature,), "student.taps", {self.feature: "plan.feature"}
            )
        except Refused as refused:
            return refused.problems
        return []

    def view(self, tree: Mapping[str, Any], data: Data) -> Data:
        """The labelled rows, with their labels as soft targets: what there is before the first query."""
        known = known_rows(data, self.labelled, tree["seed"])
        return with_targets(data, known, one_hot(data))

    def run(self, session: Session) -> Any:
        first = session.build()
        session.ready_teacher(first)
        training = session.train("round-0", self._parts(session, first.data, 0))
        at_first = known_rows(session.data, self.labelled, session.tree["seed"])
        known, targets = at_first, one_hot(session.data)
        rows = [self._row(0, 0, training, {})]
        for number in range(1, self.rounds + 1):
            query = partial(self._query, session, first, training, known, number)
            asked = session.kept(f"round-{number}", query)
            known = known.clone().index_fill_(0, asked["positions"], True)
            targets = targets.clone().index_copy_(0, asked["positions"], asked["answers"])
            training = session.train(f"round-{number}", self._parts(session, with_targets(session.data, known, targets), number, training))
            share = {"correct_share": right_share(session.data, known & ~at_first, targets)}
            rows.append(self._row(number, number * self.budget, training, {**asked["facts"], **share}))
            session.reporter.note(told(rows[-1], training.built.evaluation.primary))
        draw(session.folder, rows, training.built.evaluation.primary, self.acquisition)
        metrics = {k: v for k, v in rows[-1].items() if k in ("correct_share", "support_share", "queries")}
        return session.finish(training, metrics, {"rounds": rows})

    def _parts(self, session: Session, data: Data, number: int, before: Training | None = None) -> Any:
        """A student of its own for each round: fresh weights, or those of the round before."""
        tree = {**session.tree, "seed": rng.key(session.tree["seed"], "round", number) % 2**31, "teacher": {"kind": "none"}}
        built = session.build(tree, data)
        if self.warm_start and before is not None:
            built.network.load_state_dict(before.exported().state_dict())
        return built

    def _query(self, session: Session, first: Any, training: Training, known: Tensor, number: int) -> dict[str, Any]:
        """Choose points of the pool and ask the teacher about them: positions in the training split and its answers [b, C]."""
        open_ = (~known).nonzero().squeeze(1)
        wrong = self._mistakes(session, first, len(open_))
        student = training.exported()
        pool = self._pool(session, student, open_, known.nonzero().squeeze(1), wrong)
        chosen = select(self.acquisition, pool, self.budget, session.tree["seed"], number, self.gain, self.lam)
        positions = open_[chosen.positions].sort().values
        answers = torch.cat([first.teacher.signal(b, ASKED).logits.float().softmax(1).cpu() for b in batches(session, positions)])
        support = 100 * chosen.support / len(open_)
        facts = {"support_share": support, "game_value": chosen.value, "expected_mistakes": wrong, "pool": len(open_)}
        return {"positions": positions, "answers": answers, "facts": facts}

    def _mistakes(self, session: Session, first: Any, size: int) -> int:
        """m, of `size` points: from the teacher's accuracy on validation rows, or as stated."""
        share = self.mistakes
        if share is None:
            hits = [
                (first.teacher.signal(b, ASKED).logits.argmax(1) == b.targets).sum()
                for b in session.data.batches("validation", AT_ONCE, session.device)
            ]
            share = 1 - float(torch.stack(hits).sum()) / len(session.data.split("validation"))
        return min(round(share * size), size - 1)

    @torch.no_grad()
    def _pool(self, session: Session, student: nn.Module, open_: Tensor, known: Tensor, wrong: int) -> Pool:
        student.eval()
        ids = session.data.split("train").ids[open_]
        if self.feature is None:
            said = torch.cat([ask(student, batch).float().softmax(1).cpu() for batch in batches(session, open_)])
            return Pool(ids, said, wrong)
        tapped = Tapped(student, session.tree["student"].get("taps") or {}, [self.feature], "plan.feature")
        said, features = self._features(session, tapped, open_)
        _, of_known = self._features(session, tapped, known)
        return Pool(ids, said, wrong, features, of_known)

    def _features(self, session: Session, tapped: Tapped, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities [N, C], features [N, D]) of the student on training rows."""
        said, features = [], []
        for batch in batches(session, rows):
            logits, taps = tapped(batch.inputs, batch.extra)
            said.append(logits.float().softmax(1).cpu())
            features.append(taps[str(self.feature)].flatten(1).cpu())
        return torch.cat(said), torch.cat(features)

    def _row(self, number: int, queries: int, training: Training, facts: Mapping[str, float]) -> dict[str, Any]:
        return {"round": number, "queries": queries, **training.history[-1]["test"], **facts}


def batches(session: Session, positions: Tensor) -> Any:
    """Rows of the training split, as evaluated."""
    return session.data.stream(
        "train", ((p, torch.zeros_like(p)) for p in positions.split(AT_ONCE)), seed=0, augment=False, device=session.device
    )


def known_rows(data: Data, labelled: int | None, seed: int) -> Tensor:
    """Which training rows have a label before the first query, bool [N]: the data's own row "labelled", or so many drawn ones."""
    split = data.split("train")
    if labelled is None and "labelled" in split.extra:
        return split.extra["labelled"].clone()
    known = torch.zeros(len(split), dtype=torch.bool)
    order = rng.bits(rng.key(seed, "labelled"), split.ids).argsort(stable=True)
    known[order[: labelled if labelled is not None else len(split)]] = True
    return known


def one_hot(data: Data) -> Tensor:
    """[N, C] float32. Rows of the pool are replaced by the teacher's answer before they are trained on."""
    return F.one_hot(data.split("train").targets.clamp(min=0), data.classes).float()


def with_targets(data: Data, known: Tensor, targets: Tensor) -> Data:
    """The data with the known training rows alone, and their soft targets [N, C] beside them."""
    positions = known.nonzero().squeeze(1)
    train: Split = taken(data.split("train"), positions)
    train = replace(train, extra={**train.extra, ROW: targets[positions]})
    return replace(data, splits={**data.splits, "train": train})


def right_share(data: Data, asked: Tensor, targets: Tensor) -> float:
    """Percent of the teacher's answers that name the true class. The one place where labels of the pool are read."""
    truth = data.split("train").targets
    return 100 * float((targets.argmax(1) == truth)[asked].double().mean())


def told(row: Mapping[str, Any], primary: str) -> str:
    right = f"teacher right on {row['correct_share']:.0f} % of them, support {row['support_share']:.0f} % of the pool"
    return f"round {row['round']}: {row['queries']} queries, {primary} {row[primary]:.2f}; {right}"


def draw(folder: Path, rows: list[dict[str, Any]], primary: str, acquisition: str) -> None:
    """The learning curve: the metric, and the share of right answers, by queries (plots/queries.png)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(5.2, 3.4), layout="constrained")
    left.plot([r["queries"] for r in rows], [r[primary] for r in rows], marker="o", color="tab:blue", label=f"{primary} of the student")
    left.set(xlabel="queries to the teacher", ylabel=primary, title=f"selection: {acquisition}")
    right = left.twinx()
    asked = [r for r in rows if "correct_share" in r]
    curve = [r["correct_share"] for r in asked]
    right.plot([r["queries"] for r in asked], curve, marker="s", linestyle=":", color="tab:gray", label="right answers so far")
    right.set(ylabel="right answers so far (%)", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / "queries.png", dpi=120)
    pyplot.close(figure)
