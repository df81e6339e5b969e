"""The learning rates that a rule is told."""

import math

import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.ones(3)) for _ in range(4)]


def told(optimizer, groups, steps=1, after=lambda: None, apply_to="learning_rate"):
    """The rates that a rule sees at each step."""
    seen = []

    def rule(measured):
        seen.append(measured.rates if measured.rates is None else measured.rates.tolist())
        return [0.5] * len(groups)

    rule.needs_coherence = False
    wrapped = ConflictAwarePenalty(optimizer, groups, rule, apply_to=apply_to)
    for _ in range(steps):
        for members in groups.values():
            for p in members:
                p.grad = torch.ones_like(p)
        wrapped.step()
        after()
    return seen, wrapped


def test_each_group_has_the_largest_rate_of_its_param_groups(parameters):
    a, b, c, d = parameters
    optimizer = torch.optim.AdamW(
        [{"params": [a], "lr": 1e-4}, {"params": [b, c], "lr": 1e-3}, {"params": [d], "lr": 1e-2}]
    )
    seen, _ = told(optimizer, {"first": [a, b], "second": [c], "third": [d]})
    assert seen == [[1e-3, 1e-3, 1e-2]]


def test_a_schedule_is_followed_and_what_the_penalty_did_to_the_rate_is_not_seen(parameters):
    a, b, *_ = parameters
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 0.25}, {"params": [b], "lr": 0.5}])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen, _ = told(optimizer, {"a": [a], "b": [b]}, steps=3, after=scheduler.step)
    assert seen == [[0.25, 0.5], [0.125, 0.25], [0.0625, 0.125]]


def test_a_rate_in_a_tensor_on_the_host_is_read(parameters):
    a, b, *_ = parameters
    rates = [{"params": [a], "lr": torch.tensor(0.25)}, {"params": [b], "lr": torch.tensor(0.5)}]
    seen, _ = told(torch.optim.AdamW(rates), {"a": [a], "b": [b]})
    assert seen == [[0.25, 0.5]]


def test_frozen_parameters_do_not_count(parameters):
    a, b, c, _ = parameters
    b.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [a], "lr": 0.25}, {"params": [b], "lr": 0.5}, {"params": [c], "lr": 0.125}]
    )
    seen, _ = told(optimizer, {"ab": [a, b], "c": [c]})
    assert seen == [[0.25, 0.125]]


def test_without_a_rate_it_is_not_known(parameters):
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= 0.1 * p.grad.sign()

    a, b, *_ = parameters
    optimizer = NoRate([{"params": [a]}, {"params": [b]}])
    seen, _ = told(optimizer, {"a": [a], "b": [b]}, apply_to="displacement")
    assert all(map(math.isnan, seen[0]))


def test_norms_from_elsewhere_have_no_rates(parameters):
    a, b, *_ = parameters
    seen, wrapped = told(torch.optim.AdamW([a, b]), {"a": [a], "b": [b]}, steps=0)
    wrapped.coefficients_for({"a": 1.0, "b": 2.0})
    assert seen == [None]
