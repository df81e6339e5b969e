"""One figure: what a rule changes where something is wrong, against what it changes where nothing is."""

from pathlib import Path
from statistics import fmean

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.balancing.cells import Cells
from benchmarks.balancing.grid import DEFAULT, TELLING
from benchmarks.balancing.testbeds import TESTBEDS

RIVALS = {
    "SGD": ("landed", "faster by hand", "slower by hand", "OGM-GE", "clip groups", "paper"),
    "AdamW": TELLING,
}
NAMES = {
    "landed": "the rule before",
    "by hand": "rates by hand, tuned",
    "faster by hand": "faster by hand, tuned",
    "slower by hand": "slower by hand, tuned",
    "epochwise, as MILES": "epoch rule, as MILES",
    "update over signal to noise": "update / signal to noise",
    "update times signal to noise": "update × signal to noise",
}
OURS, GREY = "#c23b22", "#8a8a8a"


def dots(cells: Cells, optimizer: str) -> dict[str, tuple[float, float]]:
    """Mean change where nothing is wrong and where something is, over the testbeds that all rules have in common."""
    lr = DEFAULT if optimizer == "AdamW" else None

    def gains(rule: str) -> dict[str, float]:
        return {
            testbed: change.mean for testbed in TESTBEDS if (change := cells.change(testbed, rule, optimizer, lr))
        }

    found = {rule: gains(rule) for rule in ("Coherence", *RIVALS[optimizer])}
    found = {rule: testbeds for rule, testbeds in found.items() if testbeds}
    common = set.intersection(*map(set, found.values())) if found else set()
    wrong = {
        testbed for testbed in common if (TESTBEDS[testbed].starved if optimizer == "SGD" else TESTBEDS[testbed].wrong)
    }
    if not wrong or wrong == common:
        return {}
    return {
        rule: (fmean(testbeds[b] for b in common - wrong), fmean(testbeds[b] for b in wrong))
        for rule, testbeds in found.items()
    }


def draw(cells: Cells, path: Path) -> None:
    """Two panels, SGD and AdamW; rivals in grey."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8))
    for panel, optimizer in zip(panels, RIVALS, strict=True):
        panel.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        panel.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
        found = sorted(dots(cells, optimizer).items(), key=lambda dot: dot[1][1])
        gap = 0.05 * (found[-1][1][1] - found[0][1][1]) if found else 0.0
        low = -float("inf")
        for rule, (x, y) in found:
            ours = rule == "Coherence"
            panel.scatter(
                x, y, s=70 if ours else 28, color=OURS if ours else GREY, zorder=3 if ours else 2
            )
            low = max(y, low + gap)  # names do not overlap
            panel.annotate(
                NAMES.get(rule, rule),
                (x, low),
                textcoords="offset points",
                xytext=(7, -3),
                fontsize=10 if ours else 7.5,
                color=OURS if ours else "#555555",
                weight="bold" if ours else "normal",
            )
        panel.set_title("AdamW, rate 0.001" if optimizer == "AdamW" else optimizer)
        panel.set_xlabel("change where nothing is wrong, points")
        panel.margins(x=0.25, y=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change where a branch is\nstarved or noise, points")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
