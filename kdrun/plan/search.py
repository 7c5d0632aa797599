"""Choose the student's architecture without training any, then train the chosen one: DisWOT (CVPR 2023, arXiv 2303.15678).

Every candidate at random initialisation is held against the teacher's architecture at random initialisation; scores are kept one
by one, so that a search goes on where it was killed. The chosen network is trained by the ordinary loop under the run's own
objective; others beside it if `trials` asks for them. Accuracies, of these or of a table, then say how well each score ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.evaluation.protocol import reported
from kdrun.evaluation.ranking import PICKS, read_benchmark
from kdrun.plan.base import Plan, Session, Training
from kdrun.plan.candidates import Budget, BudgetOf, Candidates
from kdrun.plan.evolution import Evolution, Step, evolve
from kdrun.plan.findings import ACCURACY, FEWEST, Findings
from kdrun.plan.scoring import Init, Scorer, Semantic, classifier
from kdrun.student.space import Architecture, StageSpace
from kdrun.student.taps import model_spec

SIMILARITIES = ("m_r", "m_s", "sum")  # scores that look at the networks
LARGEST_SPACE = 4096  # architectures; every one's cost is looked at


@dataclass(eq=False)
class Search(Plan):
    """Settings: conf/plan/search.yaml."""

    space: dict[str, Any] = field(default_factory=lambda: {"depths": [1, 3, 5, 7], "widths": [[16, 16, 32, 64]]})
    score: Literal["m_r", "m_s", "sum", "parameters", "depth", "random"] = "sum"
    semantic: Semantic = "channel"
    batch: int = 128
    inits: int = 3
    init: Init = "kaiming"
    tap: str = "f3"
    budget: Budget = None
    budget_of: BudgetOf = "parameters"
    method: Literal["exhaustive", "evolution"] = "exhaustive"
    population: int = 36
    tournament: int = 8
    parents: int = 5
    cycles: int = 1000
    candidate: str | int = "best"
    train: bool = True
    trials: int = 1
    benchmark: str | None = None
    against: Literal["distilled", "vanilla"] = "distilled"

    def __post_init__(self) -> None:
        self._space = StageSpace.of(self.space)
        for name in ("inits", "population", "tournament", "parents", "cycles", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: legal range [1, inf)")
        if self.batch < 2:
            raise ValueError(f"batch={self.batch}: legal range [2, inf), relations are between samples")
        if isinstance(self.budget, (int, float)) and not self.budget > 0:
            raise ValueError(f"budget={self.budget}: legal range (0, inf), 'median' or null")
        if len(self._space.enumerate()) > LARGEST_SPACE:
            raise ValueError(f"space=...: legal are at most {LARGEST_SPACE} architectures")

    @property
    def _ranks(self) -> bool:
        """Whether the scores are held against accuracies."""
        return self.trials > 1 or self.benchmark is not None

    @property
    def _compares(self) -> bool:
        """Whether any network has to be looked at."""
        return self._ranks or (self.candidate == "best" and self.score in SIMILARITIES)

    def candidates(self, tree: Mapping[str, Any], data: Data) -> Candidates:
        return Candidates(self._space, tree, data, self.budget, self.budget_of)

    def describe(self) -> str:
        size = len(self._space.enumerate())
        number = str(size) if self.method == "exhaustive" else f"{self.cycles} out of {size}"
        scored = f"{number} architectures are scored untrained" if self.candidate == "best" or self._ranks else "nothing is scored"
        trained = "nothing is trained" if not self.train else f"{self.trials} student{'s are' if self.trials > 1 else ' is'} trained"
        return f"{scored}, {trained}"

    # -- before anything is spent -----------------------------------------------------------------------------------

    def problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        if not {"depths", "widths"} <= set(tree["student"]):
            return [Problem("the student has no depths and widths to choose", "student", "", "student=stage_resnet")]
        found, rows = [], len(data.split("train"))
        for key, weights in (("student.checkpoint", tree["student"].get("checkpoint")), ("plan.start_from", self.start_from)):
            if weights:
                found.append(Problem("a network that is chosen here has no weights yet", key, "", f"{key}=null"))
        if not self.train and self.benchmark is None:
            remedy = "plan.benchmark=s1, or plan.train=true"
            found.append(Problem("nothing is trained, and there is no table to rank against", "plan.train", "", remedy))
        if self.trials > 1 and self.benchmark is not None:
            what = "accuracies come from a table or from the run's own trials, not from both"
            found.append(Problem(what, "plan.trials", "", "plan.trials=1, or plan.benchmark=null"))
        primary = tree["evaluation"]["primary"]
        if self.train and primary.startswith(("tau_", "rho_", *(f"top1_{pick}" for pick in PICKS))):
            what = f"'{primary}' is a number of the whole search, not of a training"
            found.append(Problem(what, "evaluation.primary", "", f"evaluation.primary={ACCURACY}"))
        if self.batch > rows:
            found.append(Problem(f"a batch of {self.batch} from {rows} training rows", "plan.batch", "", f"plan.batch={rows}"))
        candidates = self.candidates(tree, data)
        return [*found, *self._space_problems(candidates), *(self._network_problems(candidates) if self._compares else [])]

    def _space_problems(self, candidates: Candidates) -> list[Problem]:
        within = candidates.within
        if not within:
            cheapest = min(candidates.costs.values())
            return [Problem(f"no architecture has at most {self.budget} {self.budget_of}", "plan.budget", "", f"plan.budget={cheapest}")]
        found = []
        for key, size in (("trials", self.trials), ("population", self.population if self.method == "evolution" else 1)):
            if size > len(within):
                what = f"{size} different networks are asked for; {len(within)} are within the budget"
                found.append(Problem(what, f"plan.{key}", "", f"plan.{key}={len(within)}"))
        try:
            if self.candidate != "best":
                candidates.named(str(self.candidate), key=0)
            if self.benchmark is not None and sum(self._space.name(a) in self._table() for a in within) < FEWEST:
                what = f"the table has fewer than {FEWEST} of the architectures"
                found.append(Problem(what, "plan.benchmark", "", "a table of this space, or plan.benchmark=null"))
        except Refused as refused:
            found += refused.problems
        return found

    def _network_problems(self, candidates: Candidates) -> list[Problem]:
        """Taps and classifiers of the teacher and of one student of each width."""
        if candidates.tree["teacher"].get("kind") != "live":
            return [Problem("a similarity is one to a teacher network", "teacher", "", "teacher=resnet56, or plan.score=parameters")]
        depths = self._space.depths[:1] * self._space.stages
        networks = [candidates.teacher(), *(candidates.student(Architecture(depths, widths)) for widths in self._space.widths)]
        features = set()
        for network in networks:
            module, data = network.on_meta(candidates.data), candidates.data
            model_spec(module, data.input_shape, network.node.get("taps") or {}, (self.tap,), f"{network.key}.taps")
            features.add(classifier(module, data.classes, network.key).in_features)
        if self.semantic == "channel" and len(features) > 1:
            what = f"the classifiers see {', '.join(map(str, sorted(features)))} features, so that channels cannot be compared"
            return [Problem(what, "plan.semantic", "", "plan.semantic=class")]
        return []

    # -- the search -------------------------------------------------------------------------------------------------

    def run(self, session: Session) -> Any:
        built = session.build()
        candidates = self.candidates(session.tree, session.data)
        score = Scorer(session, candidates, self.batch, self.inits, self.init, self.tap, self.semantic, self._compares)
        key, dry = rng.key(session.tree["seed"], "search"), bool(session.tree["run"]["dry"])
        steps = self._search(candidates, score, key, dry)
        if self.candidate == "best":
            picked = max(score.known, key=lambda a: score.known[a][self.score])  # of equals the first
        else:
            picked = candidates.named(str(self.candidate), rng.key(key, "random pick"))
        session.reporter.note(
            f"{len(score.known)} of {len(candidates.within)} architectures scored; {self.candidate}: {self._space.name(picked)}"
        )
        if not self.train:
            metrics, facts = self._told(session, self._findings(candidates, score, picked, {}, []), steps)
            facts |= {"teacher": {"from": "random initialisation: the scores use no trained teacher"}}
            return session.conclude(built, metrics, facts)
        trials, random = self._trials(candidates, picked, min(self.trials, FEWEST) if dry else self.trials, key)
        # Kept until the end: a session knows the parts of a stage by their identity.
        trained = {a: self._trained(session, f"trials/{self._space.name(a)}", a) for a in trials if a != picked}
        winner = trained[picked] = self._trained(session, None, picked)
        accuracies = {a: _accuracy(training) for a, training in trained.items()} if self.trials > 1 else {}
        metrics, facts = self._told(session, self._findings(candidates, score, picked, accuracies, random), steps)
        return session.finish(winner, metrics, facts)

    def _search(self, candidates: Candidates, score: Scorer, key: int, dry: bool) -> list[Step]:
        """Score what the method looks at: everything, or what evolution finds. Nothing, where the choice and the report need none."""
        if self.candidate != "best" and not self._ranks:
            return []
        if self.method == "exhaustive":
            for architecture in candidates.within[:FEWEST] if dry else candidates.within:
                score(architecture)
            return []
        sizes = Evolution(self.population, self.tournament, self.parents, FEWEST if dry else self.cycles)
        return list(evolve(self._space, candidates.within, lambda a: score(a)[self.score], sizes, rng.key(key, "evolution")))

    def _trials(self, candidates: Candidates, picked: Architecture, count: int, key: int) -> tuple[list[Architecture], list[Architecture]]:
        """What is trained: the picked one, the largest, then random ones until there are `count`; and which of it are random picks."""
        trials = dict.fromkeys([picked, candidates.largest()][:count])
        random = []
        for architecture in candidates.random(len(candidates.within), rng.key(key, "random pick")):
            if len(trials) == count:
                break
            trials[architecture] = None
            random.append(architecture)
        return list(trials), random

    def _trained(self, session: Session, name: str | None, architecture: Architecture) -> Training:
        """An ordinary training stage."""
        tree = {**session.tree, "student": {**session.tree["student"], **self._space.config(architecture)}}
        built = session.build(tree)
        session.ready_teacher(built)
        return session.train(name, built, tree)

    # -- what it says -----------------------------------------------------------------------------------------------

    def _table(self) -> dict[str, dict[str, float]]:
        return read_benchmark(self.benchmark, "plan.benchmark") if self.benchmark is not None else {}

    def _findings(
        self, candidates: Candidates, score: Scorer, picked: Architecture, trained: Mapping[Architecture, float], random: list[Architecture]
    ) -> Findings:
        """Accuracies are those of the table, or else the run's own."""
        if not self._ranks:
            return Findings(candidates, score.known, picked)
        name, table = self._space.name, self._table()
        if not table:
            return Findings(candidates, {a: score(a) for a in (*score.known, *trained)}, picked, trained, random)
        rows = {a: table[name(a)] for a in candidates.within if name(a) in table}
        accuracies = {a: row[self.against] for a, row in rows.items()}
        vanilla = {a: row["vanilla"] for a, row in rows.items()} if self.against == "distilled" else {}
        # Over all of them: what a random pick is worth on average.
        return Findings(candidates, {a: score(a) for a in (*score.known, picked)}, picked, accuracies, list(accuracies), vanilla)

    def _told(self, session: Session, findings: Findings, steps: list[Step]) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics and facts for the summary; the picture is drawn."""
        of = f"{self.against} accuracy, table '{self.benchmark}'" if self.benchmark else "accuracy, trained in this run"
        findings.draw(session.folder, f"Architectures before training, scored on {session.data.name}, and their {of}")
        name, by = self._space.name, self.score if self.candidate == "best" else str(self.candidate)
        path = [{"architecture": name(s.architecture), "score": s.score, "best": s.best} for s in steps]
        return findings.metrics(), {"search": {"by": by, **findings.facts(), "steps": path}}


def _accuracy(training: Training) -> float:
    evaluation = training.built.evaluation
    return float(reported(training.history, evaluation.protocol, ACCURACY, evaluation.last_k, evaluation.ties).value)
