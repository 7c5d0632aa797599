"""How well scores of untrained networks rank them: rank correlation with accuracies, and what a choice by score is worth.

Accuracies come from a table of others' trainings or from the run's own. Correlations: Kendall's tau (b, for ties) and Spearman's
rho, of scipy. A number of parameters or a depth is a score like any other, and the baseline of all of them.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kdrun.errors import Problem, Refused
from kdrun.evaluation.classification import Classification

SCORES = ("m_r", "m_s", "sum", "parameters", "depth")
PICKS = ("picked", "largest", "random", "best")
COLUMNS = ("vanilla", "distilled")  # of a table of accuracies, beside `architecture`
BENCHMARKS = {"s1": "s1_benchmark.csv"}  # tables that come with the package, in kdrun/student
AXES = {
    "m_r": "M_r (0: as the teacher)",
    "m_s": "M_s (0: as the teacher)",
    "sum": "M_r + M_s",
    "parameters": "parameters",
    "depth": "blocks in all",
}


@dataclass(eq=False)
class Ranking(Classification):
    """A classifier's metrics, and those that the plan `search` adds:

    tau_*, rho_*: rank correlations of a score with the accuracies of the networks that have one; of "vanilla" with distilled accuracy.
    top1_picked, top1_largest, top1_random, top1_best: the accuracy of the chosen network, of the one with most parameters, the mean
    of random ones, and the highest, all within the budget.
    """

    def names(self, classes: int | None = None) -> list[str]:
        ranks = [f"{kind}_{short(score)}" for kind in ("tau", "rho") for score in (*SCORES, "vanilla")]
        return [*super().names(classes), *ranks, *(f"top1_{pick}" for pick in PICKS)]


def short(score: str) -> str:
    """A score's name inside that of a metric."""
    return score.replace("_", "")


def correlations(scores: Mapping[str, Sequence[float]], accuracies: Sequence[float]) -> dict[str, float]:
    """tau_* and rho_* of each score with the accuracies, all in one order. NaN for a score that is constant."""
    from scipy import stats

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        for name, values in scores.items():
            found[f"tau_{short(name)}"] = float(stats.kendalltau(values, accuracies).statistic)
            found[f"rho_{short(name)}"] = float(stats.spearmanr(values, accuracies).statistic)
    return found


def read_benchmark(name: str, key: str = "") -> dict[str, dict[str, float]]:
    """A table of accuracies: architecture -> {vanilla, distilled} in percent. Lines that begin with # are remarks.

    `name`: one that comes with the package ("s1": the released S1 benchmark of DisWOT), or a csv file. Raises `Refused`.
    """
    file = resources.files("kdrun.student") / BENCHMARKS[name] if name in BENCHMARKS else Path(name).expanduser()
    remedy = f"one that is there ({', '.join(BENCHMARKS)}), or a csv with the columns architecture, {', '.join(COLUMNS)}"
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
        return {row["architecture"]: {c: float(row[c]) for c in COLUMNS} for row in csv.DictReader(lines)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Refused(Problem(f"no table of accuracies can be read ({error!r})", key, str(file), remedy)) from error


def plot_ranking(
    folder: Path, scores: Mapping[str, Sequence[float]], accuracies: Sequence[float], title: str, picked: tuple[int, str] | None = None
) -> Path:
    """Accuracy (percent) against each score as plots/ranking.png: one panel a score, one point a network.

    `picked`: position and name of the one that is ringed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    taus = correlations(scores, accuracies)
    figure, panels = pyplot.subplots(1, len(scores), figsize=(3.0 * len(scores), 3.5), layout="constrained", sharey=True, squeeze=False)
    for axes, (kind, values) in zip(panels[0], scores.items(), strict=True):
        axes.scatter(values, accuracies, s=18, alpha=0.7, linewidths=0)
        if picked is not None:
            place, name = picked
            axes.scatter([values[place]], [accuracies[place]], s=110, facecolors="none", edgecolors="black", label=f"picked: {name}")
        axes.set(xlabel=AXES.get(kind, kind), title=f"Kendall's tau {taus[f'tau_{short(kind)}']:+.2f}")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4), useMathText=True)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("top-1 accuracy (%)")
    if picked is not None:
        panels[0][0].legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    target = folder / "plots" / "ranking.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.png")  # several ranks may draw it
    figure.savefig(part, dpi=110)
    os.replace(part, target)
    pyplot.close(figure)
    return target
