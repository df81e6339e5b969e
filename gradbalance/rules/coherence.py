"""The default rule: a branch moves as far as its gradients agree from step to step, not as far as they are large."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbalance.rules.base import Measured


@dataclass(frozen=True)
class Coherence:
    r"""Raise the branches whose gradients are coherent above those whose gradients are mostly noise [R].

    Args:
        most: The largest coefficient where a step is as long however large the gradient, >= 1.
        floor: Coherence of the most coherent branch below which all are noise, in (0, 1).

    Example:
        >>> rule = Coherence()
    """

    most: float = 3.0
    floor: float = 0.08

    def __call__(self, measured: Measured) -> Tensor:
        """The coefficients, shape ``[N]``."""
        assert measured.coherences is not None
        a = torch.where(measured.active, measured.coherences, torch.nan)
        known = ~a.isnan()
        top = a.nan_to_num(nan=0.0).amax()
        a = a.clamp(min=0) / top
        a = a.clamp(min=1 / 20)
        least = a.nan_to_num(nan=2.0).amin()
        c = torch.where(known, (a / least).clamp(max=self.most), 1.0)
        return torch.where(top < self.floor, measured.coefficients, c)
