"""Rules of the user: what they are given, what they may answer, and what happens where they answer wrongly."""

import math
import re

import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, attach
from gradbalance.rules import ByHand, Coherence, ConflictAware, Watch
from tests.engine.models import TwoBranches, backward, equal, gradients, groups_of, parameters, slow_norm, train


def penalised(model, rule, make=torch.optim.SGD, **options):
    return ConflictAwarePenalty(make(model.parameters(), lr=0.1), groups_of(model), rule, **options)


def inverse_share(measured):
    return (measured.shares.nan_to_num(1.0).amin() / measured.shares).nan_to_num(1.0)


def spy(given, factor=0.5):
    """A rule that keeps what it is given, and a constant for all groups."""

    def rule(measured):
        given.append(measured._replace(step=measured.step.clone()))  # the engine counts in place
        return torch.full_like(measured.norms, factor)

    return rule


class Slower:
    """A stateful rule of ten lines: every group half as fast at each step that counts, down to a tenth."""

    needs_coherence = False

    def __init__(self):
        self.asked = 0

    def __call__(self, measured):
        self.asked += 1
        return torch.full_like(measured.norms, max(0.1, 0.5**self.asked))

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_a_plain_function_is_a_rule(model):
    optimizer = penalised(model, inverse_share, smoothing=0.0)
    train(model, optimizer, range(2))
    norms = {"text": slow_norm(model.text), "audio": slow_norm(model.audio)}
    expected = {name: min(norms.values()) / norm for name, norm in norms.items()}
    assert optimizer.coefficients() == pytest.approx(expected, rel=1e-6)
    low, high = sorted(optimizer.balance.conflicts.sum(1).tolist())
    assert (low, high) == (0, 1), "whoever moves less is damped for whoever moves more"


def test_a_rule_is_given_what_was_measured(model):
    given = []
    optimizer = penalised(model, spy(given), smoothing=0.0)
    train(model, optimizer, range(2))
    first, second = given
    assert first.names == ("text", "audio")
    assert second.norms.tolist() == pytest.approx([slow_norm(model.text), slow_norm(model.audio)], rel=1e-6)
    assert second.shares.tolist() == pytest.approx((second.norms / second.norms.sum()).tolist())
    assert first.coherences.isnan().all()
    assert second.coherences.isfinite().all()
    assert first.errors is None
    assert first.active.tolist() == [True, True]
    assert [m.coefficients.tolist() for m in given] == [[1.0, 1.0], [0.5, 0.5]]
    assert [m.step for m in given] == [0, 1]
    assert first.norms.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "scale_free"), [(torch.optim.SGD, False), (torch.optim.AdamW, True), (torch.optim.RMSprop, True)]
)
def test_only_sgd_and_its_subclasses_take_longer_steps_with_larger_gradients(model, make, scale_free):
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
    train(model, penalised(model, rule), range(2))
    assert [m.coherences for m in given] == [None, None]


def test_a_rule_may_tell_whom_it_damps_for_whose_sake(model):
    told = torch.tensor([[False, True], [True, False]])
    optimizer = penalised(model, lambda m: (torch.ones_like(m.norms), told))
    train(model, optimizer, range(1))
    assert torch.equal(optimizer.balance.conflicts, told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_the_coefficients_may_have_any_real_dtype(model, dtype):
    optimizer = penalised(model, lambda m: torch.tensor([2, 1]).to(dtype))
    train(model, optimizer, range(1))
    assert optimizer.coefficients() == {"text": 2.0, "audio": 1.0}
    assert optimizer.balance.coefficients.dtype == torch.float64


def wrong_rule(answer, after=0):
    answers = iter([torch.ones(2)] * after)

    def misjudging(measured):
        return next(answers, answer)

    return misjudging


WRONG = {
    "negative": (torch.tensor([-0.5, 1.0]), ValueError, "Got [-0.5, 1.0]"),
    "NaN": (torch.tensor([math.nan, 1.0]), ValueError, "Got [nan, 1.0]"),
    "inf": (torch.tensor([1.0, math.inf]), ValueError, "Got [1.0, inf]"),
    "too many": (torch.ones(3), ValueError, "Got [1.0, 1.0, 1.0]"),
    "a matrix": (torch.ones(2, 2), ValueError, "Got (2, 2)"),
    "a scalar": (torch.ones(()), ValueError, "Got ()"),
    "a list": ([1.0, 1.0], TypeError, "Got list"),
    "nothing": (None, TypeError, "Got NoneType"),
    "a pair of nothing": ((None, None), TypeError, "Got NoneType"),
}


def state_of(optimizer, model):
    return str(optimizer.state_dict()["param_groups"]), parameters(model), gradients(model)


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize(("answer", "kind", "got"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_an_error_that_names_the_rule_and_changes_nothing(model, mode, answer, kind, got):
    optimizer = penalised(model, wrong_rule(answer, after=2), apply_to=mode)
    train(model, optimizer, range(2))
    backward(model, 2)
    before = state_of(optimizer, model)
    with pytest.raises(kind, match=r"`wrong_rule.<locals>.misjudging` must give .*" + re.escape(got)):
        optimizer.step()
    after = state_of(optimizer, model)
    assert after[0] == before[0]
    assert equal(after[1], before[1])
    assert equal(after[2], before[2])
    assert set(optimizer.coefficients().values()) == {1.0}


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("name", ["negative", "NaN", "inf"])
def test_a_wrong_answer_that_is_not_read_makes_the_step_not_count(model, off_host, mode, name):
    plain = TwoBranches()
    optimizer = penalised(model, wrong_rule(WRONG[name][0]), apply_to=mode)
    train(model, optimizer, range(3))
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), range(3))
    assert equal(parameters(model), parameters(plain))
    assert optimizer.balance.step == 0
    assert set(optimizer.coefficients().values()) == {1.0}


@pytest.mark.usefixtures("host")
def test_a_rule_with_a_state_is_asked_only_at_steps_that_count(model):
    rule = Slower()
    optimizer = penalised(model, rule)
    for step, bad in ((0, False), (1, True), (2, False)):
        backward(model, step)
        if bad:
            model.text.bias.grad[0] = math.nan
            start = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer.step()
        if bad:
            model.load_state_dict(start)
    assert rule.asked == optimizer.balance.step == 2


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_watching_measures_everything_and_is_bitwise_the_plain_optimizer(model, make, mode):
    plain = TwoBranches()
    train(plain, make(plain.parameters(), lr=0.1), range(5))
    optimizer = penalised(model, Watch(), make, apply_to=mode)
    for step in range(5):
        backward(model, step)
        versions = [p.grad._version for p in model.parameters()]
        optimizer.step()
        assert [p.grad._version for p in model.parameters()] == versions
        assert set(optimizer.coefficients().values()) == {1.0}
    assert equal(parameters(model), parameters(plain))
    assert optimizer.penalty._engine.way is None, "no copy of a parameter, no stand-in"
    assert "on nothing" in repr(optimizer)
    balance = optimizer.balance
    assert balance.step == 5
    assert balance.norms.gt(0).all()
    assert balance.shares.sum() == pytest.approx(1.0)
    assert balance.coherences.isfinite().all()
    assert not balance.conflicts.any()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
def test_factors_by_hand_are_those_of_the_displacement(model, make):
    plain = TwoBranches()
    before = parameters(model)
    train(model, penalised(model, ByHand(text=0.25, audio=3), make), range(1))
    train(plain, make(plain.parameters(), lr=0.1), range(1))
    factors = {"text": 0.25, "audio": 3.0, "head": 1.0}
    moved = dict(zip([n for n, _ in model.named_parameters()], before, strict=True))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected = moved[name] + factors[name.partition(".")[0]] * (q.detach() - moved[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [Coherence(), ConflictAware(), ByHand(text=0.5), Watch(), inverse_share, Slower()], ids=repr
)
def test_coefficients_for_takes_rules_that_decide_without_coherence_and_refuses_the_others(model, rule):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), rule)
    if getattr(rule, "needs_coherence", True):
        with pytest.raises(RuntimeError, match=r"`coefficients_for` must have a rule that decides by norms and errors"):
            penalty.coefficients_for({"text": 2.0, "audio": 1.0})
        assert penalty.balance.step == 0
    else:
        assert set(penalty.coefficients_for({"text": 2.0, "audio": 1.0})) == {"text", "audio"}
        assert penalty.balance.step == 1


def test_a_rule_of_many_groups_is_asked_for_each():
    groups = {f"group {i}": [nn.Parameter(torch.zeros(3))] for i in range(40)}
    members = [p for group in groups.values() for p in group]
    optimizer = ConflictAwarePenalty(torch.optim.SGD(members, lr=1.0), groups, lambda m: m.shares / m.shares.amax())
    for i, p in enumerate(members):
        p.grad = torch.full((3,), float(i + 1))
    optimizer.step()
    assert list(optimizer.coefficients().values()) == pytest.approx([(i + 1) / 40 for i in range(40)])
    assert [-p[0].item() for p in members] == pytest.approx([(i + 1) ** 2 / 40 for i in range(40)], rel=1e-6)


class Halving:
    """A rule of both kinds of call."""

    def __call__(self, measured):
        return torch.full_like(measured.norms, 0.5)

    def in_numbers(self, measured):
        return [0.5 if type(n) is float else math.nan for n in measured.norms]


class Quartering(Halving):
    def __call__(self, measured):
        return super().__call__(measured) / 2


class Tenth(Quartering):
    def in_numbers(self, measured):
        return [0.1] * len(measured.names)


class Short(Halving):
    def __call__(self, measured):
        raise AssertionError

    def in_numbers(self, measured):
        return [0.5]


def test_a_rule_in_numbers_is_asked_on_the_host(model, host):
    optimizer = penalised(model, Halving())
    train(model, optimizer, range(2))
    assert optimizer.coefficients() == {"text": 0.5, "audio": 0.5}
    assert not optimizer.balance.conflicts.any()


@pytest.mark.parametrize("rule", [Quartering(), Tenth()], ids=lambda rule: type(rule).__name__)
def test_numbers_that_do_not_belong_to_the_call_are_not_taken_for_it(model, rule):
    optimizer = penalised(model, rule)
    train(model, optimizer, range(1))
    assert optimizer.coefficients() == {"text": 0.25, "audio": 0.25}


def test_numbers_that_are_no_coefficients_are_an_error(model):
    with pytest.raises(ValueError, match=r"`Short` must give finite coefficients .* Got \[0.5\]"):
        train(model, penalised(model, Short()), range(1))
