"""Moments of masked samples, and a loss that matches them.

``loss`` compares; ``masked`` checks, arranges the axes and standardises; ``_central`` computes, or
has ``_triton`` compute where asked to; ``_ranks`` merges the batches of all ranks.
"""

from gradbalance.statistics.loss import StatisticalLoss, statistical_loss
from gradbalance.statistics.masked import Moments, moments

__all__ = ["Moments", "StatisticalLoss", "moments", "statistical_loss"]
