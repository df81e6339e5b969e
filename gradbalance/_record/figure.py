"""The figure of a record: norms, coherences, coefficients, conflicts and dominance over the steps."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# The first six are those of Okabe and Ito (2008), told apart with any colour vision; the later ones go dark.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A3E9D", "#8A6D1B"),
    *("#222222", "#97C93D", "#9E0142", "#00A6A6", "#3B3B98", "#A0A0A0", "#F25C9A", "#5B3A29"),
)
# A bold line has a point, and a band a shade, for each of so many stretches of the steps: what the eye can follow.
LINE_POINTS = 60
BAND_SHADES = 400
# Inches between two names beside a panel, and the longest name that is not cut.
NAME_HEIGHT = 0.16
NAME_LENGTH = 28


def draw(record: dict[str, np.ndarray], before: np.ndarray, after: np.ndarray) -> Figure:
    """Panels over the same steps, each with the names of the groups at the end of their lines.

    Coherences are drawn where they were measured, conflicts where they say more than that a coefficient is lower.

    Args:
        record: What ``Recorder.to_dict`` gives, of at least one step.
        before: Dominance, shape ``[S]``.
        after: Dominance that the coefficients leave, shape ``[S]``.
    """
    names = [_cut(name) for name in record["names"].tolist()]
    steps, coefficients, conflicts = record["step"], record["coefficients"], record["conflicts"]
    n = len(names)
    tall = max(1.9, NAME_HEIGHT * n)
    heights = {"norms": tall}
    if np.isfinite(record["coherences"]).any():
        heights["coherences"] = tall
    heights["coefficients"] = tall
    if (conflicts != (coefficients[:, :, None] < coefficients[:, None, :])).any():
        heights["conflicts"] = max(0.5, 0.2 * n)
    heights["dominance"] = 1.6
    # Not made through pyplot, which would open windows and keep the figure in memory.
    figure = Figure(figsize=(8, 0.7 + sum(heights.values()) + 0.5 * len(heights)), layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values()), squeeze=False)
    panels: dict[str, Axes] = dict(zip(heights, grid[:, 0], strict=True))

    for key, axes in panels.items():
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        if key != "conflicts":
            axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    _title(panels["norms"], "Gradient norm", "before the penalty")
    gap = NAME_HEIGHT / tall
    _lines(panels["norms"], steps, record["norms"], names, gap=gap, log=True)
    if "coherences" in panels:
        _title(panels["coherences"], "Coherence", "cosine between successive gradients; near 0 is noise")
        panels["coherences"].axhline(0, color="#BBBBBB", linewidth=0.8)
        _lines(panels["coherences"], steps, record["coherences"], names, gap=gap)
    raised = coefficients.max() > 1
    _title(panels["coefficients"], "Coefficient", "the group's step is scaled by it; 1 leaves it as it is")
    panels["coefficients"].axhline(1, color="#BBBBBB", linewidth=0.8)
    if not raised:
        panels["coefficients"].set_ylim(-0.04, 1.06)
    spread = raised and bool(coefficients.min() > 0)
    _lines(panels["coefficients"], steps, coefficients, names, gap=gap, log=spread)
    if "conflicts" in panels:
        _title(panels["conflicts"], "In conflict", "the darker, the more of the others with it, and the more often")
        _bands(panels["conflicts"], steps, conflicts.sum(2) / (n - 1), names)
    _title(panels["dominance"], "Dominance", "largest norm over the mean of the others; after: times coefficients")
    panels["dominance"].axhline(1, color="#BBBBBB", linewidth=0.8)
    dominance = np.stack([before, after], 1)
    _lines(panels["dominance"], steps, dominance, ["before", "after"], ("#888888", "#000000"), gap=0.12, log=True)
    panels["dominance"].set_xlabel("optimizer step")
    if len(steps) == 1:
        panels["dominance"].set_xlim(steps[0] - 1, steps[0] + 1)
    return figure


def _cut(name: str) -> str:
    """A long name without its middle: paths of modules differ at both ends."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[1 - half :]}"


def _title(axes: Axes, what: str, meaning: str) -> None:
    title = axes.set_title(what, loc="left", fontsize="medium", fontweight="bold")
    note = axes.annotate(f"  {meaning}", (1, 0), xycoords=title, annotation_clip=False)
    note.set(fontsize="small", color="#555555", verticalalignment="bottom")


def _lines(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    names: list[str],
    colours: tuple[str, ...] = COLOURS,
    *,
    gap: float,
    log: bool = False,
) -> None:
    """A line for each column: the values thin and pale, their means over stretches bold, its name at its end."""
    ends = []
    for m, column in enumerate(np.where(np.isfinite(values), values, np.nan).T):
        style: dict[str, Any] = {
            "color": colours[m % len(colours)],
            "linestyle": ("-", "--", ":")[m // len(colours) % 3],
        }
        means = np.transpose([_means(stretch) for stretch in _stretches(steps, column, LINE_POINTS)])
        known = means[1][np.isfinite(means[1])]
        marker = "o" if len(known) == 1 else None  # a line of one point is not seen
        # The later the thinner: of lines that coincide, all are seen.
        width = 2.6 - 1.4 * m / (len(names) - 1)
        axes.plot(steps, column, linewidth=0.6, alpha=0.2, zorder=1, rasterized=True, **style)
        axes.plot(*means, linewidth=width, marker=marker, label=names[m], **style)
        ends.append(known[-1:])
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        ticks = (1, 1.5, 2, 3, 4, 5, 7) if high < 5 * low else (1, 2, 5) if high < 300 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    _names(axes, names, ends, colours, gap)


def _names(axes: Axes, names: list[str], ends: list[np.ndarray], colours: tuple[str, ...], gap: float) -> None:
    """Each name beside the end of its line, moved as little as keeps it off the others."""
    axes.get_ylim()  # which fits the limits to the lines
    to_axes = axes.transData + axes.transAxes.inverted()
    places = {m: to_axes.transform((0, float(end[0])))[1] for m, end in enumerate(ends) if len(end)}
    order = sorted(places, key=places.__getitem__)
    for m, y in zip(order, apart([places[m] for m in order], gap), strict=True):
        at, colour = min(max(places[m], 0), 1), colours[m % len(colours)]
        link = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)}
        text = axes.annotate(names[m], (1, at), (1.035, y), "axes fraction", "axes fraction", arrowprops=link)
        text.set(fontsize="small", color=colour, verticalalignment="center", annotation_clip=False)


def apart(places: list[float], gap: float) -> list[float]:
    """Sorted ``places`` moved into [0, 1] and at least ``gap`` apart, by the least sum of squares.

    Less ``gap`` each, they have only to keep their order: neighbours that do not are pooled at their mean.

    Example:
        >>> apart([0.0, 0.5, 0.5, 0.875], 0.25)
        [0.0, 0.375, 0.625, 0.875]
    """
    pools: list[list[float]] = []
    for i, place in enumerate(places):
        pools.append([place - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    kept = [float(np.mean(pool)) for pool in pools for _ in pool]
    return [min(max(y, 0), max(0, 1 - (len(places) - 1) * gap)) + i * gap for i, y in enumerate(kept)]


def _bands(axes: Axes, steps: np.ndarray, shares: np.ndarray, names: list[str]) -> None:
    """A horizontal band for each column, from white at 0 to its colour at 1."""
    for m, (name, column) in enumerate(zip(names, shares.T, strict=True)):
        stretches = _stretches(steps, column, BAND_SHADES)
        edges = [*(stretch[0, 0] for stretch in stretches), steps[-1] + 1]
        ramp = LinearSegmentedColormap.from_list(name, ["white", COLOURS[m % len(COLOURS)]])
        shades = [[stretch[1].mean() for stretch in stretches]]
        axes.pcolormesh(edges, [m - 0.4, m + 0.4], shades, cmap=ramp, vmin=0, vmax=1, rasterized=True)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(names)), names, fontsize="small")
    for m, label in enumerate(axes.get_yticklabels()):
        label.set_color(COLOURS[m % len(COLOURS)])
    axes.tick_params(axis="y", length=0)


def _means(stretch: np.ndarray) -> np.ndarray:
    """The mean step, and the mean of what is known."""
    known = stretch[1][np.isfinite(stretch[1])]
    return np.array([stretch[0].mean(), known.mean() if len(known) else np.nan])


def _stretches(steps: np.ndarray, values: np.ndarray, most: int) -> list[np.ndarray]:
    """Steps and values, cut into at most so many stretches of one length, shape ``[2, length]`` each."""
    length = -(-len(steps) // most)
    return np.split(np.stack([steps, values]), range(length, len(steps), length), axis=1)
