"""A rule at work on tiny parameters whose gradients have given norms and cosines."""

import math

import numpy as np
import torch

from gradbalance import attach

NAMES = ("text", "audio", "visual", "depth", "touch", "smell")


class Asked:
    """A penalty on parameters of two entries each; their gradients turn by the angle that gives a cosine."""

    def __init__(
        self, rule, n, smoothing=0.0, window=None, scale_free=True, names=NAMES, **options
    ):
        self.parameters = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(n)]
        self.angles = [0.0] * n
        make = torch.optim.AdamW if scale_free else torch.optim.SGD
        self.optimizer = make(self.parameters, lr=0.0)
        self.names = names[:n]
        groups = {name: [p] for name, p in zip(self.names, self.parameters, strict=True)}
        self.penalty = attach(
            self.optimizer, groups, rule, smoothing=smoothing, window=window, **options
        )

    def step(self, norms, errors=None, cosines=None):
        """The coefficients of a step as an array; None for an error that there is not, cosines are 1 if not given."""
        if errors is not None:
            self.penalty.observe(
                **{name: e for name, e in zip(self.names, errors, strict=True) if e is not None}
            )
        for m, (p, norm) in enumerate(zip(self.parameters, norms, strict=True)):
            if cosines is not None and math.isfinite(norm) and norm > 0:
                self.angles[m] += math.acos(cosines[m])
            direction = torch.tensor(
                [math.cos(self.angles[m]), math.sin(self.angles[m])], dtype=torch.float64
            )
            p.grad = norm * direction
        self.optimizer.step()
        return np.array(list(self.penalty.coefficients().values()))
