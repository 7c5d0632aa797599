"""The clients of a federation as one picture: accuracy by round, and by what each has told the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.evaluation.metrics import kind

FILE = Path("plots") / "clients.png"
# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS, MEAN = ("#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#999999"), "#D55E00"
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Course:
    """How the clients of one run went. All by evaluation, then by client."""

    rounds: Sequence[float]
    metric: Sequence[Sequence[float]]
    sent: Sequence[Sequence[int]]  # bytes that a client has sent until then
    received: int  # bytes that each client received in the whole run
    networks: Sequence[str]  # by client, what its network has of its own
    title: str


def draw(folder: Path, course: Course, metric: str) -> None:
    """Write FILE into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    talked = max(course.sent[-1]) > 0
    figure, axes = plt.subplots(1, 1 + talked, figsize=(5 + 4.5 * talked, 4.1), layout="constrained", squeeze=False, sharey=True)
    _lines(axes[0][0], [[number] * len(course.networks) for number in course.rounds], course)
    told = kind(metric)
    unit = f" ({'%' if told.unit == 'percent' else told.unit})" if told is not None and told.unit else ""
    axes[0][0].set(xlabel="round", ylabel=f"{metric}{unit} on the whole test set", title="by round")
    axes[0][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if talked:
        unit, divisor = scale(max(course.sent[-1]))
        _lines(axes[0][1], [[value / divisor for value in row] for row in course.sent], course)
        of_all, many = scale(course.received)
        axes[0][1].set(
            xlabel=f"{unit} of predictions sent by the client",
            title=f"by what it sent (each received {course.received / many:.3g} {of_all})",
        )
        axes[0][1].set_xlim(left=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4 if talked else 2, frameon=False)
    figure.suptitle(course.title, fontsize="medium")
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FILE, dpi=120)
    plt.close(figure)


def scale(count: float) -> tuple[str, float]:
    """The unit in which so many bytes are told, and its size."""
    return next(((unit, size) for unit, size in UNITS if count >= size), ("B", 1.0))


def _lines(axis: Any, x: Sequence[Sequence[float]], course: Course) -> None:
    """One thin line per client, coloured by its network, and a thick one for the mean over them."""
    kinds = list(dict.fromkeys(course.networks))
    marker = "o" if len(x) <= 30 else None
    for client, network in enumerate(course.networks):
        colour = COLOURS[kinds.index(network) % len(COLOURS)]
        name = f"client, {network}" if network else "client"
        label = name if course.networks.index(network) == client else None
        points = [row[client] for row in x], [row[client] for row in course.metric]
        axis.plot(*points, color=colour, linewidth=0.9, alpha=0.8, label=label)
    means = [[sum(row) / len(row) for row in rows] for rows in (x, course.metric)]
    axis.plot(*means, color=MEAN, linewidth=2.2, marker=marker, markersize=3.5, label="mean of the clients")
    axis.grid(alpha=0.3)
