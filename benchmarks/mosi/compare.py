"""What the lines of a study say: means, intervals, differences paired by seed, collapses, probes, and the verdict."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks._statistics import interval as student
from benchmarks.mosi.rows import title

Line = dict[str, Any]
Runs = dict[str, dict[int, Line]]  # row -> seed -> line
BASELINE, FULL, TEXT = "A0", "A6", "T"
LOSSES, DEFAULT, NOISE, NOISE_DEFAULT = (
    "C2",
    "L",
    "NC2",
    "N",
)  # AME+SL, without and with the default rule
IMBALANCED = (
    2.0  # times the mean of the other norms: from here on the verdict calls norms imbalanced
)


class Difference(NamedTuple):
    """Of two rows, by seed: mean, 95 % interval (Student), p of the Wilcoxon signed-rank test, number of seeds."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def distinguishable(self) -> bool:
        """The interval leaves 0 out: False too where there are too few seeds for an interval."""
        return self.low > 0 or self.high < 0

    def told(self, digits: int = 3) -> str:
        if np.isnan(self.mean):
            return "no common seed"
        return f"{self.mean:+.{digits}f} {bounds(self.low, self.high, digits)}"


def bounds(low: float, high: float, digits: int = 3) -> str:
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else "[no interval]"


def by_row(lines: Iterable[Line]) -> Runs:
    runs: Runs = {}
    for line in lines:
        runs.setdefault(line["row"], {})[line["seed"]] = line
    return runs


def interval(values: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean; infinite for fewer than two values."""
    mean, half = student(values)
    return (mean - half, mean + half) if np.isfinite(half) else (-np.inf, np.inf)


def difference(
    one: dict[int, Line], other: dict[int, Line], value: Callable[[Line], float]
) -> Difference:
    """`one` minus `other` over the seeds that both have."""
    from scipy.stats import wilcoxon

    seeds = sorted(one.keys() & other.keys())
    gaps = np.array([value(one[seed]) - value(other[seed]) for seed in seeds])
    if not len(gaps):
        return Difference(np.nan, -np.inf, np.inf, np.nan, 0)
    p = float(wilcoxon(gaps).pvalue) if gaps.any() else 1.0
    return Difference(float(gaps.mean()), *interval(gaps), p, len(seeds))


def metric(name: str) -> Callable[[Line], float]:
    return lambda line: line[name]


def collapsed(line: Line, constant_mae: float) -> bool:
    """No better than a constant: Corr below 0.3, or MAE above that of the training mean."""
    return line["corr"] < 0.3 or line["mae"] > constant_mae


def over_epochs(line: Line, *keys: str) -> float:
    """Mean over the epochs of a figure of the balance, such as dominance or norms, text; nan without one."""
    values = []
    for epoch in line["history"]:
        value = epoch
        for key in keys:
            value = value.get(key, np.nan) if isinstance(value, dict) else np.nan
        values.append(value)
    return float(np.mean(values))


def mean_over(runs: dict[int, Line], value: Callable[[Line], float]) -> float:
    return float(np.mean([value(line) for line in runs.values()]))


def probe(name: str) -> Callable[[Line], float]:
    return lambda line: line["probes"][name]["mae"]


def modalities(runs: Runs) -> dict[str, str]:
    """Each modality with the row in which it is trained alone."""
    names = next(iter(runs[BASELINE].values()))["probes"] if BASELINE in runs else {}
    rows = {name: "T" if name == "text" else name for name in names}
    return {name: row for name, row in rows.items() if row in runs}


def verdict(runs: Runs, constant_mae: float) -> list[str]:
    """The answers to the questions of the study, from the numbers alone; one that lacks its rows says so."""
    if BASELINE in runs and FULL in runs:
        answers = [
            balance_verdict(runs[BASELINE], runs[FULL]),
            accuracy_verdict(runs[BASELINE], runs[FULL]),
        ]
    else:
        answers = [
            "Of norms and of full against baseline: no verdict, it needs the baseline and the full model."
        ]
    return [
        *answers,
        collapse_verdict(runs, constant_mae),
        *rest_verdict(runs),
        *pairs_verdict(runs),
    ]


def balance_verdict(base: dict[int, Line], full: dict[int, Line]) -> str:
    before, after, without = (
        mean_over(runs, lambda line, key=key: over_epochs(line, key))
        for runs, key in ((full, "dominance"), (full, "dominance_after"), (base, "dominance"))
    )
    still = "still imbalanced" if after > IMBALANCED else "balanced"
    change = difference(full, base, lambda line: over_epochs(line, "dominance"))
    effect = f"full minus baseline, before the coefficients: {change.told(2)}"
    return (
        f"Are norms still imbalanced with the penalty on? The largest gradient norm is {without:.2f} times the mean of "
        f"the others without the penalty. In the full model it is {before:.2f} times before the coefficients and "
        f"{after:.2f} times after them: {still} (limit {IMBALANCED:g}); {effect}."
    )


def accuracy_verdict(base: dict[int, Line], full: dict[int, Line]) -> str:
    parts = []
    for name, told_as in (("mae", "MAE"), ("corr", "Corr"), ("acc2_nonzero", "Acc-2")):
        gap = difference(full, base, metric(name))
        told = "distinguishable" if gap.distinguishable else "not distinguishable"
        parts.append(f"{told_as} {gap.told()}, p = {gap.p:.3f}: {told}")
    seeds = difference(full, base, metric("mae")).seeds
    return (
        f"Is the final accuracy distinguishable from the baseline's? Full minus baseline over {seeds} paired seeds: "
        + "; ".join(parts)
        + "."
        + f" So few seeds cannot bring p below {2 / 2**seeds:.3g}: an effect is not ruled out."
        * (seeds < 6)
    )


def collapse_verdict(runs: Runs, constant_mae: float) -> str:
    falls = {
        row: sum(collapsed(line, constant_mae) for line in own.values())
        for row, own in runs.items()
    }
    fallen = [
        f"{title(row)} ({count} of {len(runs[row])})" for row, count in falls.items() if count
    ]
    return f"Does a row collapse? Runs that did: {', '.join(fallen) or 'none in any row'}."


def rest_verdict(runs: Runs) -> list[str]:
    """Which rows differ in MAE from the baseline, and which from text alone."""
    answers = []
    for reference, it in ((TEXT, "text alone"), (BASELINE, "the baseline")):
        if reference not in runs:
            continue
        others = {
            row: difference(own, runs[reference], metric("mae"))
            for row, own in runs.items()
            if row != reference
        }
        better, worse = (
            [
                f"{title(row)} ({gap.mean:+.3f})"
                for row, gap in others.items()
                if gap.distinguishable and sign * gap.mean < 0
            ]
            for sign in (1, -1)
        )
        answers.append(
            f"Does anything beat {it}? Of {len(others)} other rows, MAE is lower in {', '.join(better) or 'none'}; "
            f"higher in {', '.join(worse) or 'none'} (95 % intervals that leave 0 out, not corrected for their number)."
        )
    return answers


def pairs_verdict(runs: Runs) -> list[str]:
    """What a part of the method, the default rule or a modality of noise does to a model that is otherwise the same."""
    questions = [
        ("What does GE add to AME+GM?", "A3", "A2"),
        ("What does CP add to AME+GM+GE?", "A4", "A3"),
        ("What does the full model have without CP?", "A5", FULL),
        ("What does the balancing add to AME+SL?", FULL, LOSSES),
        ("What does the full model have on the update?", "U", FULL),
        ("What does the library's default rule do to AME+SL?", DEFAULT, LOSSES),
        ("What does twice the rate of the text encoder do to AME+SL?", "X", LOSSES),
        ("What does a modality of pure noise cost?", NOISE, LOSSES),
        ("What does the default rule give back of it?", NOISE_DEFAULT, NOISE),
    ]
    return [
        f"{question} MAE {difference(runs[one], runs[other], metric('mae')).told()} "
        f"({difference(runs[one], runs[other], metric('mae')).seeds} paired seeds)."
        for question, one, other in questions
        if one in runs and other in runs
    ]
