"""The rules that the contract is checked with, each beside its slow twin in Python floats.

Not the default's options: these tests are about optimizers, and the rules here act at every step.
"""

import torch

from gradbalance.rules import ConflictAware
from tests.reference import SlowConflictAware


def conflicts():
    return ConflictAware(alpha=1.0, eta=0.1, threshold=3.0, centred=True)


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
    return SlowConflictAware(conflicts())


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
