"""Rules as a user writes them."""

import numpy as np


def inverse_share(measured):
    return np.nan_to_num(measured.shares, nan=1.0).min() / np.nan_to_num(measured.shares, nan=1.0)


def spy(given, factor=0.5):
    """A rule that keeps what it is given, and a constant for all groups."""

    def rule(measured):
        given.append(measured)
        return np.full(len(measured.names), factor)

    return rule


class Slower:
    """A stateful rule of ten lines: every group half as fast at each step that counts, down to a tenth."""

    needs_coherence = False

    def __init__(self):
        self.calls = 0

    def __call__(self, measured):
        self.calls += 1
        return [max(0.1, 0.5**self.calls)] * len(measured.names)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]
