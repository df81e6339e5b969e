"""The tables, out of whatever has been run."""

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks._markdown import table
from benchmarks.balancing.cells import Cells, Change, holm, redrawn
from benchmarks.balancing.grid import CURES, DEFAULT, FORMULA, RIVAL, SEEDS, SLOWED, WATCHED
from benchmarks.balancing.runs import KEPT, RATES, Found, Run
from benchmarks.balancing.testbeds import TESTBEDS, UNSEEN

NOISY = [name for name, testbed in TESTBEDS.items() if testbed.noisy and name not in UNSEEN]
SOUND = [name for name in TESTBEDS if name not in NOISY and name not in UNSEEN]
ORDERED = [*NOISY, *SOUND, *UNSEEN]
NO_TUNED_CLAIM = KEPT  # a hundred speakers cannot choose among rates


def points(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def section(title: str, lines: list[str]) -> list[str]:
    """A table under its title; nothing if none of it was run."""
    head_and_rule = 2
    rows = [line for line in lines if line][head_and_rule:]
    return [f"## {title}\n", *lines] if rows else []


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def gains(cells: Cells) -> list[str]:
    """AdamW at its default rate and tuned, after the last epoch and after the best on validation."""
    rows = []
    for name in ORDERED:
        at_default = [cells.change(name, value=value) for value in ("test", "best_test")]
        tuned = [cells.tuned(name, value=value) for value in ("test", "best_test")]
        if name in NO_TUNED_CLAIM:
            tuned = [None, None]
        if at_default[0]:
            rates = [cells.rate(name, rule) for rule in ("none", "Useful")]
            shown = "; ".join(f"{rate:g}" for rate in rates) if tuned[0] else "–"
            plain = points(cells.score(name, "none", "AdamW", DEFAULT))
            rows.append([TESTBEDS[name].title, plain, *at_default, shown, *tuned])
    head = ["AdamW", f"plain at {DEFAULT:g}", "change", "stopped early"]
    return table([*head, "best rates, plain; with the rule", "tuned", "tuned, stopped early"], rows)


def together(cells: Cells) -> list[str]:
    """One line on multiplicity for each column of the table of gains."""
    columns = {
        f"at {DEFAULT:g}": {name: cells.change(name) for name in ORDERED},
        "tuned": {name: cells.tuned(name) for name in ORDERED if name not in NO_TUNED_CLAIM},
        "at all rates": {
            f"{name} at {lr:g}": cells.change(name, lr=lr)
            for name in ORDERED
            for lr in RATES["AdamW"]
        },
    }
    rows = []
    for title, column in columns.items():
        changes = {name: change for name, change in column.items() if change}
        if not changes:
            continue
        told = holm(changes)
        means = [change.mean for change in changes.values()]
        up = sum(changes[name].mean > 0 for name in told)
        down = [f"{name} {changes[name]}" for name in sorted(told) if changes[name].mean < 0]
        lowest = min(change.mean - change.half for change in changes.values())
        row: list[object] = [title, len(changes), up, "; ".join(down) or "none"]
        rows.append([*row, signed(fmean(means)), signed(median(means)), signed(lowest)])
    head = ["AdamW", "comparisons", "better (Holm)", "worse (Holm)", "mean", "median"]
    return table([*head, "lowest end of an interval"], rows)


def rates(cells: Cells, optimizer: str) -> list[str]:
    """The plain score and the change at every rate, and from the worst to the best."""
    rows = []
    for name in ORDERED:
        tried = {lr: cells.change(name, "Useful", optimizer, lr) for lr in RATES[optimizer]}
        if sum(change is not None for change in tried.values()) < 2:
            continue
        shown = [
            f"{points(cells.score(name, 'none', optimizer, lr))}, {change}" if change else None
            for lr, change in tried.items()
        ]
        spans = [cells.span(name, rule, optimizer, tried) for rule in ("none", "Useful")]
        told = [f"{span[0]:.1f} to {span[1]:.1f}" if span else None for span in spans]
        rows.append([TESTBEDS[name].title, *shown, *told])
    columns = [f"{lr:g}" for lr in RATES[optimizer]]
    return table([optimizer, *columns, "plain, worst to best", "with the rule"], rows)


def at_best(cells: Cells, optimizer: str) -> list[str]:
    """At the rate that is best without the rule, and each at its own."""
    rows = []
    for name in ORDERED:
        lr = cells.rate(name, "none", optimizer)
        change = cells.change(name, "Useful", optimizer, lr)
        if change:
            row = [
                TESTBEDS[name].title,
                f"{lr:g}",
                points(cells.score(name, "none", optimizer, lr)),
                change,
            ]
            if name in NO_TUNED_CLAIM:
                row += [None, None]
            else:
                row.append(f"{cells.rate(name, 'Useful', optimizer):g}")
                row.append(cells.tuned(name, "Useful", optimizer))
            if optimizer == "SGD":
                row.append(points(cells.score(name, "none", "AdamW", DEFAULT)))
            rows.append(row)
    head = [optimizer, "best rate", "plain", "with the rule", "best with it", "each at its own"]
    return table(head + ([f"plain AdamW at {DEFAULT:g}"] if optimizer == "SGD" else []), rows)


def compared(cells: Cells, rules: Iterable[str]) -> list[str]:
    """Rules under AdamW at its default rate beside the default rule, where they were run."""
    rules = [rule for rule in rules if any(cells.change(name, rule) for name in ORDERED)]
    shown = [name for name in ORDERED if any(cells.change(name, rule) for rule in rules)]
    rows = [
        [rule, *(cells.change(name, rule) for name in shown)]
        for rule in (("Useful", *rules) if rules else ())
    ]
    return table([f"AdamW at {DEFAULT:g}", *(TESTBEDS[name].title for name in shown)], rows)


def constants(cells: Cells) -> list[str]:
    """The rule at work, and the factors that it gave in a short watch, at each rate."""
    rows = []
    for name in ORDERED:
        for rule in ("Useful", *WATCHED):
            changes = [cells.change(name, rule, lr=lr) for lr in RATES["AdamW"]]
            if any(cells.change(name, w, lr=lr) for w in WATCHED for lr in RATES["AdamW"]):
                title = "the rule at work" if rule == "Useful" else rule
                rows.append([TESTBEDS[name].title, title, *changes])
    return table(["AdamW", "", *(f"{lr:g}" for lr in RATES["AdamW"])], rows)


def slowed(cells: Cells, runs: Mapping[Run, Found]) -> list[str]:
    """A noisy branch by hand at a rate at which it cannot settle, beside the rule."""
    rows: dict[tuple[str, str, float], list[object]] = {}
    for run in SLOWED:
        place = run.testbed, run.optimizer, run.lr
        plain = cells.cell(run.testbed, "none", run.optimizer, run.lr)
        by_hand = {s: runs[run._replace(seed=s)] for s in SEEDS if run._replace(seed=s) in runs}
        if place not in rows:
            title = f"{TESTBEDS[run.testbed].title}, {run.optimizer} at {run.lr:g}"
            score = cells.score(run.testbed, "none", run.optimizer, run.lr)
            rule = cells.change(run.testbed, "Useful", run.optimizer, run.lr)
            rows[place] = [title, points(score), rule]
        changes = (by_hand[s]["test"] - plain[s]["test"] for s in by_hand if s in plain)
        rows[place].append(Change.of(changes))
    factors = dict.fromkeys(f"{run.knob:g} by hand" for run in SLOWED)
    known = [row for row in rows.values() if any(cell is not None for cell in row[2:])]
    return table(["a noisy branch slowed", "plain", "the rule", *factors], known)


def against_itself(cells: Cells, rules: Iterable[str]) -> list[str]:
    """The default rule in parts, or run otherwise, against the default rule as it is."""
    rules = [rule for rule in rules if any(cells.change(name, rule) for name in ORDERED)]
    shown = [name for name in ORDERED if any(cells.change(name, rule) for rule in rules)]
    rows = [[rule, *(cells.change(name, rule, base="Useful") for name in shown)] for rule in rules]
    return table(["against the rule as it is", *(TESTBEDS[name].title for name in shown)], rows)


def fixed_test_sets(cells: Cells) -> list[str]:
    """The changes on testbeds of one split, with the test samples drawn anew too."""
    rows = []
    for name in KEPT:
        ours, plain = (cells.cell(name, rule, "AdamW", DEFAULT) for rule in ("Useful", "none"))
        if ours and plain:
            parts = TESTBEDS[name].parts(TESTBEDS[name], 0)
            change, low, high = redrawn(ours, plain, parts["test"].target.numpy())
            rows.append([TESTBEDS[name].title, f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"])
    return table(["one split", "change, 95 % over seeds and test speakers"], rows)


def describe(runs: Mapping[Run, Found]) -> str:
    """All tables as Markdown."""
    cells = Cells(runs)
    spent = sum(found["seconds"] for found in runs.values())
    parts = [
        "# Does balancing help?\n",
        f"`python -m benchmarks.balancing` on {platform.machine()}, one thread, torch {torch.__version__}: "
        f"{len(runs)} runs, {spent / 60:.0f} minutes of processor time in training steps. A change is in points of "
        "accuracy, of POM 100 times the mean correlation, ± half a 95 % interval over ten seeds, each paired with the "
        "run of the optimizer alone; what is worse is in bold. *Stopped early* is the epoch that is best on "
        "validation, for both. *Tuned* is each at the rate that is best for it on three other seeds. POM has too few "
        "speakers to choose a rate. *The rule* is `rules.Useful()`, the default.\n",
        "The last three testbeds formed no rule.\n",
        *section("AdamW", gains(cells)),
        *section("All testbeds together", together(cells)),
        *section("AdamW at every rate", rates(cells, "AdamW")),
        *section("SGD", at_best(cells, "SGD")),
        *section("Adam", at_best(cells, "Adam")),
        *section("Muon", at_best(cells, "Muon")),
        *section("Cures that everybody has", compared(cells, CURES)),
        *section("Constant factors out of a short watch", constants(cells)),
        *section("Slowed by hand at the largest rates", slowed(cells, runs)),
        *section("Rivals", compared(cells, RIVAL)),
        *section("Parts of the rule", against_itself(cells, FORMULA)),
        *section("Every so many steps", against_itself(cells, ("every 4", "every 16"))),
        *section("Seeds and test set", fixed_test_sets(cells)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def write(runs: Mapping[Run, Found], folder: Path) -> None:
    """``report.md``, into the folder of the results."""
    (folder / "results" / "report.md").write_text(describe(runs))
