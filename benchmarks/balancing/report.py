"""The tables, out of whatever has been run."""

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks._markdown import table
from benchmarks.balancing.cells import Cells, shown
from benchmarks.balancing.figure import draw
from benchmarks.balancing.goals import goals
from benchmarks.balancing.grid import DEFAULT, FORMULA, OLD, TELLING
from benchmarks.balancing.runs import RATES, Found, Run
from benchmarks.balancing.testbeds import TESTBEDS

SCALE_FREE = ("AdamW", "Adam", "Muon")


def points(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def headroom(cells: Cells) -> list[str]:
    rows = []
    for name, testbed in TESTBEDS.items():
        joint, added = cells.mean(name, "none"), cells.headroom(name)[0]
        if joint is None or added is None:
            continue
        room = cells.headroom(name)[1]
        probes = [
            cells.mean(name, "none", value=lambda f, m=m: f["probes"][m])
            for m in range(len(testbed.branches))
        ]
        missing = [
            cells.mean(name, "none", value=lambda f, m=m: f["missing"][m])
            for m in range(len(testbed.branches))
        ]
        branches = (
            f"{b.name} {points(p + r.mean)} / {points(p)}"
            for b, p, r in zip(testbed.branches, probes, room, strict=True)
            if r
        )
        without = (f"{b.name} {points(v)}" for b, v in zip(testbed.branches, missing, strict=True))
        rows.append(
            [
                testbed.title,
                f"{cells.rate(name, 'AdamW'):g}",
                points(joint),
                added,
                shown(branches),
                shown(without),
            ]
        )
    return table(
        [
            "AdamW",
            "rate",
            "joint",
            "alone, best or added up",
            "probe alone / jointly",
            "joint score without",
        ],
        rows,
    )


def changes(cells: Cells, optimizer: str, lr: float | None = None) -> list[str]:
    rows = []
    for name, testbed in TESTBEDS.items():
        change = cells.change(name, "Coherence", optimizer, lr)
        if change is None:
            continue
        names = [branch.name for branch in testbed.branches]
        columns = [
            shown(
                f"{n} {c}"
                for n, c in zip(
                    names, cells.branches(name, "Coherence", key, optimizer, lr), strict=True
                )
            )
            for key in ("probes", "missing")
        ]
        score, rate = (
            points(cells.mean(name, "none", optimizer, lr)),
            lr or cells.rate(name, optimizer),
        )
        rows.append([testbed.title, f"{rate:g}", score, change, *columns])
    return table(
        [optimizer, "rate", "none", "Coherence", "probe of a branch", "score without a branch"],
        rows,
    )


def descent(cells: Cells) -> list[str]:
    rows = [
        [TESTBEDS[name].title, points(cells.mean(name, "none", "SGD"))]
        + [cells.change(name, rule, "SGD") for rule in ("Coherence", "landed")]
        + [cells.change(name, "Coherence", "SGD", base="landed")]
        for name in OLD
        if cells.change(name, "Coherence", "SGD")
    ]
    return table(["SGD", "none", "Coherence", "the rule before", "difference"], rows)


def compared(cells: Cells, rules: Iterable[str]) -> list[str]:
    """Rules under AdamW at its default rate, where they were run."""
    rules = [rule for rule in rules if any(cells.change(testbed, rule, lr=DEFAULT) for testbed in TESTBEDS)]
    testbeds = [
        testbed
        for testbed in TESTBEDS
        if any(cells.change(testbed, r, lr=DEFAULT) for r in rules if r != "Coherence")
    ]
    rows = [
        [rule, *(cells.change(testbed, rule, lr=DEFAULT) for testbed in testbeds), _times(cells.slowdown(rule))]
        for rule in rules
    ]
    return table([f"AdamW at {DEFAULT:g}", *(TESTBEDS[testbed].title for testbed in testbeds), "time"], rows)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def rates(cells: Cells, optimizer: str) -> list[str]:
    """The change at every rate that was run beside the best one."""
    rows = []
    for testbed in TESTBEDS:
        tried = {lr: cells.change(testbed, "Coherence", optimizer, lr) for lr in RATES[optimizer]}
        if sum(change is not None for change in tried.values()) > 1:
            scores = (cells.mean(testbed, "none", optimizer, lr) for lr in tried)
            marks = ("best: " if lr == cells.rate(testbed, optimizer) else "" for lr in tried)
            shown = [
                f"{m}{s:.1f}, {c}" if c else None
                for m, s, c in zip(marks, scores, tried.values(), strict=True)
            ]
            rows.append([TESTBEDS[testbed].title, *shown])
    return table([f"{optimizer}: none, Coherence", *(f"{lr:g}" for lr in RATES[optimizer])], rows)


def own_rates(cells: Cells, optimizer: str) -> list[str]:
    """The change at the best rate for each of the two."""
    rows = [
        [
            TESTBEDS[testbed].title,
            f"{cells.rate(testbed, optimizer):g}",
            f"{cells.rate(testbed, optimizer, 'Coherence'):g}",
            cells.own(testbed, "Coherence", optimizer),
        ]
        for testbed in TESTBEDS
        if cells.own(testbed, "Coherence", optimizer)
    ]
    return table([optimizer, "best rate without", "best with Coherence", "change"], rows)


def describe(runs: Mapping[Run, Found]) -> str:
    """All tables as Markdown."""
    cells = Cells(runs)
    spent = sum(found["seconds"] for run, found in runs.items() if run.rule != "landed")
    missed = sum(not goal.met for goal in goals(cells))
    rows = [
        [goal.what, goal.reached, "met" if goal.met else "**not met**"] for goal in goals(cells)
    ]
    parts = [
        f"`python -m benchmarks.balancing` on {platform.machine()}, one thread, torch {torch.__version__}: "
        f"{len(runs)} runs, {spent / 60:.0f} minutes of processor time. Changes are in points of accuracy, of POM "
        "100 times the mean correlation, ± half a 95 % interval over seeds paired with no balancing; worse in "
        "bold. The learning rate is the one of five (SGD: three) that is best without balancing, if none is named. "
        "Time is processor time against the plain optimizer on a shared machine; `benchmarks.overhead` has it exact.",
        "",
        f"## Goals\n\n{len(rows) - missed} of {len(rows)} met.",
        "",
        *table(["goal", "reached", ""], rows),
        "## Headroom under AdamW\n",
        *headroom(cells),
        *(
            line
            for o in SCALE_FREE
            for line in (f"## Coherence under {o}, at its best rate\n", *changes(cells, o))
        ),
        f"## Coherence under AdamW at its default rate, {DEFAULT:g}\n",
        *changes(cells, "AdamW", DEFAULT),
        "## At every rate\n",
        *(line for optimizer in ("AdamW", "Muon") for line in rates(cells, optimizer)),
        "Each with the rate of five that is best for it:\n",
        *(line for optimizer in ("AdamW", "Muon") for line in own_rates(cells, optimizer)),
        "## Coherence under SGD\n",
        *descent(cells),
        "## Rivals\n",
        *compared(cells, ("Coherence", *TELLING)),
        "## Parts of the formula\n",
        *compared(cells, ("Coherence", *FORMULA, "every 4", "every 16")),
    ]
    return "\n".join(parts) + "\n"


def write(runs: Mapping[Run, Found], folder: Path) -> None:
    """``report.md`` and the figure, into the folder of the results."""
    (folder / "results" / "report.md").write_text(describe(runs))
    draw(Cells(runs), folder / "results" / "balancing.png")
