"""What a search found: scores beside accuracies, as metrics, as a table for the summary and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.evaluation.ranking import SCORES, correlations, plot_ranking
from kdrun.plan.candidates import Candidates
from kdrun.student.space import Architecture

ACCURACY = "top1"
FEWEST = 3  # points of which a rank correlation is reported


@dataclass(eq=False)
class Findings:
    """Accuracies are those of a table or of the run's own trainings, in percent; there may be none."""

    candidates: Candidates
    scores: Mapping[Architecture, Mapping[str, float]]  # by name of the score
    picked: Architecture
    accuracies: Mapping[Architecture, float] = field(default_factory=dict)
    random: Sequence[Architecture] = ()  # those that are random picks
    vanilla: Mapping[Architecture, float] = field(default_factory=dict)  # accuracies of plain training, where they are not the accuracies

    def __post_init__(self) -> None:
        self._points = [a for a in self.scores if a in self.accuracies]

    def metrics(self) -> dict[str, float]:
        """tau_*, rho_*, top1_*: those of `kdrun.evaluation.ranking.Ranking` that can be told."""
        largest = self.candidates.largest()
        found = {
            f"{ACCURACY}_{pick}": self.accuracies[a] for pick, a in (("picked", self.picked), ("largest", largest)) if a in self.accuracies
        }
        if self.random:
            found[f"{ACCURACY}_random"] = statistics.fmean(self.accuracies[a] for a in self.random)
        if self.accuracies:
            found[f"{ACCURACY}_best"] = max(self.accuracies.values())
        if len(self._points) >= FEWEST:
            kinds = {kind: [self.scores[a][kind] for a in self._points] for kind in SCORES}
            if self.vanilla:
                kinds["vanilla"] = [self.vanilla[a] for a in self._points]
            found |= correlations(kinds, [self.accuracies[a] for a in self._points])
        return found

    def rows(self) -> dict[str, dict[str, float]]:
        """Everything by the name of the architecture."""
        known = {a: {"accuracy": value} for a, value in self.accuracies.items()}
        return {self.candidates.space.name(a): {**found, **known.get(a, {})} for a, found in self.scores.items()}

    def draw(self, folder: Path, title: str) -> Path | None:
        """plots/ranking.png, where there are points."""
        if len(self._points) < FEWEST:
            return None
        scores = {kind: [self.scores[a][kind] for a in self._points] for kind in SCORES}
        picked = (self._points.index(self.picked), self.candidates.space.name(self.picked)) if self.picked in self._points else None
        return plot_ranking(folder, scores, [self.accuracies[a] for a in self._points], title, picked)

    def facts(self) -> dict[str, Any]:
        """For the summary."""
        name, limit = self.candidates.space.name, self.candidates.limit
        return {"picked": name(self.picked), "budget": limit, "within_budget": len(self.candidates.within), "candidates": self.rows()}
