"""Gradient balancing between the branches of a model, for any PyTorch optimizer."""

from gradbalance._groups import groups_by_name
from gradbalance._memory import Balance
from gradbalance._moments import Moments, moments
from gradbalance._optimizer import ConflictAwarePenalty
from gradbalance._penalty import attach
from gradbalance._recorder import Recorder
from gradbalance._settings import PAPER
from gradbalance._statistical import StatisticalLoss, statistical_loss

__all__ = [
    "PAPER",
    "Balance",
    "ConflictAwarePenalty",
    "Moments",
    "Recorder",
    "StatisticalLoss",
    "attach",
    "groups_by_name",
    "moments",
    "statistical_loss",
]
