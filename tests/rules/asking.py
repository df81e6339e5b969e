"""A rule asked through the engine's own means, with nothing but small tensors."""

import math

import torch

from gradbalance._engine.ask import ask_on_host
from gradbalance._engine.ask_on_device import ask_on_device
from gradbalance._engine.state import State
from gradbalance._gradients.meter import Reading

NAMES = ("text", "audio", "visual", "depth", "touch", "smell")


class Asked:
    """A rule that is asked step after step: what the engine does between the gradients and the coefficients."""

    def __init__(self, rule, n, smoothing=0.0, window=None, scale_free=True):
        self.rule, self.state = rule, State(NAMES[:n])
        self.options = {"smoothing": smoothing, "window": window, "scale_free": scale_free, "fresh": True}

    def step(self, norms, errors=None, cosines=None):
        """The coefficients of a step as a tensor; None for an error or a cosine that there is not."""
        if errors is not None:
            errors = tensor([-1.0 if e is None else e for e in errors])
        if cosines is not None:
            cosines = tensor([math.nan if c is None else c for c in cosines])
        ask = ask_on_host if self.state.on_host else ask_on_device
        ask(self.rule, self.state, Reading(tensor(norms), cosines, errors), **self.options)
        return self.state.balance.coefficients


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)
