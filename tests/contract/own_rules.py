"""The rules that the contract is checked with, each beside its slow twin in Python floats.

Not the default's options: these tests are about optimizers, and the rules here act at every step.
"""

import math

import torch

from gradbalance.rules import ConflictAware

ETA, THRESHOLD = 0.1, 3.0


def conflicts():
    return ConflictAware(alpha=1.0, eta=ETA, threshold=THRESHOLD, centred=True)


class ByCoherence:
    """A rule that reads coherences alone: up to three times the step for gradients that repeat, none for reversals."""

    def __call__(self, measured):
        return (1.5 * (1 + measured.coherences)).nan_to_num(nan=1.0)


class Tiring:
    """A rule with a memory that the library does not know: the more a branch has dominated, the less it moves."""

    needs_coherence = False

    def __init__(self):
        self.load = {}

    def __call__(self, measured):
        for name, share in zip(measured.names, measured.shares.nan_to_num(), strict=True):
            self.load[name] = 0.5 * self.load.get(name, 0.0) + share
        return 1 / (1 + torch.stack([self.load[name] for name in measured.names]))

    def state_dict(self):
        return {name: load.item() for name, load in self.load.items()}

    def load_state_dict(self, state):
        self.load = {name: torch.tensor(load, dtype=torch.float64) for name, load in state.items()}


def conflicts_by_hand():
    """ConflictAware with ``alpha=1`` and ``centred=True`` as loops."""

    def decide(shares, coherences, errors, active):
        watched = active
        if errors is not None and any(e is not None for e in errors):
            watched = [m for m in active if errors[m] is not None]
        else:
            errors = None
        coefficients = [1.0] * len(shares)
        for m in watched:
            peers = [k for k in watched if k != m]
            if not peers:
                continue
            beaten = [
                k
                for k in peers
                if shares[m] > THRESHOLD * shares[k] and (errors is None or errors[m] < errors[k])
            ]
            coefficients[m] = ETA ** (len(beaten) / len(peers))
            if errors is not None:
                scores = {k: 1 / (errors[k] + 1e-8) for k in watched}
                lead = scores[m] / (sum(scores[k] for k in peers) / len(peers))
                coefficients[m] *= 1 - math.tanh(lead - 1) if lead > 1 + 1e-6 else 1.0
        return coefficients

    return decide


def by_coherence_by_hand():
    return lambda shares, coherences, errors, active: [1.0 if a is None else 1.5 * (1 + a) for a in coherences]


def tiring_by_hand():
    load = {}

    def decide(shares, coherences, errors, active):
        for m, share in enumerate(shares):
            load[m] = 0.5 * load.get(m, 0.0) + (share or 0.0)
        return [1 / (1 + load[m]) for m in range(len(shares))]

    return decide


RULES = {
    "conflicts": (conflicts, conflicts_by_hand),
    "coherence": (ByCoherence, by_coherence_by_hand),
    "own": (Tiring, tiring_by_hand),
}
