"""What was measured, by testbed, rule and optimizer, and its changes against no balancing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks._statistics import interval
from benchmarks.balancing.grid import TUNING, best_rate
from benchmarks.balancing.runs import APART, Found, Run
from benchmarks.balancing.testbeds import TESTBEDS

Value = Callable[[Found], float]


class Change(NamedTuple):
    """A mean over paired seeds, in points, with half the width of its 95 % interval."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Change | None":
        """Of fractions; None where there are fewer than two."""
        points = [100 * value for value in values]
        return cls(*interval(points), len(points)) if len(points) > 1 else None

    def __str__(self) -> str:
        shown = f"{self.mean:+.1f} ± {self.half:.1f}".replace("-", "−")
        shown += "" if self.seeds >= 10 else f" (n={self.seeds})"
        return f"**{shown}**" if self.worse() else shown

    def worse(self, than: float = 0.0) -> bool:
        """Significantly below."""
        return self.mean + self.half < than


class Cells:
    """The runs of the measured seeds.

    Args:
        runs: All runs.
    """

    def __init__(self, runs: Mapping[Run, Found]) -> None:
        self._runs = runs
        self._cells: dict[tuple[str, str, str, float], dict[int, Found]] = {}
        for run, found in runs.items():
            if run.seed not in TUNING:
                self._cells.setdefault((run.testbed, run.rule, run.optimizer, run.lr), {})[run.seed] = (
                    found
                )
        self._rates: dict[tuple[str, str, str], float] = {}

    def rate(self, testbed: str, optimizer: str, rule: str = "none") -> float:
        """The learning rate that is best without balancing, or for a rule if that was tried."""
        key = testbed, optimizer, rule
        if key not in self._rates:
            self._rates[key] = best_rate(self._runs, testbed, optimizer, rule)
        return self._rates[key]

    def own(self, testbed: str, rule: str, optimizer: str = "AdamW") -> Change | None:
        """What a rule gains at its own best rate against no balancing at its."""
        others, cell = (
            self.cell(testbed, "none", optimizer),
            self.cell(testbed, rule, optimizer, self.rate(testbed, optimizer, rule)),
        )
        return Change.of(cell[s]["test"] - others[s]["test"] for s in sorted(cell) if s in others)

    def cell(
        self, testbed: str, rule: str, optimizer: str = "AdamW", lr: float | None = None
    ) -> dict[int, Found]:
        """The runs by seed, at the best rate if ``lr`` is None."""
        return self._cells.get((testbed, rule, optimizer, lr or self.rate(testbed, optimizer)), {})

    def change(
        self,
        testbed: str,
        rule: str,
        optimizer: str = "AdamW",
        lr: float | None = None,
        *,
        base: str = "none",
        value: Value = lambda found: found["test"],
    ) -> Change | None:
        """What a rule gains against another on the same seeds, in points of joint score by default."""
        others, cell = self.cell(testbed, base, optimizer, lr), self.cell(testbed, rule, optimizer, lr)
        return Change.of(value(cell[s]) - value(others[s]) for s in sorted(cell) if s in others)

    def mean(
        self,
        testbed: str,
        rule: str,
        optimizer: str = "AdamW",
        lr: float | None = None,
        *,
        value: Value = lambda found: found["test"],
    ) -> float | None:
        """In points."""
        cell = self.cell(testbed, rule, optimizer, lr)
        return 100 * fmean(map(value, cell.values())) if cell else None

    def branches(
        self, testbed: str, rule: str, key: str, optimizer: str = "AdamW", lr: float | None = None
    ) -> list[Change | None]:
        """The change of ``probes`` or ``missing``, for each branch."""
        names = range(len(TESTBEDS[testbed].branches))
        return [
            self.change(testbed, rule, optimizer, lr, value=lambda found, m=m: found[key][m])
            for m in names
        ]

    def headroom(
        self, testbed: str, optimizer: str = "AdamW"
    ) -> tuple[Change | None, list[Change | None]]:
        """What encoders trained alone have more than jointly.

        Returns:
            That of their outputs added up, or of the best alone if that is more; and that of the probe on each.
        """
        joint, apart = self.cell(testbed, "none", optimizer), self.cell(testbed, APART, optimizer)
        whole = (
            max(apart[s]["test"], *apart[s]["alone"]) - joint[s]["test"]
            for s in sorted(apart)
            if s in joint
        )
        return Change.of(whole), self.branches(testbed, APART, "probes", optimizer)

    def slowdown(self, rule: str, optimizers: Sequence[str] = ("AdamW",)) -> float | None:
        """Processor time of a training against the plain one, the median over all pairs."""
        ratios = [
            found["seconds"] / self._cells[testbed, "none", o, lr][seed]["seconds"]
            for (testbed, r, o, lr), cell in self._cells.items()
            if r == rule and o in optimizers and (testbed, "none", o, lr) in self._cells
            for seed, found in cell.items()
            if seed in self._cells[testbed, "none", o, lr]
        ]
        return median(ratios) if ratios else None


def shown(values: Iterable[Any]) -> str:
    return "; ".join("–" if value is None else str(value) for value in values)
