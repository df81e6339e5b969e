"""Gradient balancing between the branches of a model, for any PyTorch optimizer."""

from gradbalance._groups import groups_by_name
from gradbalance._optimizer import ConflictAwarePenalty
from gradbalance._penalty import Balance, attach
from gradbalance._rule import PAPER

__all__ = [
    "PAPER",
    "Balance",
    "ConflictAwarePenalty",
    "attach",
    "groups_by_name",
]
