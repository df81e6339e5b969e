"""The figure of a record: what was measured and decided over the steps, a line for each group."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

# The first six are those of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A3E9D", "#8A6D1B"),
    *("#222222", "#97C93D", "#9E0142", "#00A6A6", "#3B3B98", "#A0A0A0", "#F25C9A", "#5B3A29"),
)
LINE_STYLES = ("-", "--", ":", "-.")
# A bold line has a point for each of at most so many stretches of the steps.
POINTS = 60
# In inches: the panels without the legend.
WIDTH = 7.5
HEIGHT = 1.9
# Rows of the legend beside a panel.
ROWS = 10


def draw(record: dict[str, np.ndarray], before: np.ndarray, after: np.ndarray) -> Figure:
    """A panel for each quantity over the steps, and one legend of the groups.

    Coherences are drawn if they were measured. Conflicts are drawn if they differ from which
    coefficient is lower: then the rule has reported them.

    Args:
        record: What ``Recorder.to_dict`` returns, of at least one step.
        before: Dominance, shape ``[S]``.
        after: Dominance with each norm times its coefficient, shape ``[S]``.
    """
    steps = record["step"]
    coefficients = record["coefficients"]
    conflicts = record["conflicts"]
    titles = {
        "Coherence": "cosine between successive gradients, ± its standard error; near 0 is noise",
        "Coefficient": "factor on the step of the group",
        "Gradient norm": "before the penalty",
        "Dominance": "largest norm / mean of the others; after: norms times coefficients",
        "In conflict": "fraction of the other groups for whose sake the group is slowed down",
    }
    if not np.isfinite(record["coherences"]).any():
        del titles["Coherence"]
    if (conflicts == (coefficients[:, :, None] < coefficients[:, None, :])).all():
        del titles["In conflict"]
    # Not through pyplot, which would open windows and keep the figure in memory.
    figure = Figure(layout="constrained")
    panels = {}
    grid = figure.subplots(len(titles), sharex=True)
    for axes, (title, meaning) in zip(grid, titles.items(), strict=True):
        panels[title] = axes
        axes.set_ylabel(title)
        axes.set_title(meaning, loc="left", fontsize="small", color="#555555")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)

    lines = _lines(panels["Gradient norm"], steps, record["norms"], is_log=True)
    if "Coherence" in panels:
        axes = panels["Coherence"]
        axes.axhline(0, color="#BBBBBB", linewidth=0.8)
        _bands(axes, steps, record["coherences"], record["coherence_errors"])
        _lines(axes, steps, record["coherences"])
    axes = panels["Coefficient"]
    axes.axhline(1, color="#BBBBBB", linewidth=0.8)
    is_raised = coefficients.max() > 1
    _lines(axes, steps, coefficients, is_log=bool(is_raised and coefficients.min() > 0))
    if not is_raised:
        axes.set_ylim(-0.05, 1.05)
    axes = panels["Dominance"]
    both = _lines(axes, steps, np.stack([before, after], 1), ("#999999", "#000000"), is_log=True)
    axes.legend(both, ["before", "after"], fontsize="small", ncols=2)
    if "In conflict" in panels:
        _lines(panels["In conflict"], steps, conflicts.sum(2) / (conflicts.shape[2] - 1))
        panels["In conflict"].set_ylim(-0.05, 1.05)
    axes = grid[-1]
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    _legend(figure, lines, record["names"].tolist(), len(titles))
    return figure


def _lines(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colours: Sequence[str] = COLOURS,
    *,
    is_log: bool = False,
) -> list[Line2D]:
    """Draw a line for each column: the values thin and pale, their means over stretches bold."""
    values = np.where(np.isfinite(values), values, np.nan)
    if is_log:
        values = np.where(values > 0, values, np.nan)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    means = _means(values)
    positions = _means(steps[:, None])
    lines = []
    for m in range(values.shape[1]):
        colour = colours[m % len(colours)]
        style = LINE_STYLES[m // len(colours) % len(LINE_STYLES)]
        # The later the thinner: of lines that coincide, all are seen.
        width = 2.6 - 1.6 * m / (values.shape[1] - 1)
        axes.plot(steps, values[:, m], color=colour, linewidth=0.5, alpha=0.25, rasterized=True)
        lines += axes.plot(
            positions, means[:, m], style, color=colour, linewidth=width, marker="o", markersize=2.5
        )
    return lines


def _bands(axes: Axes, steps: np.ndarray, values: np.ndarray, errors: np.ndarray) -> None:
    """Shade one standard error on both sides of each column's means over stretches."""
    positions = _means(steps[:, None])[:, 0]
    means = _means(values)
    spreads = _means(errors)
    for m in range(values.shape[1]):
        low = means[:, m] - spreads[:, m]
        high = means[:, m] + spreads[:, m]
        colour = COLOURS[m % len(COLOURS)]
        axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)


def _means(values: np.ndarray) -> np.ndarray:
    """Means of the finite values over stretches of one length, NaN where there are none.

    Args:
        values: Shape ``[S, N]``.

    Returns:
        One row for each of at most ``POINTS`` stretches.
    """
    length = math.ceil(len(values) / POINTS)
    starts = np.arange(0, len(values), length)
    is_known = np.isfinite(values)
    sums = np.add.reduceat(np.where(is_known, values, 0), starts, axis=0)
    counts = np.add.reduceat(is_known, starts, axis=0, dtype=int)
    with np.errstate(invalid="ignore"):
        return sums / counts


def _legend(figure: Figure, lines: list[Line2D], names: list[str], panels: int) -> None:
    """Write the names beside the panels, and give the figure the size that they need."""
    height = HEIGHT * panels + 0.6
    legend = figure.legend(
        lines,
        [str(m) for m in range(len(names))],
        loc="outside right upper",
        ncols=math.ceil(len(names) / (ROWS * panels)),
        fontsize="small",
        frameon=False,
    )
    # Literally: a name may hold a `$` or begin with `_`, which matplotlib would take for its own.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False, usetex=False)
    extent = legend.get_window_extent()
    figure.set_size_inches(WIDTH + extent.width / figure.dpi, height)
