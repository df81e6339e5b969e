"""Gradient balancing between the branches of a model, for any PyTorch optimizer, in two lines.

One step, and where it happens::

    optimizer.step()
      _torch/hooks           once the gradients are there, and however step is called
      _engine/engine         measure, ask, act:
        _gradients/meter       reads norms and coherence of each branch, over all devices and ranks
        _engine/ask            turns them into running means, and asks the rule (on a GPU: _engine/ask_on_device)
        rules/                 what was measured in, a coefficient for each branch out: yours, or one of these
        _gradients/write       scales the gradients, clips and adds noise, or
        _torch/learning_rates  scales the step by the learning rate, or
        _torch/displacement    after the fact, where the step does not follow one
      _record/recorder       hears of the balance

``_moments`` holds the other half, the loss that aligns statistics.
"""

from gradbalance import rules
from gradbalance._engine.by_name import groups_by_name
from gradbalance._engine.optimizer import ConflictAwarePenalty
from gradbalance._engine.options import PAPER
from gradbalance._engine.penalty import Penalty, attach
from gradbalance._engine.state import Balance
from gradbalance._moments import Moments, StatisticalLoss, moments, statistical_loss
from gradbalance._record import Recorder

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
