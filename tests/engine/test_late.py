"""When a step is decided: from its own reading, or from that of the step before (SPEC 1.2)."""

import copy
import math

import numpy as np
import pytest
import torch

from gradbalance import Balance
from gradbalance.rules import ByHand, ConflictAware, Useful, Watch
from tests.engine.models import (
    TwoBranches,
    backward,
    equal,
    fixed_gradients,
    gradients,
    groups_of,
    parameters,
    penalised,
    train,
)
from tests.engine.own_rules import Slower, inverse_share

RULES = {
    "Useful": Useful,
    "ConflictAware": ConflictAware,
    "function": lambda: inverse_share,
    "stateful": Slower,
}
each_rule = pytest.mark.parametrize("make_rule", RULES.values(), ids=RULES)
each_way = pytest.mark.parametrize(
    ("make", "mode"),
    [
        (torch.optim.SGD, "update"),
        (torch.optim.AdamW, "update"),
        (torch.optim.Rprop, "update"),
        (torch.optim.SGD, "gradient"),
    ],
    ids=["SGD", "AdamW", "displacement", "gradient"],
)
STEPS = 8
ONES = {"text": 1.0, "audio": 1.0}


def run(model, optimizer, steps, observes=True):
    """Steps on gradients that do not depend on the parameters; the coefficients of each."""
    seen = []
    for step in steps:
        if observes and step % 2 == 0:
            optimizer.observe(text=0.5 + step % 3, audio=1.25)
        seen += train(model, optimizer, [step], fixed_gradients)
    return seen


@each_rule
@each_way
@pytest.mark.parametrize("every", [1, 3])
def test_late_a_step_has_the_coefficients_of_the_step_before(model, make_rule, make, mode, every):
    other, steps = copy.deepcopy(model), every * STEPS
    options = {"apply_to": mode, "every": every, "smoothing": 0.9}
    direct = run(model, penalised(model, make_rule(), make, **options), range(steps))
    late = run(other, penalised(other, make_rule(), make, late=True, **options), range(steps))
    assert late[0] == ONES
    assert late[1:] == direct[:-1]
    assert any(c != ONES for c in direct)


@each_way
def test_late_the_parameters_move_by_the_coefficients_that_are_shown(model, make, mode):
    plain = copy.deepcopy(model)
    optimizer = penalised(model, Slower(), make, apply_to=mode, late=True)
    reference = make(plain.parameters(), lr=0.05)
    for step in range(4):
        start, reference_start = parameters(model.text), parameters(plain.text)
        run(model, optimizer, [step])
        train(plain, reference, [step], fixed_gradients)
        c = optimizer.coefficients()["text"]
        assert c == [1.0, 0.5, 0.25, 0.125][step]
        ends = zip(
            model.text.parameters(), start, plain.text.parameters(), reference_start, strict=True
        )
        for p, before, q, reference_before in ends:
            moved, expected = p.detach() - before, c * (q.detach() - reference_before)
            torch.testing.assert_close(moved, expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@each_way
def test_constants_apply_from_the_first_step_on(model, make, mode, late):
    seen = run(model, penalised(model, ByHand(text=0.25), make, apply_to=mode, late=late), range(3))
    assert seen == [{"text": 0.25, "audio": 1.0}] * 3


def test_late_a_constant_rule_is_still_held_back_outside_the_window(model):
    optimizer = penalised(model, ByHand(text=0.25), late=True, window=(1, 2))
    assert [c["text"] for c in run(model, optimizer, range(3))] == [1.0, 0.25, 1.0]


@pytest.mark.parametrize("late", [None, False])
def test_on_the_host_a_step_is_decided_from_its_own_gradients(model, late):
    optimizer = penalised(model, inverse_share, smoothing=0.0, late=late)
    run(model, optimizer, [0])
    expected = optimizer.balance.shares.min() / optimizer.balance.shares
    assert list(optimizer.coefficients().values()) == pytest.approx(expected.tolist())
    assert optimizer.coefficients() != ONES


@each_rule
def test_late_the_measurements_shown_are_those_of_the_step_before(model, make_rule):
    other = copy.deepcopy(model)
    direct = penalised(model, make_rule(), smoothing=0.5)
    late = penalised(other, make_rule(), smoothing=0.5, late=True)
    for step in range(5):
        before = direct.balance
        run(model, direct, [step])
        run(other, late, [step])
        for name in Balance._fields[1:-1]:
            if name not in ("coefficients", "proposed"):
                one, shifted = getattr(before, name), getattr(late.balance, name)
                assert np.array_equal(shifted, one, equal_nan=True), name


@each_rule
@each_way
@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpoint_in_the_middle_of_a_late_run_resumes_bitwise(
    model, make_rule, make, mode, every
):
    options = {"apply_to": mode, "every": every, "late": True}
    optimizer = penalised(model, make_rule(), make, **options)
    train(model, optimizer, range(5))
    resumed = copy.deepcopy(model)
    other = penalised(resumed, make_rule(), make, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, range(5, 9)) == train(resumed, other, range(5, 9))
    assert equal(parameters(model), parameters(resumed))


def test_a_checkpoint_of_a_late_run_holds_what_the_next_step_will_know(model):
    """So a run that is direct from there on has lost nothing."""
    other = copy.deepcopy(model)
    late, direct = penalised(model, Slower(), late=True), penalised(other, Slower())
    run(model, late, range(3))
    assert late.balance.step == 2
    direct.load_state_dict(late.state_dict())
    assert direct.balance.step == late.balance.step == 3


def test_late_a_step_that_does_not_count_is_passed_over(model):
    optimizer = penalised(model, Slower(), late=True)
    seen = []
    for step in range(5):
        fixed_gradients(model, step)
        if step == 1:
            model.head.bias.grad.zero_()
            model.text.bias.grad[0] = math.inf
        optimizer.step()
        seen.append(optimizer.coefficients()["text"])
    assert seen == [1.0, 0.5, 0.5, 0.25, 0.125]
    assert optimizer.balance.step == 3


def test_late_a_group_without_a_gradient_has_a_coefficient_of_one(model):
    optimizer = penalised(model, ByHand(text=0.25), late=True)
    run(model, optimizer, range(2))
    fixed_gradients(model, 2)
    for p in model.text.parameters():
        p.grad = None
    optimizer.step()
    assert optimizer.coefficients() == ONES


def test_late_a_wrong_answer_is_an_error_at_the_next_step(model):
    optimizer = penalised(model, lambda m: [-1.0, 1.0], late=True)
    run(model, optimizer, [0])
    fixed_gradients(model, 1)
    before, given = parameters(model), gradients(model)
    with pytest.raises(
        ValueError, match=r"must return finite coefficients >= 0 .*Got \[-1.0, 1.0\]"
    ):
        optimizer.step()
    assert equal(parameters(model), before)
    assert equal(gradients(model), given)


@each_way
def test_a_late_run_is_repeatable(make, mode):
    ends = []
    for _ in range(2):
        model = TwoBranches()
        train(model, penalised(model, Useful(), make, apply_to=mode, late=True), range(STEPS))
        ends.append(parameters(model))
    assert equal(*ends)


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_clipping_is_never_late(model, mode, max_norm, late):
    optimizer = penalised(model, Slower(), apply_to=mode, max_norm=max_norm, late=late)
    for step in range(3):
        fixed_gradients(model, step)
        expected = copy.deepcopy(model)
        for p, q in zip(expected.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        if mode == "gradient":
            for name, module in groups_of(expected).items():
                for p in module.parameters():
                    p.grad *= optimizer.coefficients()[name]
        torch.nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_between_two_measurements_the_coefficients_are_kept(model):
    rule = Slower()
    seen = train(model, penalised(model, rule, every=3), range(7))
    assert [c["text"] for c in seen] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert rule.calls == 3


def test_watching_late_is_bitwise_the_plain_optimizer(model):
    plain = TwoBranches()
    train(model, penalised(model, Watch(Useful()), late=True), range(5))
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), range(5))
    backward(model)
    assert equal(parameters(model), parameters(plain))
