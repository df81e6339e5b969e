"""The figure of a record: norms, coefficients, conflicts and dominance over the steps."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito (2008), told apart with any colour vision; neighbours differ in lightness too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# A bold line has a point, and a band a shade, for each of so many stretches of the steps: what the eye can follow.
LINE_POINTS = 80
BAND_SHADES = 400


def draw(record: dict[str, np.ndarray], before: np.ndarray, after: np.ndarray) -> Figure:
    """Four panels over the same steps.

    Args:
        record: What ``Recorder.to_dict`` gives, of at least one step.
        before: Dominance, shape ``[S]``.
        after: Dominance that the coefficients leave, shape ``[S]``.
    """
    names, steps = record["names"].tolist(), record["step"]
    n = len(names)
    heights = [3.0, 2.0, 0.3 * n, 2.0]
    # Not made through pyplot, which would open windows and keep the figure in memory.
    figure = Figure(figsize=(7.5, 2.0 + sum(heights)), layout="constrained")
    norms, coefficients, conflicts, dominance = figure.subplots(4, 1, sharex=True, height_ratios=heights)

    _title(norms, "Gradient norm of each group", "before the penalty")
    _title(coefficients, "Coefficient", "the group's step is scaled by it; 1 leaves it as it is")
    _title(conflicts, "In conflict", "dominates others and is ahead of them; the darker, the more of them")
    _title(dominance, "Dominance", "largest norm over the mean of the others; 1 is balance")
    for m, name in enumerate(names):
        colour = COLOURS[m % len(COLOURS)]
        outweighed = record["conflicts"][:, m].sum(1) / (n - 1)
        _line(norms, steps, record["norms"][:, m], name, colour)
        # The later the thinner: of lines that coincide, all are seen.
        _line(coefficients, steps, record["coefficients"][:, m], name, colour, width=4.4 - 3 * m / (n - 1))
        _band(conflicts, steps, outweighed, m, colour)
    if not record["conflicts"].any():
        conflicts.text(0.5, 0.5, "never", transform=conflicts.transAxes, ha="center", va="center", color="#777777")
    dominance.axhline(1, color="#BBBBBB", linewidth=0.8)
    _line(dominance, steps, before, "before", "#888888")
    _line(dominance, steps, after, "after", "#000000")

    raised = record["coefficients"].max() > 1
    for axes in (norms, dominance, coefficients) if raised else (norms, dominance):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if not raised:
        coefficients.set_ylim(-0.04, 1.06)
    conflicts.set_yticks(range(n), names)
    conflicts.set_ylim(n - 0.5, -0.5)
    conflicts.tick_params(axis="y", length=0)
    for axes in (norms, coefficients, dominance):
        axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    norms.legend(loc="lower left", bbox_to_anchor=(0, 1.09), borderaxespad=0, frameon=False, ncols=n)
    dominance.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False, ncols=2)
    dominance.set_xlabel("optimizer step")
    return figure


def _title(axes: Axes, what: str, meaning: str) -> None:
    title = axes.set_title(what, loc="left", fontsize="medium", fontweight="bold")
    note = axes.annotate(f"  {meaning}", (1, 0), xycoords=title, annotation_clip=False)
    note.set(fontsize="small", color="#555555", verticalalignment="bottom")


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str, width: float = 1.8) -> None:
    """The values thin and pale, their means over stretches bold."""
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3, zorder=1, rasterized=True)
    points = [stretch.mean(1) for stretch in _stretches(steps, values, LINE_POINTS)]
    marker = "o" if len(points) == 1 else None  # a line of one point is not seen
    axes.plot(*np.transpose(points), color=colour, linewidth=width, marker=marker, label=label)


def _band(axes: Axes, steps: np.ndarray, values: np.ndarray, row: int, colour: str) -> None:
    """A horizontal band in ``row``, from white at 0 to ``colour`` at 1."""
    stretches = _stretches(steps, values, BAND_SHADES)
    edges = [*(stretch[0, 0] for stretch in stretches), steps[-1] + 1]
    shades = [[stretch[1].mean() for stretch in stretches]]
    ramp = LinearSegmentedColormap.from_list(colour, ["white", colour])
    axes.pcolormesh(edges, [row - 0.4, row + 0.4], shades, cmap=ramp, vmin=0, vmax=1, rasterized=True)


def _stretches(steps: np.ndarray, values: np.ndarray, most: int) -> list[np.ndarray]:
    """Steps and values, cut into at most so many stretches of one length, shape ``[2, length]`` each."""
    length = -(-len(steps) // most)
    return np.split(np.stack([steps, values]), range(length, len(steps), length), axis=1)
