"""Gradient balancing between the branches of a model, for any PyTorch optimizer."""

from gradbalance._groups import groups_by_name
from gradbalance._memory import Balance
from gradbalance._moments import Moments, StatisticalLoss, moments, statistical_loss
from gradbalance._optimizer import ConflictAwarePenalty
from gradbalance._penalty import attach
from gradbalance._record import Recorder
from gradbalance._settings import PAPER

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
