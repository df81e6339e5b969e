"""The figure of a record: a panel for each quantity, and a line for each group."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

# Seven beside matplotlib's ten colours: 70 groups differ, and neighbours do without colour too.
MARKERS = "o^sxvD+"
# A line has a point for each of at most so many stretches of the steps.
POINTS = 50
# Of the panels, in inches, and the names that fit beside them.
WIDTH, HEIGHT, NAMES = 9.0, 4.8, 22
MEANINGS = {
    "Accuracy": "",
    "Coherence": "cosine of successive gradients ± its error",
    "Coefficient": "factor on the step of the group",
    "Proposed": "factor that the watched rule would give",
    "Gradient norm": "before it is scaled",
    "Moved": "length of a step / length of the parameters",
}

Curve = ArrayLike | tuple[ArrayLike, ArrayLike]


def draw(record: dict[str, np.ndarray], is_watched: bool, accuracy: Mapping[str, Curve]) -> Figure:
    """Draw what ``Recorder.to_dict`` returns of S >= 1 steps, and some curves beside it.

    Args:
        record: What is drawn. What was not measured has no panel.
        is_watched: Whether to draw what the rule proposes in the place of the coefficients.
        accuracy: Values, or a pair of steps and values, by name.
    """
    top = {"Coherence": record["coherences"]}
    if is_watched:
        top["Proposed"] = record["proposed"]
    else:
        top["Coefficient"] = record["coefficients"]
    bottom = {"Gradient norm": record["norms"], "Moved": record["moved"]}
    shown: dict[str, np.ndarray] = {}
    rows = []
    for row in (top, bottom):
        measured = {title: values for title, values in row.items() if np.isfinite(values).any()}
        shown |= measured
        rows.append(list(measured))
    if accuracy:
        rows[0].insert(0, "Accuracy")
    # Not through pyplot, which would open windows and keep the figure in memory.
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    # Each row repeated so often that both are equally wide.
    mosaic = [np.repeat(row, math.lcm(*map(len, rows)) // len(row)).tolist() for row in rows]
    panels = figure.subplot_mosaic(mosaic)
    steps = record["step"]
    for title, axes in panels.items():
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_title(MEANINGS[title], loc="right", fontsize="x-small", color="#555555")
        axes.grid(axis="y", color="#EEEEEE")
        axes.xaxis.set_major_locator(
            MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
    lines = {title: _draw_panel(panels[title], steps, shown[title], title) for title in shown}
    if "Coherence" in shown:
        _draw_bands(panels["Coherence"], steps, shown["Coherence"], record["coherence_errors"])
    if accuracy:
        _draw_accuracy(panels["Accuracy"], steps, accuracy)
    _write_names(figure, lines["Gradient norm"], record["names"].tolist())
    for title in rows[1]:
        panels[title].set_xlabel("optimizer step", fontsize="small")
    return figure


def _draw_panel(axes: Axes, steps: np.ndarray, values: np.ndarray, title: str) -> list[Line2D]:
    is_factor = title in ("Coefficient", "Proposed")
    is_raised = is_factor and values.max() > 1 and values.min() > 0
    if is_raised or title in ("Gradient norm", "Moved"):
        _set_log_scale(axes)
        values = np.where(values > 0, values, np.nan)
    elif is_factor:
        axes.set_ylim(-0.05, values.max() + 0.05)
    return _draw_lines(axes, steps, values)


def _set_log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_lines(axes: Axes, steps: np.ndarray, values: np.ndarray) -> list[Line2D]:
    lines = axes.plot(_means(steps[:, None]), _means(values), markersize=3.5)
    for m, line in enumerate(lines):
        line.set_marker(MARKERS[m % len(MARKERS)])
        # The later the thinner: of lines that coincide, all are seen.
        line.set_linewidth(2.4 - 1.6 * m / len(lines))
    return lines


def _draw_bands(axes: Axes, steps: np.ndarray, values: np.ndarray, errors: np.ndarray) -> None:
    x = _means(steps[:, None])[:, 0]
    low = (_means(values) - _means(errors)).T
    high = (_means(values) + _means(errors)).T
    for m in range(len(low)):
        axes.fill_between(x, low[m], high[m], color=f"C{m}", alpha=0.15, linewidth=0)


def _draw_accuracy(axes: Axes, steps: np.ndarray, accuracy: Mapping[str, Curve]) -> None:
    greys = np.linspace(0.0, 0.6, len(accuracy))
    for (name, curve), grey in zip(accuracy.items(), greys, strict=True):
        if isinstance(curve, tuple):
            x, y = map(np.asarray, curve)
        else:
            y = np.asarray(curve)
            x = steps[0] + (steps[-1] - steps[0]) * np.arange(1, len(y) + 1) / len(y)
        (line,) = axes.plot(x, y, color=str(grey), linewidth=1.6)
        text = axes.annotate(
            name, (x[-1], y[-1]), (-2, 3), textcoords="offset points", ha="right", fontsize="small"
        )
        text.set(color=line.get_color(), parse_math=False)


def _means(values: np.ndarray) -> np.ndarray:
    """Means of the finite values over at most ``POINTS`` stretches, NaN where there are none."""
    starts = np.arange(0, len(values), math.ceil(len(values) / POINTS))
    is_known = np.isfinite(values)
    sums = np.add.reduceat(np.where(is_known, values, 0.0), starts, axis=0)
    with np.errstate(invalid="ignore"):
        return sums / np.add.reduceat(is_known, starts, axis=0, dtype=int)


def _write_names(figure: Figure, lines: list[Line2D], names: list[str]) -> None:
    """Write the names beside the panels, in columns, and widen the figure by them."""
    numbers = map(str, range(len(names)))
    columns = math.ceil(len(names) / NAMES)
    legend = figure.legend(lines, numbers, loc="outside right upper", ncols=columns)
    # Literally: a name may hold a `$` or begin with `_`, which matplotlib would take for its own.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False, usetex=False, fontsize="small")
    figure.set_figwidth(WIDTH + legend.get_window_extent().width / figure.dpi)
