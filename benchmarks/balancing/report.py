"""Tables and figure of the dominance benchmark, out of whatever has been run."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from benchmarks._markdown import table
from benchmarks.rivals import RULES
from benchmarks.testbeds import BEDS

Found = dict[str, Any]
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Muon")
MODES = ("default", "default, gradient", "norms only", "norms only, gradient", "norms only, raising")
IN_FIGURE = (
    "default",
    "norms only",
    "paper",
    "errors",
    "faster by hand",
    "slower by hand",
    "OGM-GE",
    "clip groups",
)


class Interval(NamedTuple):
    """A mean over seeds, in points, with half the width of its 95 % interval."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}" + ("" if self.seeds >= 10 else f" (n={self.seeds})")

    @property
    def worse(self) -> bool:
        return self.mean + self.half < 0


def interval(values: Sequence[float], unit: float = 0.01) -> Interval | None:
    """The mean in units of ``unit`` and Student's interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    array = np.asarray(values) / unit
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    return Interval(float(array.mean()), float(half), len(array))


class Measured:
    """The runs of the measured seeds, by testbed, rule and optimizer."""

    def __init__(self, runs: Mapping[Any, Found], seeds: Sequence[int]) -> None:
        self._cells: dict[tuple[str, str, str], dict[int, Found]] = {}
        for found in runs.values():
            if found["seed"] in seeds:
                cell = found["bed"], found["rule"], found["optimizer"]
                self._cells.setdefault(cell, {})[found["seed"]] = found

    def cell(self, bed: str, rule: str, optimizer: str | None = None) -> dict[int, Found]:
        return self._cells.get((bed, rule, optimizer or BEDS[bed].optimizer), {})

    def pairs(self, bed: str, rule: str, optimizer: str | None = None, base: str = "none") -> list[tuple[Found, Found]]:
        """The runs of a rule, each with the run of its seed under another rule, without balancing by default."""
        others, cell = self.cell(bed, base, optimizer), self.cell(bed, rule, optimizer)
        return [(others[seed], found) for seed, found in sorted(cell.items()) if seed in others]

    def headroom(self, bed: str) -> list[Interval | None]:
        """What the probe on each branch loses by training it jointly."""
        joint, result = self.cell(bed, "none"), []
        for m, branch in enumerate(BEDS[bed].branches):
            alone = self.cell(bed, f"alone: {branch.name}")
            result.append(
                interval([alone[s]["probes"][0] - joint[s]["probes"][m] for s in sorted(alone) if s in joint])
            )
        return result

    def accuracy(self, bed: str, rule: str, optimizer: str | None = None, base: str = "none") -> Interval | None:
        """What the joint score gains against another rule."""
        return interval([found["test"] - other["test"] for other, found in self.pairs(bed, rule, optimizer, base)])

    def recovered(self, bed: str, rule: str) -> Interval | None:
        """The part of the headroom of all branches but the first that a rule recovers, in percent."""
        room = [h.mean / 100 for h in self.headroom(bed)[1:] if h]
        if len(room) < len(BEDS[bed].branches) - 1 or np.mean(room) < 0.03:
            return None
        gains = [np.mean(np.subtract(f["probes"], b["probes"])[1:]) for b, f in self.pairs(bed, rule)]
        return interval(gains, 0.01 * float(np.mean(room)))

    def first(self, bed: str, rule: str) -> Interval | None:
        """What the probe on the dominating branch gains."""
        return interval([f["probes"][0] - b["probes"][0] for b, f in self.pairs(bed, rule)])

    def slowdown(self, rule: str) -> float | None:
        """Processor time against the plain optimizer, median over all paired runs."""
        ratios = [
            f["seconds"] / b["seconds"]
            for bed in BEDS
            for b, f in self.pairs(bed, rule)
            if "dominance" not in b and "dominance" not in f  # these were recorded
        ]
        return median(ratios) if ratios else None

    def dominance(self, bed: str, rule: str, key: str) -> str:
        values = [found[key] for found in self.cell(bed, rule).values() if key in found]
        return f"{values[0]:.1f}" if values else "–"


def headroom_rows(m: Measured) -> list[list[Any]]:
    rows = []
    for name, bed in BEDS.items():
        base = m.cell(name, "none")
        if not base:
            continue
        joint = [np.mean([found["probes"][i] for found in base.values()]) for i in range(len(bed.branches))]
        cells = [
            f"{branch.name} {100 * (score + h.mean / 100):.1f} / {100 * score:.1f} ({h.mean:+.1f} ± {h.half:.1f})"
            for branch, score, h in zip(bed.branches, joint, m.headroom(name), strict=True)
            if h
        ]
        total = f"{100 * np.mean([found['test'] for found in base.values()]):.1f}"
        rows.append([name, bed.about, total, "; ".join(cells), m.dominance(name, "none", "dominance")])
    return rows


def describe(m: Measured, runs: Mapping[Any, Found]) -> str:
    """All tables as Markdown."""
    rules = [rule for rule in RULES if rule != "none" and any(m.pairs(bed, rule) for bed in BEDS)]
    beds = [bed for bed in BEDS if m.cell(bed, "none")]
    spent = sum(found["seconds"] for found in runs.values())
    lines = [
        f"`python -m benchmarks.dominance` on {platform.machine()}, one thread a run, torch {torch.__version__}: "
        f"{len(runs)} runs, {spent / 60:.0f} minutes of processor time. ± is half a 95 % interval over the seeds, "
        "paired with no balancing on the same seed. Scores are in points, of POM 100 times the mean correlation.",
        "",
        "**Headroom**: the score of a probe on each branch trained alone / jointly (the difference); dominance is the "
        "largest gradient norm over the mean of the others, the median over the steps of one run.",
        "",
        *table(["", "testbed", "joint", "alone / jointly", "dominance"], headroom_rows(m)),
        "**Change of the joint score** against no balancing, in points; significantly worse in bold:",
        "",
    ]

    def shown(found: Interval | None) -> str | None:
        return None if found is None else f"**{found}**" if found.worse else str(found)

    lines += table(["", *rules], [[bed, *(shown(m.accuracy(bed, rule)) for rule in rules)] for bed in beds])
    lines += [
        "**Headroom recovered** by the branches that do not dominate, in percent, where it is above 3 points:",
        "",
    ]
    lines += table(["", *rules], [[bed, *(m.recovered(bed, rule) for rule in rules)] for bed in beds])
    lines += ["**What the dominating branch gains**, its probe, in points:", ""]
    lines += table(["", *rules], [[bed, *(shown(m.first(bed, rule)) for rule in rules)] for bed in beds])
    lines += [
        "**A learning rate of its own** for each, the best of five on validation: change of the joint score against no "
        "balancing at the shared rate, and of the default against no balancing, both with their own:",
        "",
    ]
    plain, ours = "none, own rate", "default, own rate"
    lines += table(
        ["", plain, ours, "difference"],
        [
            [bed, *(shown(found) for found in (m.accuracy(bed, plain), m.accuracy(bed, ours), difference))]
            for bed in beds
            if (difference := m.accuracy(bed, ours, base=plain))
        ],
    )
    lines += ["**Optimizers**: change of the joint score; the first column is the score without balancing:", ""]
    lines += table(
        ["", "", "none", *MODES],
        [
            [bed, o, f"{100 * np.mean([f['test'] for f in base.values()]):.1f}"]
            + [shown(m.accuracy(bed, rule, o)) for rule in MODES]
            for bed in beds
            if sum(bool(m.cell(bed, "none", o)) for o in OPTIMIZERS) > 1
            for o in OPTIMIZERS
            if (base := m.cell(bed, "none", o))
        ],
    )
    starved, others, found = means(m)
    if starved and others:
        lines += [
            f"**In the figure**: means where no branch starves ({', '.join(others)}) and where one does "
            f"({', '.join(starved)}):",
            "",
        ]
        rows = [[rule, f"{x.unharmed:+.1f}", f"{x.gained:+.1f}", f"{x.recovered:.0f} %"] for rule, x in found.items()]
        lines += table(["", "joint score, none starves", "joint score, one does", "headroom recovered"], rows)
    lines += [
        "**Dominance** before and after scaling by the coefficients, along each rule's own training, one seed:",
        "",
    ]
    lines += table(
        ["", "none", "default", "norms only"],
        [
            [bed, m.dominance(bed, "none", "dominance")]
            + [
                f"{m.dominance(bed, rule, 'dominance')} → {m.dominance(bed, rule, 'dominance_after')}"
                for rule in ("default", "norms only")
            ]
            for bed in beds
        ],
    )
    lines += ["**Processor time** of a whole training step against the plain one, median of all pairs:", ""]
    times = {rule: m.slowdown(rule) for rule in rules}
    lines += table(list(times), [[f"{ratio:.2f}" if ratio else None for ratio in times.values()]])
    return "\n".join(lines)


class Means(NamedTuple):
    """A rule in three figures: means over testbeds, in points and percent."""

    unharmed: float  # change of the joint score where no branch starves
    gained: float  # and where one does
    recovered: float  # headroom recovered there


def means(m: Measured) -> tuple[list[str], list[str], dict[str, Means]]:
    """The testbeds on which each rule of the figure ran where a branch starves, the others, and the rules' means."""
    beds = [bed for bed in BEDS if all(m.accuracy(bed, rule) for rule in IN_FIGURE)]
    starved = [bed for bed in beds if BEDS[bed].starved and all(m.recovered(bed, rule) for rule in IN_FIGURE)]
    others = [bed for bed in beds if not BEDS[bed].starved]

    def mean(values: Iterable[Interval | None]) -> float:
        return float(np.mean([found.mean for found in values if found]))

    found = {
        rule: Means(
            mean(m.accuracy(bed, rule) for bed in others),
            mean(m.accuracy(bed, rule) for bed in starved),
            mean(m.recovered(bed, rule) for bed in starved),
        )
        for rule in IN_FIGURE
    }
    return starved, others, found


def plot(m: Measured, path: Path) -> None:
    """One point a rule: what it gains where a branch starves against what it costs where none does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    starved, others, found = means(m)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharex=True)
    labels = {
        "gained": "change of accuracy where one does, points",
        "recovered": "headroom recovered where one does, %",
    }
    for axis, (field, label) in zip(panels, labels.items(), strict=True):
        for rule, rule_means in found.items():
            at = rule_means.unharmed, getattr(rule_means, field)
            color = "tab:orange" if rule == "default" else "tab:gray"
            axis.plot(*at, "o", color=color, markersize=10 if rule == "default" else 7)
            axis.annotate(rule, at, (-8, 0), textcoords="offset points", color=color, ha="right", va="center")
        axis.plot(0, 0, "k+")
        axis.annotate("no balancing", (0, 0), (-8, 0), textcoords="offset points", ha="right", va="center")
        axis.axvline(0, color="k", linewidth=0.5)
        axis.margins(0.2, 0.1)
        axis.set_ylabel(label)
    figure.suptitle(f"Means over the testbeds where a branch starves: {', '.join(starved)}", fontsize="medium")
    figure.supxlabel(f"change of accuracy where no branch starves ({', '.join(others)}), points", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(runs: Mapping[Any, Found], seeds: Sequence[int], folder: Path) -> None:
    """Write ``dominance.md`` and ``dominance.png``."""
    measured = Measured(runs, seeds)
    (folder / "dominance.md").write_text(describe(measured, runs))
    plot(measured, folder / "dominance.png")
