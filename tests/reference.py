"""The rule of one step as slow loops over floats, straight from the equations; the fast code must equal it."""

import math
from dataclasses import dataclass, field

from gradbalance._rule import DEAD_BAND, EPS
from gradbalance._settings import Settings


@dataclass
class ReferenceRule:
    """One instance follows one optimizer; ``step`` takes lists of floats, None for a group without an error."""

    settings: Settings
    shares: dict[int, float] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    agreements: dict[int, float] = field(default_factory=dict)
    told: bool = False  # whether errors were ever observed, if only in a step that did not count
    asked: bool = False
    steps: int = 0

    def step(
        self,
        norms: list[float],
        observed: list[float | None] | None = None,
        cosines: list[float | None] | None = None,
    ) -> list[float]:
        s = self.settings
        self.told = self.told or observed is not None
        everything = [*norms, *(e for e in observed or [] if e is not None)]
        active = [m for m, n in enumerate(norms) if n > 0]
        if not all(map(math.isfinite, everything)) or len(active) < 2:
            return [1.0] * len(norms)
        inside = s.window is None or (s.window[0] <= self.steps < (math.inf if s.window[1] is None else s.window[1]))
        self.steps += 1

        total = sum(norms[m] for m in active)
        for m in active:
            self.shares[m] = self.smooth(self.shares.get(m), norms[m] / total)
        if observed is not None:
            seen = {m: e for m, e in enumerate(observed) if e is not None}
            self.errors = {m: self.smooth(self.errors.get(m), e) for m, e in seen.items()}

        self.asked = cosines is not None and s.agreement is not None and not self.told
        if self.asked:
            for m, cosine in enumerate(cosines):
                if cosine is not None:
                    self.agreements[m] = self.smooth(self.agreements.get(m), cosine)

        members = [m for m in active if m in self.errors] if self.errors else active
        coefficients = [1.0] * len(norms)
        if inside and len(members) >= 2:
            for m in members:
                peers = [k for k in members if k != m]
                factor = self.penalty(m, peers) * (self.modulation(m, peers) if self.errors else 1.0)
                coefficients[m] = max(s.min_coefficient, factor)
            lift = self.lift({m: coefficients[m] for m in members})
            for m in members:
                coefficients[m] *= lift
        return coefficients

    def smooth(self, mean: float | None, value: float) -> float:
        return value if mean is None else self.settings.smoothing * mean + (1 - self.settings.smoothing) * value

    def in_conflict(self, m: int, k: int) -> bool:
        if self.shares[m] <= self.settings.threshold * self.shares[k]:
            return False
        if self.errors:
            return self.errors[m] < self.errors[k]
        if self.asked:
            if m not in self.agreements or k not in self.agreements:
                return False
            return max(self.agreements[m], 0) < self.settings.agreement * max(self.agreements[k], 0)
        return True

    def penalty(self, m: int, peers: list[int]) -> float:
        return self.settings.eta ** (sum(self.in_conflict(m, k) for k in peers) / len(peers))

    def lift(self, coefficients: dict[int, float]) -> float:
        largest = max(self.shares[m] for m in coefficients)
        scaled = max(self.shares[m] * c for m, c in coefficients.items())
        return max(1.0, min(self.settings.max_coefficient or 1.0, largest / scaled))

    def modulation(self, m: int, peers: list[int]) -> float:
        def score(k: int) -> float:
            return 1 / (self.errors[k] + EPS)

        ratio = score(m) / (sum(map(score, peers)) / len(peers))
        if ratio <= 1 + DEAD_BAND:
            return 1.0
        return 1 - math.tanh(self.settings.alpha * (ratio - 1 if self.settings.centred else ratio))


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
