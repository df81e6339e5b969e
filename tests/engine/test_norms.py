"""Norms, and what is written into gradients: scaling, clipping, noise."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gradbalance import ConflictAwarePenalty, attach
from gradbalance.rules import ByHand, Watch
from tests.engine.models import (
    backward,
    conflict_aware,
    equal,
    fixed_gradients,
    gradients,
    groups_of,
    penalised,
    slow_norm,
)

each_mode = pytest.mark.parametrize("mode", ["update", "gradient"])
# With the coherence of a small model its norms are read from the sketch.
each_reading = pytest.mark.parametrize(
    "rule", [Watch(), conflict_aware()["rule"]], ids=["from the sketch", "alone"]
)
LARGE = 1 << 18  # larger tensors are read in parts on the host


def measured_norms(*groups, rule=None, gradient=None):
    """The norms of groups of parameters after one step, by order."""
    if gradient is not None:
        for p in (p for group in groups for p in group):
            p.grad = gradient(p)
    named = {f"group {i}": group for i, group in enumerate(groups)}
    members = [p for group in groups for p in group]
    penalty = attach(torch.optim.SGD(members, lr=0.0), named, rule or conflict_aware()["rule"])
    optimizer_step(members, penalty)
    return penalty.balance.norms.tolist()


def optimizer_step(members, penalty):
    penalty._stepper().step()


def zeros(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))
