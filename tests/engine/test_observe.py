"""Observed errors: what counts at the next step, and how long."""

import pytest
import torch

from gradbalance import attach
from gradbalance.rules import ConflictAware
from tests.engine.models import backward, groups_of


def penalty_on(model, smoothing=0.0, rule=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, attach(optimizer, groups_of(model), rule or ConflictAware(), smoothing=smoothing)


def test_errors_count_with_their_mean_since_the_last_step(model):
    optimizer, penalty = penalty_on(model)
    penalty.observe(text=1.0, audio=3.0)
    penalty.observe(text=2.0, audio=5.0)
    backward(model)
    optimizer.step()
    assert penalty.balance.errors.tolist() == [1.5, 4.0]
    penalty.observe(text=0.0, audio=0.5)
    backward(model)
    optimizer.step()
    assert penalty.balance.errors.tolist() == [0.0, 0.5]


def test_an_observed_tensor_is_detached_and_may_have_any_shape_of_one_element(model):
    optimizer, penalty = penalty_on(model)
    error = model.text.weight.square().mean().reshape(1, 1)
    penalty.observe(text=error, audio=torch.tensor(2, dtype=torch.int64))
    backward(model)
    optimizer.step()
    assert penalty.balance.errors.tolist() == pytest.approx([error.item(), 2.0])
    assert not penalty.balance.errors.requires_grad


def test_a_negative_error_that_is_not_read_makes_the_step_not_count(model, off_host):
    optimizer, penalty = penalty_on(model, smoothing=0.5)
    for error, steps in ((0.0, 1), (-0.5, 1), (0.5, 2)):
        penalty.observe(text=torch.tensor(error), audio=1.0)
        backward(model)
        optimizer.step()
        assert penalty.balance.step == steps
    assert penalty.balance.errors.tolist() == [0.25, 1.0]


def test_errors_are_given_to_the_rule_only_once_there_were_any(model):
    given = []

    def rule(measured):
        given.append(None if measured.errors is None else measured.errors.tolist())
        return torch.ones_like(measured.norms)

    optimizer, penalty = penalty_on(model, rule=rule)
    for step in range(3):
        if step == 1:
            penalty.observe(text=1.0, audio=2.0)
        backward(model, step)
        optimizer.step()
    assert given == [None, [1.0, 2.0], [1.0, 2.0]]
