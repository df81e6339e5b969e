"""The engine's means and the paper's rule as slow loops over floats, straight from the equations; None is unknown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradbalance.rules import ConflictAware
from gradbalance.rules.conflict_aware import DEAD_BAND, EPS

Floats = Sequence[float | None]


@dataclass
class Reference:
    """Running means, steps that do not count and the window around a slow rule; one instance follows one optimizer.

    ``rule`` takes shares, coherences and errors, each a float per group or None, and which groups are active; the
    errors are None altogether if none was ever observed. It gives a list of coefficients.
    """

    rule: Callable[[Floats, Floats, Floats | None, Sequence[bool]], list[float]]
    smoothing: float = 0.98
    window: tuple[int, int | None] | None = None
    shares: dict[int, float] = field(default_factory=dict)
    coherences: dict[int, float] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    observed: bool = False  # whether errors ever were, if only in a step that did not count
    steps: int = 0

    def step(self, norms: Sequence[float], errors: Floats | None = None, cosines: Floats | None = None) -> list[float]:
        """The coefficients of one step; the errors are those since the last one, None for a group without."""
        n = len(norms)
        self.observed = self.observed or errors is not None
        everything = [*norms, *(e for e in errors or [] if e is not None)]
        active = [m for m in range(n) if norms[m] > 0]
        if not all(map(math.isfinite, everything)) or len(active) < 2:
            return [1.0] * n
        start, stop = self.window or (0, None)
        inside = start <= self.steps and (stop is None or self.steps < stop)
        self.steps += 1

        total = math.fsum(norms)
        self.shares |= {m: self.mean(self.shares.get(m), norms[m] / total) for m in active}
        if errors is not None:  # who was left out of the last call is not observed any more
            seen = {m: e for m, e in enumerate(errors) if e is not None}
            self.errors = {m: self.mean(self.errors.get(m), e) for m, e in seen.items()}
        if cosines is not None:
            seen = {m: c for m, c in enumerate(cosines) if c is not None}
            self.coherences |= {m: self.mean(self.coherences.get(m), c) for m, c in seen.items()}

        shares, coherences, seen_errors = ([v.get(m) for m in range(n)] for v in self.vectors())
        coefficients = self.rule(
            shares, coherences, seen_errors if self.observed else None, [m in active for m in range(n)]
        )
        return [c if inside and m in active else 1.0 for m, c in enumerate(coefficients)]

    def vectors(self) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
        return self.shares, self.coherences, self.errors

    def mean(self, mean: float | None, value: float) -> float:
        return value if mean is None else self.smoothing * mean + (1 - self.smoothing) * value


@dataclass
class SlowConflictAware:
    """``rules.ConflictAware``, one group and one peer at a time."""

    rule: ConflictAware

    def __call__(
        self, shares: Floats, coherences: Floats, errors: Floats | None, active: Sequence[bool]
    ) -> list[float]:
        known = {m: e for m, e in enumerate(errors or []) if e is not None}
        members = [m for m, acts in enumerate(active) if acts and (m in known or not known)]
        coefficients = [1.0] * len(shares)
        for m in members if len(members) > 1 else []:
            peers = [k for k in members if k != m]
            coefficients[m] = self.penalty(m, peers, shares, known)
            if known:
                coefficients[m] *= self.modulation(m, peers, known)
        return coefficients

    def penalty(self, m: int, peers: list[int], shares: Floats, errors: dict[int, float]) -> float:
        conflicts = [
            shares[m] > self.rule.threshold * shares[k] and (not errors or errors[m] < errors[k]) for k in peers
        ]
        return self.rule.eta ** (sum(conflicts) / len(peers))

    def modulation(self, m: int, peers: list[int], errors: dict[int, float]) -> float:
        def score(k: int) -> float:
            return 1 / (errors[k] + EPS)

        ratio = score(m) / (sum(map(score, peers)) / len(peers))
        if ratio <= 1 + DEAD_BAND:
            return 1.0
        return 1 - math.tanh(self.rule.alpha * (ratio - 1 if self.rule.centred else ratio))


def paper_coefficients(
    norms: tuple[float, float], errors: tuple[float, float], alpha: float, eta: float
) -> list[float]:
    """The paper's coefficients for two modalities, as arXiv 2605.28575 writes them."""
    coefficients = []
    for m, k in ((0, 1), (1, 0)):
        own, other = 1 / (errors[m] + EPS), 1 / (errors[k] + EPS)
        c = 1 - math.tanh(alpha * own / other) if own > other else 1.0
        coefficients.append(c * eta if errors[m] < errors[k] and norms[m] > norms[k] else c)
    return coefficients


def coherent_coefficients(
    coherences: Floats,
    shares: Sequence[float],
    scale_free: bool,
    *,
    most: float = 3.0,
    chance: float = 0.1,
    clear: float = 0.3,
    limit: float = 20.0,
) -> list[float]:
    """The three steps of the default rule, its defaults written once more."""
    known = [m for m, a in enumerate(coherences) if a is not None]
    a = {m: max(coherences[m], 0.0) for m in known}

    def clearer(m: int, k: int) -> float:
        return max(1.0, ((a[m] + chance) / (a[k] + chance)) ** 2)

    def further(m: int) -> float:
        found = []
        for k in known:
            if scale_free:
                found.append(min(clearer(m, k), most))
            else:
                longer = max(1.0, shares[k] / shares[m])
                found.append(min(clearer(m, k), longer, most) * longer ** min(1.0, math.log2(clearer(m, k))))
        return max(found)

    p = {m: 1.0 if scale_free else shares[m] for m in known}
    x = {m: further(m) for m in known}
    beta = min(1.0, max(a.values()) / clear) if scale_free and known else 0.0
    paid = (max(p.values()) / max(x[m] * p[m] for m in known)) ** (1 - beta) if known else 1.0
    c = {m: x[m] * paid if scale_free else min(x[m] * paid, limit) for m in known}
    return [c.get(m, 1.0) for m in range(len(coherences))]
