"""The figures of the report, each saved as a small PNG."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.mosi.compare import (
    BASELINE,
    DEFAULT,
    FULL,
    LOSSES,
    Line,
    Runs,
    difference,
    interval,
    modalities,
    probe,
)
from examples.mosi.data import atomic

SHOWN = (BASELINE, FULL, "U", LOSSES, DEFAULT)  # rows whose course is drawn
COLOURS = {"text": "#4269d0", "audio": "#ff725c", "timing": "#3ca951", "visual": "#9c6b4e"}
Curves = Callable[[Line], dict[str, list[float]]]


def draw(runs: Runs, source: str, folder: Path, stem: str) -> dict[str, Path]:
    """Each figure under the name by which the report asks for it."""
    drawings = {
        "rows": rows,
        "norms": partial(
            courses, title="gradient norm", curves=partial(of_groups, "norms"), log=True
        ),
        "conflicts": partial(
            courses, title="share of the steps in conflict", curves=partial(of_groups, "conflicts")
        ),
        "dominance": partial(courses, title="dominance ratio", curves=ratios, log=True),
        "coefficients": histograms,
        "probes": potentials,
    }
    paths = {}
    for name, drawing in drawings.items():
        figure = drawing(runs)
        figure.suptitle(f"{source} data", fontsize=9)
        paths[name] = folder / f"{stem}-{name}.png"
        with atomic(paths[name]) as temporary:
            figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})
    return paths


def rows(runs: Runs) -> Figure:
    """MAE and Corr of each row: every seed, and the mean with its 95 % interval."""
    figure = Figure(figsize=(10, 1 + 0.28 * len(runs)), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("mae", "corr"), strict=True):
        for place, own in enumerate(runs.values()):
            values = np.array([line[name] for line in own.values()])
            axes.plot(values, np.full(len(values), place), ".", color="#bbbbbb", zorder=1)
            low, high = interval(values)
            if np.isfinite(low):
                axes.plot((low, high), (place, place), color="#4269d0", zorder=2)
            axes.plot(values.mean(), place, "o", color="#4269d0", markersize=5, zorder=3)
        axes.set_yticks(range(len(runs)), list(runs))
        axes.set_title(
            {"mae": "test MAE (lower is better)", "corr": "test Corr (higher is better)"}[name]
        )
        axes.grid(axis="x", alpha=0.3)
        # A modality alone is as good as a constant, and would squeeze all the others into a corner.
        close = [
            line[name] for row, own in runs.items() if row not in COLOURS for line in own.values()
        ]
        margin = 0.1 * (max(close) - min(close)) + 1e-3
        axes.set_xlim(min(close) - margin, max(close) + margin)
    figure.axes[0].invert_yaxis()  # shared
    return figure


def of_groups(key: str, line: Line) -> dict[str, list[float]]:
    return {
        name: [epoch[key][name] for epoch in line["history"]] for name in line["history"][0][key]
    }


def ratios(line: Line) -> dict[str, list[float]]:
    keys = {"before the coefficients": "dominance", "after": "dominance_after"}
    return {title: [epoch[key] for epoch in line["history"]] for title, key in keys.items()}


def courses(runs: Runs, title: str, curves: Curves, log: bool = False) -> Figure:
    """Epoch by epoch, the mean over the seeds within its standard deviation, one panel a row."""
    shown = [row for row in SHOWN if row in runs]
    figure = Figure(figsize=(3 * len(shown) + 1, 3), layout="constrained")
    for axes, row in zip(
        figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0], shown, strict=False
    ):
        every = [curves(line) for line in runs[row].values()]
        for name in every[0]:
            epochs = min(len(one[name]) for one in every)
            values = np.array([one[name][:epochs] for one in every])
            mean, deviation = values.mean(0), values.std(0)
            (drawn,) = axes.plot(range(1, epochs + 1), mean, label=name, color=COLOURS.get(name))
            low = np.maximum(mean - deviation, values.min(0))  # never below 0 on a logarithmic axis
            axes.fill_between(
                range(1, epochs + 1), low, mean + deviation, alpha=0.2, color=drawn.get_color()
            )
        axes.set(title=row, xlabel="epoch", yscale="log" if log else "linear")
    figure.axes[0].set_ylabel(title)
    if shown:
        figure.axes[-1].legend(fontsize=8)
    return figure


def histograms(runs: Runs) -> Figure:
    """How often each coefficient was where, over all steps and seeds: bars of a fifth of a unit."""
    shown = [row for row in ("A5", FULL, "U", "Z", "L", "E") if row in runs]
    figure = Figure(figsize=(2.2 * max(len(shown), 1) + 1, 3), layout="constrained")
    for axes, row in zip(
        figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0], shown, strict=False
    ):
        names = list(next(iter(runs[row].values()))["history"][0]["histogram"])
        for place, name in enumerate(names):
            counts = np.sum(
                [
                    epoch["histogram"][name]
                    for line in runs[row].values()
                    for epoch in line["history"]
                ],
                0,
            )
            left = np.arange(len(counts)) / 5 + place * 0.2 / len(names)
            axes.bar(
                left,
                counts / counts.sum(),
                0.18 / len(names),
                align="edge",
                label=name,
                color=COLOURS.get(name),
            )
        axes.set(title=row, xlabel="coefficient", xlim=(0, 4))
    figure.axes[0].set_ylabel("share of the steps")
    if shown:
        figure.axes[-1].legend(fontsize=8)
    return figure


def potentials(runs: Runs) -> Figure:
    """MAE of the probe of each encoder, in each row minus trained alone: what joint training took from it."""
    alone = modalities(runs)
    shown = [row for row in SHOWN if row in runs]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(shown):
        gaps = [difference(runs[row], runs[single], probe(name)) for name, single in alone.items()]
        where = np.arange(len(gaps)) + (place - (len(shown) - 1) / 2) * 0.15
        error = [g.high - g.mean if np.isfinite(g.high) else 0 for g in gaps]
        axes.errorbar(where, [g.mean for g in gaps], error, fmt="o", capsize=3, label=row)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(alone)), list(alone))
    axes.set_ylabel("MAE of the probe, joint - alone")
    if alone:
        axes.legend(fontsize=8)
    return figure
