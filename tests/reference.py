"""The engine's running means and the rules as slow loops over floats, straight from the equations; None is unknown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradbalance.rules import ConflictAware
from gradbalance.rules.conflict_aware import DEAD_BAND, EPS

Floats = Sequence[float | None]


@dataclass
class Given:
    """What a slow rule is given: a list of N floats each, None where a group has no value yet."""

    shares: Floats
    coherences: Floats
    useful: Floats
    errors: Floats | None
    active: Sequence[bool]


class Mean:
    """A running mean whose k-th value has the weight max(1 - smoothing, 1/k), out of all its values."""

    def __init__(self, smoothing: float):
        self.smoothing, self.values = smoothing, []

    def weights(self) -> list[float]:
        weights = []
        for k in range(1, len(self.values) + 1):
            w = max(1 - self.smoothing, 1 / k)
            weights = [(1 - w) * old for old in weights] + [w]
        return weights

    def mean(self) -> float | None:
        if not self.values:
            return None
        return math.fsum(w * x for w, x in zip(self.weights(), self.values, strict=True))

    def error(self) -> float:
        n = min(len(self.values), (1 + self.smoothing) / (1 - self.smoothing))
        if len(self.values) < 3 or n <= 1:
            return math.inf
        mean = self.mean()
        variance = math.fsum(
            w * (x - mean) ** 2 for w, x in zip(self.weights(), self.values, strict=True)
        )
        return math.sqrt(variance / (n - 1))


@dataclass
class Reference:
    """Running means, steps that do not count and the window around a slow rule; one instance follows one optimizer.

    ``rule`` takes a :class:`Given` and gives a list of coefficients.
    """

    rule: Callable[[Given], list[float]]
    smoothing: float = 0.98
    window: tuple[int, int | None] | None = None
    shares: dict[int, Mean] = field(default_factory=dict)
    coherences: dict[int, Mean] = field(default_factory=dict)
    useful: dict[int, Mean] = field(default_factory=dict)
    errors: dict[int, Mean] = field(default_factory=dict)
    observed: bool = False  # whether errors ever were, if only in a step that did not count
    steps: int = 0

    def step(
        self, norms: Sequence[float], errors: Floats | None = None, cosines: Floats | None = None
    ) -> list[float]:
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
        for m in active:
            self.add(self.shares, m, norms[m] / total)
        for m, cosine in enumerate(cosines or []):
            if cosine is not None:
                self.add(self.coherences, m, cosine)
                self.add(self.useful, m, cosine * norms[m] / total)
        if errors is not None:
            for m, error in enumerate(errors):
                if error is None:  # who was left out of the last call is not observed any more
                    self.errors.pop(m, None)
                else:
                    self.add(self.errors, m, error)
        given = Given(
            self.means(self.shares, n),
            self.means(self.coherences, n),
            self.means(self.useful, n),
            self.means(self.errors, n) if self.observed else None,
            [m in active for m in range(n)],
        )
        coefficients = self.rule(given)
        return [c if inside and m in active else 1.0 for m, c in enumerate(coefficients)]

    def add(self, means: dict[int, Mean], m: int, value: float) -> None:
        means.setdefault(m, Mean(self.smoothing)).values.append(value)

    def means(self, means: dict[int, Mean], n: int) -> Floats:
        return [means[m].mean() if m in means else None for m in range(n)]


@dataclass
class SlowConflictAware:
    """``rules.ConflictAware``, one group and one peer at a time."""

    rule: ConflictAware

    def __call__(self, given: Given) -> list[float]:
        known = {m: e for m, e in enumerate(given.errors or []) if e is not None}
        members = [m for m, acts in enumerate(given.active) if acts and (m in known or not known)]
        coefficients = [1.0] * len(given.shares)
        for m in members if len(members) > 1 else []:
            peers = [k for k in members if k != m]
            coefficients[m] = self.penalty(m, peers, given.shares, known)
            if known:
                coefficients[m] *= self.modulation(m, peers, known)
        return coefficients

    def penalty(self, m: int, peers: list[int], shares: Floats, errors: dict[int, float]) -> float:
        conflicts = [
            shares[m] > self.rule.threshold * shares[k] and (not errors or errors[m] < errors[k])
            for k in peers
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


def useful_coefficients(
    useful: Floats,
    useful_errors: Sequence[float],
    coherences: Floats,
    coherence_errors: Sequence[float],
    shares: Sequence[float],
    norms: Sequence[float],
    scale_free: bool,
    *,
    rates: Sequence[float] | None = None,
    most: float = 10.0,
    limit: float = 20.0,
) -> list[float]:
    """``rules.Useful``, one pair of groups at a time; its defaults written once more."""
    known = []
    for m in range(len(useful)):
        values = useful[m], useful_errors[m], coherences[m], coherence_errors[m]
        if all(value is not None and math.isfinite(value) for value in values):
            known.append(m)

    def beside(k: int, m: int, values: Floats, errors: Sequence[float]) -> float:
        """How large the value of k is beside that of m, as far as it can be told from chance."""
        large, small = max(values[m], 0.0), max(values[k], 0.0)
        difference = large - small
        variance = errors[m] ** 2 + errors[k] ** 2
        if difference <= 0 or difference**2 <= variance:
            return 1.0
        return 1 - (difference - variance / difference) / large

    def clearer(m: int, k: int) -> float:
        ratio = beside(k, m, coherences, coherence_errors)
        return 1e300 if ratio < 1e-150 else 1 / ratio**2

    def slower(k: int, m: int) -> float:
        a_k, a_m = max(coherences[k], 0.0), max(coherences[m], 0.0)
        highest = min(1.0, a_k + math.hypot(coherence_errors[k], coherence_errors[m]))
        spared = max(1.0, highest / max(a_m, 1e-150)) ** 2
        if rates is not None and rates[k] > rates[m]:
            spared *= math.inf if rates[m] == 0 else (rates[k] / rates[m]) ** 2
        spared = min(spared, 1e300)
        ratio = beside(k, m, useful, useful_errors)
        return min(max(ratio * spared, 1 / most), 1.0)

    def further(m: int, k: int) -> float:
        longer = max(1.0, shares[k] / shares[m])
        ratio = clearer(m, k)
        return min(ratio, longer, most) * longer ** min(1.0, math.log2(ratio))

    coefficients = [1.0] * len(useful)
    if scale_free:
        for k in known:
            coefficients[k] = min(slower(k, m) for m in known)
    elif known:
        x = {m: max(further(m, k) for k in known) for m in known}
        longest = max(shares[m] for m in known) / max(x[m] * shares[m] for m in known)
        now = max(norms[m] for m in known)
        for m in known:
            coefficients[m] = min(x[m] * longest, limit)
            if norms[m] == 0:
                coefficients[m] = min(coefficients[m], 1.0)
            elif coefficients[m] * norms[m] > now:
                coefficients[m] = now / norms[m]
    return coefficients


def ogm_coefficients(errors: Floats | None, active: Sequence[bool], alpha: float) -> list[float]:
    """``rules.OGM``, one group at a time."""
    coefficients = [1.0] * len(active)
    known = errors or [None] * len(active)
    scores = {m: 1 - e for m, e in enumerate(known) if e is not None and active[m]}
    for m in scores:
        others = [score for k, score in scores.items() if k != m]
        if not others:
            continue
        mean = math.fsum(others) / len(others)
        if mean > 0:
            ratio = scores[m] / mean
        elif scores[m] > 0:
            ratio = math.inf
        else:
            ratio = 1.0
        if ratio > 1 + DEAD_BAND:
            coefficients[m] = 1 - math.tanh(alpha * ratio)
    return coefficients


def epochwise_coefficients(errors: Floats, lead: float, factor: float) -> list[float]:
    """``rules.Epochwise``, one pair of groups at a time."""
    used = {m: 1 - e for m, e in enumerate(errors) if e is not None}
    coefficients = [1.0] * len(errors)
    for m in used:
        for k in used:
            if used[m] - used[k] > lead:
                coefficients[m] = factor
    return coefficients


def clipped(gradients: Sequence[Sequence[float]], most: float) -> list[list[float]]:
    """``rules.ClipGroups`` on the gradients themselves."""
    results = []
    for gradient in gradients:
        norm = math.sqrt(math.fsum(g * g for g in gradient))
        results.append([g * most / norm if norm > most else g for g in gradient])
    return results
