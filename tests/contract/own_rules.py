"""The rules that the contract is checked with, each beside its slow twin in Python floats.

Not the default's options: these tests are about optimizers, and the rules here act at every step.
"""

import numpy as np

from gradbalance.rules import ConflictAware
from tests.reference import SlowConflictAware


def conflicts():
    return ConflictAware(alpha=1.0, eta=0.1, threshold=3.0, centred=True)


class ByCoherence:
    """A rule that reads coherences alone: up to three times the step for gradients that repeat, none for reversals."""

    def __call__(self, measured):
        return np.nan_to_num(1.5 * (1 + measured.coherences), nan=1.0)


class Tiring:
    """A rule with a memory that the library does not know: the more a branch has dominated, the less it moves."""

    needs_coherence = False

    def __init__(self):
        self.load = {}

    def __call__(self, measured):
        for name, share in zip(
            measured.names, np.nan_to_num(measured.shares).tolist(), strict=True
        ):
            self.load[name] = 0.5 * self.load.get(name, 0.0) + share
        return [1 / (1 + self.load[name]) for name in measured.names]

    def state_dict(self):
        return dict(self.load)

    def load_state_dict(self, state):
        self.load = dict(state)


def conflicts_by_hand():
    return SlowConflictAware(conflicts())


def by_coherence_by_hand():
    return lambda given: [1.0 if a is None else 1.5 * (1 + a) for a in given.coherences]


def tiring_by_hand():
    load = {}

    def decide(given):
        for m, share in enumerate(given.shares):
            load[m] = 0.5 * load.get(m, 0.0) + (share or 0.0)
        return [1 / (1 + load[m]) for m in range(len(given.shares))]

    return decide


RULES = {
    "conflicts": (conflicts, conflicts_by_hand),
    "coherence": (ByCoherence, by_coherence_by_hand),
    "own": (Tiring, tiring_by_hand),
}
