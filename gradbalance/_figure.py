"""The figure of a record: a panel for each quantity, and a line for each group."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Seven beside matplotlib's ten colours: 70 groups differ, and neighbours do without colour too.
MARKERS = "o^sxvD+"
# A line has a point for each of at most so many stretches of the steps.
POINTS = 50
# Of a panel, in inches, and the names that fit beside it.
WIDTH, HEIGHT, NAMES = 7.5, 2.0, 9
MEANINGS = {
    "Coherence": "cosine between successive gradients ± its standard error; noise is near 0",
    "Coefficient": "factor on the step of the group",
    "Gradient norm": "before it is scaled",
    "Dominance": "largest norm / mean of the others, before and after the coefficients",
    "In conflict": "fraction of the other groups for whose sake the group is slowed down",
}


def draw(record: dict[str, np.ndarray]) -> Figure:
    """Draw what ``Recorder.to_dict`` returns, and the dominance, shape ``[S, 2]``, of S >= 1 steps.

    Coherences are drawn if they were measured. Conflicts are drawn if they differ from which
    coefficient is lower: then the rule has reported them.
    """
    coefficients = record["coefficients"]
    conflicts = record["conflicts"]
    shown = {
        "Coherence": record["coherences"],
        "Coefficient": coefficients,
        "Gradient norm": record["norms"],
        "Dominance": record["dominance"],
        "In conflict": conflicts.sum(2) / (conflicts.shape[2] - 1),
    }
    if not np.isfinite(record["coherences"]).any():
        del shown["Coherence"]
    if (conflicts == (coefficients[:, :, None] < coefficients[:, None, :])).all():
        del shown["In conflict"]
    # Not through pyplot, which would open windows and keep the figure in memory.
    figure = Figure(figsize=(WIDTH, HEIGHT * len(shown) + 0.4), layout="constrained")
    panels = dict(zip(shown, figure.subplots(len(shown), sharex=True), strict=True))
    steps = record["step"]
    lines = {}
    for title, axes in panels.items():
        values = shown[title]
        axes.set_ylabel(title)
        axes.set_title(MEANINGS[title], loc="left", fontsize="small", color="#555555")
        axes.grid(axis="y", color="#EEEEEE")
        is_raised = title == "Coefficient" and values.max() > 1 and values.min() > 0
        if is_raised or title in ("Gradient norm", "Dominance"):
            _set_log_scale(axes)
            values = np.where(values > 0, values, np.nan)
        lines[title] = _draw_lines(axes, steps, values)
        if axes.get_yscale() == "linear" and title != "Coherence":
            axes.set_ylim(-0.05, values.max() + 0.05)
        if title == "Coherence":
            _draw_bands(axes, steps, values, record["coherence_errors"])
    before, after = lines["Dominance"]
    before.set_color("#999999")
    after.set_color("#000000")
    panels["Dominance"].legend([before, after], ["before", "after"], fontsize="small", ncols=2)
    _write_names(figure, lines["Gradient norm"], record["names"].tolist(), NAMES * len(shown))
    figure.align_ylabels()
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    return figure


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
        line.set_linewidth(2.4 - 1.6 * m / (len(lines) - 1))
    return lines


def _draw_bands(axes: Axes, steps: np.ndarray, values: np.ndarray, errors: np.ndarray) -> None:
    x = _means(steps[:, None])[:, 0]
    low = (_means(values) - _means(errors)).T
    high = (_means(values) + _means(errors)).T
    for m in range(len(low)):
        axes.fill_between(x, low[m], high[m], color=f"C{m}", alpha=0.15, linewidth=0)


def _means(values: np.ndarray) -> np.ndarray:
    """Means of the finite values over at most ``POINTS`` stretches, NaN where there are none."""
    starts = np.arange(0, len(values), math.ceil(len(values) / POINTS))
    is_known = np.isfinite(values)
    sums = np.add.reduceat(np.where(is_known, values, 0.0), starts, axis=0)
    with np.errstate(invalid="ignore"):
        return sums / np.add.reduceat(is_known, starts, axis=0, dtype=int)


def _write_names(figure: Figure, lines: list[Line2D], names: list[str], rows: int) -> None:
    """Write the names beside the panels, in columns, and widen the figure by them."""
    numbers = map(str, range(len(names)))
    columns = math.ceil(len(names) / rows)
    legend = figure.legend(lines, numbers, loc="outside right upper", ncols=columns)
    # Literally: a name may hold a `$` or begin with `_`, which matplotlib would take for its own.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False, usetex=False, fontsize="small")
    figure.set_figwidth(WIDTH + legend.get_window_extent().width / figure.dpi)
