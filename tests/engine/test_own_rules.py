"""Rules of the user: what they are given, what they may answer, and when they are called."""

import numpy as np
import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, attach
from gradbalance.rules import ByHand, ConflictAware, Useful, Watch
from tests.engine.models import (
    TwoBranches,
    backward,
    equal,
    groups_of,
    parameters,
    penalised,
    slow_norm,
    train,
)
from tests.engine.own_rules import Slower, inverse_share, spy

TOLD = [[False, True], [True, False]]


def test_a_plain_function_is_a_rule(model):
    optimizer = penalised(model, inverse_share, smoothing=0.0)
    train(model, optimizer, range(2))
    norms = {"text": slow_norm(model.text), "audio": slow_norm(model.audio)}
    expected = {name: min(norms.values()) / norm for name, norm in norms.items()}
    assert optimizer.coefficients() == pytest.approx(expected, rel=1e-6)


def test_without_conflicts_of_its_own_a_rule_damps_whoever_moves_less_for_whoever_moves_more(model):
    optimizer = penalised(model, lambda m: [0.5, 1.0])
    train(model, optimizer, range(1))
    assert optimizer.balance.conflicts.tolist() == [[False, True], [False, False]]


def test_a_rule_is_given_what_was_measured_as_numpy_vectors_in_float64(model):
    given = []
    optimizer = penalised(model, spy(given), smoothing=0.0)
    train(model, optimizer, range(4))
    first, second, *_, last = given
    assert first.names == ("text", "audio")
    vectors = ("norms", "shares", "coherences", "coherence_errors", "useful", "useful_errors")
    for name in (*vectors, "coefficients"):
        assert getattr(last, name).shape == (2,)
        assert getattr(last, name).dtype == np.float64
    norms = [slow_norm(model.text), slow_norm(model.audio)]
    assert last.norms.tolist() == pytest.approx(norms, rel=1e-6)
    assert last.shares.tolist() == pytest.approx((last.norms / last.norms.sum()).tolist())
    assert last.useful.tolist() == pytest.approx((last.coherences * last.shares).tolist())
    assert np.isnan(first.coherences).all()
    assert np.isnan(first.useful).all()
    assert np.isfinite(second.coherences).all()
    assert np.isinf(second.coherence_errors).all()
    assert first.errors is None
    assert first.active.tolist() == [True, True]
    assert [m.coefficients.tolist() for m in given] == [[1.0, 1.0], *[[0.5, 0.5]] * 3]
    assert [m.step for m in given] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("make", "scale_free"),
    [(torch.optim.SGD, False), (torch.optim.AdamW, True), (torch.optim.RMSprop, True)],
)
def test_only_sgd_and_its_subclasses_take_longer_steps_with_larger_gradients(
    model, make, scale_free
):
    class Sub(make):
        pass

    given = []
    for cls in (make, Sub):
        train(model, penalised(model, spy(given), cls), range(1))
    assert [m.scale_free for m in given] == [scale_free] * 2


def test_a_rule_that_needs_no_coherence_is_given_none(model):
    given = []
    rule = spy(given)
    rule.needs_coherence = False
    optimizer = penalised(model, rule)
    train(model, optimizer, range(2))
    for m in given:
        parts = (m.coherences, m.coherence_errors, m.useful, m.useful_errors)
        assert parts == (None, None, None, None)
    assert np.isnan(optimizer.balance.coherences).all()


def test_a_rule_that_writes_into_what_it_is_given_changes_nothing_else(model):
    def careless(measured):
        for value in measured:
            if isinstance(value, np.ndarray):
                value[:] = 0
        return np.ones(2)

    optimizer = penalised(model, careless)
    backward(model)
    optimizer.step()
    norms = [slow_norm(model.text), slow_norm(model.audio)]
    assert optimizer.balance.norms.tolist() == pytest.approx(norms, rel=1e-6)
    assert optimizer.balance.shares.sum() == pytest.approx(1.0)
    assert optimizer.coefficients() == {"text": 1.0, "audio": 1.0}


def test_an_answer_that_the_rule_writes_to_afterwards_stays_what_it_was(model):
    answer, conflicts = np.array([0.5, 1.0]), np.array(TOLD)
    optimizer = penalised(model, lambda m: (answer, conflicts))
    train(model, optimizer, range(1))
    answer[:] = 7.0
    conflicts[:] = True
    assert optimizer.coefficients() == {"text": 0.5, "audio": 1.0}
    assert optimizer.balance.proposed.tolist() == [0.5, 1.0]
    assert optimizer.balance.conflicts.tolist() == TOLD


ANSWERS = {
    "a list": [2.0, 1.0],
    "a tuple of floats": (2.0, 1.0),
    "a list of integers": [2, 1],
    "a list of numpy scalars": [np.float32(2), np.int64(1)],
    "an array of float16": np.array([2, 1], dtype=np.float16),
    "an array of integers": np.array([2, 1]),
    "a tensor": torch.tensor([2.0, 1.0]),
    "a tensor of bfloat16": torch.tensor([2.0, 1.0], dtype=torch.bfloat16),
    "a tensor of integers": torch.tensor([2, 1]),
    "a tensor that requires a gradient": torch.tensor([2.0, 1.0], requires_grad=True),
    "a pair with conflicts in lists": ([2.0, 1.0], TOLD),
    "a pair with conflicts in an array": (np.array([2.0, 1.0]), np.array(TOLD)),
    "a pair of tensors": (torch.tensor([2.0, 1.0]), torch.tensor(TOLD)),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_rule_may_answer_with_whatever_numpy_takes(model, answer):
    optimizer = penalised(model, lambda m: answer)
    train(model, optimizer, range(1))
    assert optimizer.coefficients() == {"text": 2.0, "audio": 1.0}
    assert optimizer.balance.coefficients.dtype == np.float64
    told = isinstance(answer, tuple) and not isinstance(answer[0], float)
    expected = TOLD if told else [[False, False], [True, False]]
    assert optimizer.balance.conflicts.tolist() == expected


def test_a_rule_is_called_only_at_steps_that_count(model):
    rule = Slower()
    optimizer = penalised(model, rule)
    for step, factor in ((0, 1.0), (1, float("nan")), (2, 1.0)):
        start = {k: v.clone() for k, v in model.state_dict().items()}
        backward(model, step)
        model.text.bias.grad *= factor
        optimizer.step()
        if factor != 1.0:
            model.load_state_dict(start)
    assert rule.calls == optimizer.balance.step == 2


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_watching_measures_everything_and_is_bitwise_the_plain_optimizer(model, make, mode):
    plain = TwoBranches()
    train(plain, make(plain.parameters(), lr=0.1), range(5))
    watch = Watch(ByHand(text=0.1))
    optimizer = penalised(model, watch, make, lr=0.1, apply_to=mode)
    for step in range(5):
        backward(model, step)
        versions = [p.grad._version for p in model.parameters()]
        optimizer.step()
        assert [p.grad._version for p in model.parameters()] == versions
        assert set(optimizer.coefficients().values()) == {1.0}
    assert equal(parameters(model), parameters(plain))
    assert "on nothing" in repr(optimizer)
    balance = optimizer.balance
    assert balance.step == 5
    assert (balance.norms > 0).all()
    assert balance.shares.sum() == pytest.approx(1.0)
    assert np.isfinite(balance.coherences).all()
    assert balance.proposed.tolist() == [0.1, 1.0]
    assert not balance.conflicts.any()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
def test_factors_by_hand_are_those_of_the_displacement(model, make):
    plain = TwoBranches()
    start = parameters(model)
    train(model, penalised(model, ByHand(text=0.25, audio=3), make, lr=0.1), range(1))
    train(plain, make(plain.parameters(), lr=0.1), range(1))
    factors = {"text": 0.25, "audio": 3.0, "head": 1.0}
    named = zip(model.named_parameters(), plain.parameters(), start, strict=True)
    for (name, p), q, before in named:
        expected = before + factors[name.partition(".")[0]] * (q.detach() - before)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


EACH_KIND = [Useful(), ConflictAware(), ByHand(text=0.5), Watch(), inverse_share, Slower()]


@pytest.mark.parametrize("rule", EACH_KIND, ids=lambda rule: type(rule).__name__)
def test_coefficients_for_takes_rules_that_decide_without_coherence_and_refuses_the_others(
    model, rule
):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), rule)
    norms = {"text": 2.0, "audio": 1.0}
    if getattr(rule, "needs_coherence", True):
        message = "`coefficients_for` must have a rule that decides by norms and errors"
        with pytest.raises(RuntimeError, match=message):
            penalty.coefficients_for(norms)
        assert penalty.balance.step == 0
    else:
        assert set(penalty.coefficients_for(norms)) == {"text", "audio"}
        assert penalty.balance.step == 1


def test_a_rule_of_many_groups_gives_each_its_coefficient():
    groups = {f"group {i}": [nn.Parameter(torch.zeros(3))] for i in range(40)}
    members = [p for group in groups.values() for p in group]
    sgd = torch.optim.SGD(members, lr=1.0)
    optimizer = ConflictAwarePenalty(sgd, groups, lambda m: m.shares / m.shares.max())
    for i, p in enumerate(members):
        p.grad = torch.full((3,), float(i + 1))
    optimizer.step()
    expected = [(i + 1) / 40 for i in range(40)]
    assert list(optimizer.coefficients().values()) == pytest.approx(expected)
    moved = [-p[0].item() for p in members]
    assert moved == pytest.approx([(i + 1) ** 2 / 40 for i in range(40)], rel=1e-6)
