"""Pictures of a run, drawn from its own records."""

from __future__ import annotations

from pathlib import Path

from kdrun.engine.records import METRICS, read_lines


def plot_curves(folder: Path) -> Path | None:
    """Loss terms by step and accuracy by epoch of one run, as plots/curves.png. None if there is nothing to draw."""
    lines = read_lines(folder / METRICS)
    losses = [r for r in lines if "terms" in r]
    scores = [r for r in lines if "split" in r and "top1" in r]
    if not losses and not scores:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in sorted({n for r in losses for n in r["terms"]}):
        rows = [r for r in losses if name in r["terms"]]
        left.plot([r["epoch"] for r in rows], [r["terms"][name] for r in rows], label=name, linewidth=1)
    left.set(xlabel="epoch", ylabel="term, per item", title="loss terms (unweighted)")
    for split in sorted({r["split"] for r in scores}):
        rows = [r for r in scores if r["split"] == split]
        right.plot([r["epoch"] for r in rows], [r["top1"] for r in rows], label=split, marker="." if len(rows) < 40 else None)
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    target = folder / "plots" / "curves.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target
