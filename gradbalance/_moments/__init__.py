"""Moments of masked samples, and a loss that matches them."""

from gradbalance._moments.loss import StatisticalLoss, statistical_loss
from gradbalance._moments.statistics import Moments, moments

__all__ = ["Moments", "StatisticalLoss", "moments", "statistical_loss"]
