"""Gradient balancing between the branches of a model, for any PyTorch optimizer, in two lines.

One step, and where it happens::

    optimizer.step()
      _optimizer/hooks       once the gradients are complete, however the step is called
      _step/engine           measure, decide, act:
        _step/gradients        which gradients there are
        _step/sketch           how much they agree with the last ones
        _step/measure          norms over all shards and ranks, and their way to the host
        _step/state            running means, and the rule
        rules/                 what was measured in, a coefficient for each group out
        _step/write            scales, clips and perturbs gradients, or
        _optimizer/scaling     scales the learning rate, or rescales the finished update
      recorder               is told the balance

``statistics`` holds the other half, a loss that aligns statistics of distributions.
"""

from gradbalance import rules
from gradbalance.balance import Balance
from gradbalance.groups import groups_by_name
from gradbalance.penalty import PAPER, ConflictAwarePenalty, Penalty, attach
from gradbalance.recorder import Recorder
from gradbalance.statistics import Moments, StatisticalLoss, moments, statistical_loss

__all__ = [
    "PAPER",
    "Balance",
    "ConflictAwarePenalty",
    "Moments",
    "Penalty",
    "Recorder",
    "StatisticalLoss",
    "attach",
    "groups_by_name",
    "moments",
    "rules",
    "statistical_loss",
]
