"""Observed errors: what counts at the next step, and how long."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from gradbalance import attach
from gradbalance.rules import ByHand, ConflictAware, Watch
from tests.engine.models import backward, groups_of
from tests.rules.asking import Asked


def penalty_on(model, smoothing=0.0, rule=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = rule or ConflictAware()
    return optimizer, attach(optimizer, groups_of(model), rule, smoothing=smoothing, **options)


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


def test_between_two_measurements_the_errors_are_gathered(model):
    optimizer, penalty = penalty_on(model, every=3)
    for step in range(4):
        penalty.observe(text=1.0 + step, audio=2.0)
        backward(model, step)
        optimizer.step()
        assert penalty.balance.errors[0] == (1.0 if step < 3 else (2.0 + 3.0 + 4.0) / 3)


def test_errors_stay_in_force_until_the_next_call(model):
    optimizer, penalty = penalty_on(model, smoothing=0.5)
    penalty.observe(text=1.0, audio=3.0)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        assert penalty.balance.errors.tolist() == [1.0, 3.0]


def test_a_group_that_is_left_out_of_a_call_is_not_observed_any_more():
    asked = Asked(Watch(), 3, smoothing=0.5)
    asked.step([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    asked.step([1.0, 1.0, 1.0], [2.0, None, 3.0])
    np.testing.assert_array_equal(asked.penalty.balance.errors, [1.5, np.nan, 3.0])


@pytest.mark.parametrize(
    "number",
    [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), Fraction(1, 2), torch.tensor(0.5),
     torch.tensor([[0.5]], dtype=torch.float64), torch.tensor(0.5, dtype=torch.bfloat16)],
    ids=repr,
)  # fmt: skip
def test_an_error_is_any_real_number_or_tensor_of_one_element(model, number):
    optimizer, penalty = penalty_on(model)
    penalty.observe(text=number, audio=torch.tensor(2, dtype=torch.int64))
    backward(model)
    optimizer.step()
    assert penalty.balance.errors.tolist() == [0.5, 2.0]


def test_an_observed_tensor_is_detached_and_may_change_afterwards(model):
    optimizer, penalty = penalty_on(model)
    error = model.text.weight.square().mean()
    expected = error.item()
    penalty.observe(text=error, audio=2.0)
    with torch.no_grad():
        error.mul_(0)
    backward(model)
    optimizer.step()
    assert penalty.balance.errors.tolist() == pytest.approx([expected, 2.0])


def test_errors_are_given_to_the_rule_only_once_there_were_any(model):
    given = []

    def rule(measured):
        given.append(None if measured.errors is None else measured.errors.tolist())
        return np.ones(2)

    optimizer, penalty = penalty_on(model, rule=rule)
    for step in range(3):
        if step == 1:
            penalty.observe(text=1.0, audio=2.0)
        backward(model, step)
        optimizer.step()
    assert given == [None, [1.0, 2.0], [1.0, 2.0]]


def test_groups_may_have_the_names_of_arguments():
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("model", "self", "errors")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = ByHand(self=0.5, model=0.25)
    penalty = attach(optimizer, dict(model), rule, noise={"self": 0.0})
    penalty.observe(self=1.0, model=2.0, errors=3.0)
    sum(branch(torch.ones(1, 1)).square().sum() for branch in model.values()).backward()
    optimizer.step()
    assert penalty.coefficients() == {"model": 0.25, "self": 0.5, "errors": 1.0}
    assert penalty.balance.errors.tolist() == [2.0, 1.0, 3.0]
