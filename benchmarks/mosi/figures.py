"""The figure of the report."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.mosi.compare import Runs, interval
from benchmarks.mosi.rows import title
from examples.mosi.data import atomic


def draw(runs: Runs, singles: tuple[str, ...], source: str, path: Path) -> None:
    """Saved as a small PNG."""
    figure = every_seed(runs, singles)
    figure.suptitle(f"{source} data", fontsize=9)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})


def every_seed(runs: Runs, singles: tuple[str, ...]) -> Figure:
    """MAE and Corr of each row: every seed, and the mean with its 95 % interval."""
    figure = Figure(figsize=(12, 1 + 0.28 * len(runs)), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("mae", "corr"), strict=True):
        for place, own in enumerate(runs.values()):
            values = np.array([line[name] for line in own.values()])
            axes.plot(values, np.full(len(values), place), ".", color="#bbbbbb", zorder=1)
            low, high = interval(values)
            if np.isfinite(low):
                axes.plot((low, high), (place, place), color="#4269d0", zorder=2)
            axes.plot(values.mean(), place, "o", color="#4269d0", markersize=5, zorder=3)
        axes.set_yticks(range(len(runs)), [title(row) for row in runs])
        better = {"mae": "lower", "corr": "higher"}[name]
        axes.set_title(f"test {name} ({better} is better)")
        axes.grid(axis="x", alpha=0.3)
        # A modality alone is as good as a constant, and would squeeze all the others into a corner.
        close = [
            line[name] for row, own in runs.items() if row not in singles for line in own.values()
        ]
        margin = 0.1 * (max(close) - min(close)) + 1e-3
        axes.set_xlim(min(close) - margin, max(close) + margin)
    figure.axes[0].invert_yaxis()  # shared
    return figure
