"""Moments of masked samples, and a loss that matches them.

``loss`` compares; ``ranks`` merges the batches of all ranks; ``statistics`` checks, and takes one of two ways to the
same numbers: ``plain`` for few samples, ``one_pass`` for many, with ``triton_kernel`` where asked for.
"""

from gradbalance._moments.loss import StatisticalLoss, statistical_loss
from gradbalance._moments.statistics import Moments, moments

__all__ = ["Moments", "StatisticalLoss", "moments", "statistical_loss"]
