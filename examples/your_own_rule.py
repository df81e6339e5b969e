"""A rule of your own in ten lines: whoever has reduced its error most since the start moves least, as in GradNorm.

A rule is a function from what was measured to a coefficient for each branch; skipped steps, mixed precision, sharding
and recording come with it. This one also remembers something, which goes into the optimizer's checkpoint.

Run ``python examples/your_own_rule.py``.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss

from gradbalance import ConflictAwarePenalty
from gradbalance.rules import Measured


class TrainingRate:
    """The error that is left of a branch's first one, over the mean of all branches; at most 3."""

    needs_coherence = False  # not measured then, and free

    def __init__(self) -> None:
        self.first: np.ndarray | None = None

    def __call__(self, measured: Measured) -> np.ndarray:
        if measured.errors is None:  # none observed yet
            return np.ones(len(measured.names))
        if self.first is None:
            self.first = measured.errors
        left = measured.errors / self.first  # 1 at the start, 0 at the end
        factors = np.minimum(left / np.nanmean(left), 3.0)
        return np.nan_to_num(factors, nan=1.0)  # a branch that is not observed keeps its step

    def state_dict(self) -> dict[str, list[float] | None]:
        return {"first": None if self.first is None else self.first.tolist()}

    def load_state_dict(self, state: dict[str, list[float] | None]) -> None:
        self.first = None if state["first"] is None else np.array(state["first"])


def main(steps: int = 100) -> dict[str, float]:
    """Train; the coefficients of the last step."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"audio": nn.Linear(20, 1), "visual": nn.Linear(5, 1)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = ConflictAwarePenalty(optimizer, dict(model.items()), rule=TrainingRate())
    for _ in range(steps):
        audio, visual = torch.randn(16, 20), torch.randn(16, 5)
        target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
        heard, seen = model["audio"](audio), model["visual"](visual)
        optimizer.zero_grad()
        mse_loss(heard + seen, target).backward()
        optimizer.observe(audio=mse_loss(heard, target), visual=mse_loss(seen, target))
        optimizer.step()
    return optimizer.coefficients()


if __name__ == "__main__":
    print(main())
