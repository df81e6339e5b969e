"""What was measured, by testbed, rule, optimizer and rate, and its changes against the optimizer alone."""

import base64
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from benchmarks._statistics import interval
from benchmarks.balancing.grid import TUNING, best_rate
from benchmarks.balancing.runs import Found, Run

# After the last epoch, or after the one that is best on validation.
Value = Literal["test", "best_test"]
ON_VALIDATION = {"test": "valid", "best_test": "best_valid"}


class Change(NamedTuple):
    """A mean over paired seeds, in points, with half the width of its 95 % interval and its p by Student's test."""

    mean: float
    half: float
    p: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Change | None":
        """Of differences of scores; None where there are fewer than two."""
        points = [100 * value for value in values]
        if len(points) < 2:
            return None
        mean, half = interval(points)
        p = float(stats.ttest_1samp(points, 0).pvalue) if np.ptp(points) else float(mean == 0)
        return cls(mean, half, p, len(points))

    def __str__(self) -> str:
        shown = f"{self.mean:+.1f} ± {self.half:.1f}".replace("-", "−")
        shown += "" if self.seeds >= 10 else f" (n={self.seeds})"
        return f"**{shown}**" if self.mean + self.half < 0 else shown


def holm(changes: Mapping[str, Change]) -> set[str]:
    """Which changes can be told from none when all are tested together, at 5 % (Holm, 1979).

    Example:
        >>> tested = {"a": Change(1.0, 0.1, 0.01, 10), "b": Change(1.0, 0.9, 0.04, 10)}
        >>> sorted(holm(tested | {"c": Change(0.1, 0.9, 0.9, 10)}))
        ['a']
    """
    told = set()
    for rank, name in enumerate(sorted(changes, key=lambda name: changes[name].p)):
        if changes[name].p > 0.05 / (len(changes) - rank):
            break
        told.add(name)
    return told


class Cells:
    """The runs of the measured seeds, and the rates that are best on those of tuning.

    Args:
        runs: All runs.
    """

    def __init__(self, runs: Mapping[Run, Found]) -> None:
        self._runs = runs
        self._cells: dict[tuple[str, str, str, float], dict[int, Found]] = {}
        for run, found in runs.items():
            if run.seed not in TUNING:
                key = (run.testbed, run.rule, run.optimizer, run.lr)
                self._cells.setdefault(key, {})[run.seed] = found

    def cell(self, testbed: str, rule: str, optimizer: str, lr: float) -> dict[int, Found]:
        """The runs by seed."""
        return self._cells.get((testbed, rule, optimizer, lr), {})

    def rate(
        self, testbed: str, rule: str, optimizer: str = "AdamW", value: Value = "test"
    ) -> float:
        """The learning rate that is best for a rule on validation; NaN if it was not tuned."""
        return best_rate(self._runs, testbed, optimizer, rule, ON_VALIDATION[value])

    def score(
        self, testbed: str, rule: str, optimizer: str, lr: float, value: Value = "test"
    ) -> float | None:
        """The mean, in points."""
        cell = self.cell(testbed, rule, optimizer, lr)
        return 100 * fmean(found[value] for found in cell.values()) if cell else None

    def change(
        self,
        testbed: str,
        rule: str = "Useful",
        optimizer: str = "AdamW",
        lr: float = 1e-3,
        *,
        value: Value = "test",
        base: str = "none",
    ) -> Change | None:
        """What a rule gains against another at the same rate, on the same seeds."""
        ours = self.cell(testbed, rule, optimizer, lr)
        others = self.cell(testbed, base, optimizer, lr)
        return Change.of(ours[s][value] - others[s][value] for s in sorted(ours) if s in others)

    def tuned(
        self, testbed: str, rule: str = "Useful", optimizer: str = "AdamW", value: Value = "test"
    ) -> Change | None:
        """What a rule gains at the rate that is best for it against no balancing at its best rate."""
        own, plain = (self.rate(testbed, r, optimizer, value) for r in (rule, "none"))
        ours = self.cell(testbed, rule, optimizer, own)
        others = self.cell(testbed, "none", optimizer, plain)
        return Change.of(ours[s][value] - others[s][value] for s in sorted(ours) if s in others)

    def span(
        self, testbed: str, rule: str, optimizer: str, rates: Iterable[float]
    ) -> tuple[float, float] | None:
        """The scores at the worst and at the best rate."""
        scores = [self.score(testbed, rule, optimizer, lr) for lr in rates]
        known = [score for score in scores if score is not None]
        return (min(known), max(known)) if len(known) == len(scores) else None


def redrawn(
    ours: Mapping[int, Found], others: Mapping[int, Found], target: np.ndarray, draws: int = 2000
) -> tuple[float, float, float]:
    """The change of the mean correlation with its 95 % interval over seeds and test samples, in points.

    Both the seeds and the samples of the one test set are drawn anew, with replacement.

    Args:
        ours: Runs by seed, with ``predictions``.
        others: Those that they are compared with.
        target: Targets of the test part, shape ``[B, D]``.
        draws: Number of draws.
    """
    generator = np.random.default_rng(0)
    seeds = sorted(set(ours) & set(others))
    predictions = np.stack(
        [[_unpacked(runs[seed], target.shape) for seed in seeds] for runs in (ours, others)]
    )
    changes = []
    for draw in range(draws + 1):
        rows = generator.integers(len(target), size=len(target))
        chosen = generator.integers(len(seeds), size=len(seeds))
        if draw == 0:  # the whole, as it is
            rows, chosen = np.arange(len(target)), np.arange(len(seeds))
        own, other = _correlation(predictions[:, chosen][:, :, rows], target[rows]).mean(1)
        changes.append(100 * (own - other))
    low, high = np.quantile(changes[1:], [0.025, 0.975])
    return changes[0], float(low), float(high)


def _unpacked(found: Found, shape: tuple[int, ...]) -> np.ndarray:
    data = base64.b64decode(found["predictions"])
    return np.frombuffer(data, np.float16).reshape(shape).astype(np.float64)


def _correlation(predictions: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean over the targets D of the correlation over the samples B; of predictions ``[..., B, D]``."""
    p = predictions - predictions.mean(-2, keepdims=True)
    t = target - target.mean(0)
    norms = np.linalg.norm(p, axis=-2) * np.linalg.norm(t, axis=0)
    return ((p * t).sum(-2) / np.maximum(norms, 1e-12)).mean(-1)
