"""What the engine guarantees whatever the rule: SPEC 1.2, one heading each."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbalance import ConflictAwarePenalty, Recorder
from gradbalance.rules import ByHand, Coherence, ConflictAware, Watch
from tests.engine.models import TwoBranches, backward, equal, gradients, groups_of, parameters, train
from tests.engine.test_asking import Slower, inverse_share
from tests.rules.asking import Asked
from tests.strategies import SMOOTHINGS, WINDOWS, group_errors, group_norms

SGD = torch.optim.SGD
# Made anew for each test: one of them has a state.
RULES = {
    "Coherence": Coherence,
    "ConflictAware": ConflictAware,
    "ByHand": lambda: ByHand(text=0.25),
    "Watch": Watch,
    "function": lambda: inverse_share,
    "stateful": Slower,
}
each_rule = pytest.mark.parametrize("make_rule", RULES.values(), ids=RULES)
each_mode = pytest.mark.parametrize("mode", ["update", "gradient"])


def penalised(model, rule, make=SGD, groups=None, **options):
    return ConflictAwarePenalty(make(model.parameters(), lr=0.05), groups or groups_of(model), rule, **options)


def cosines(data, n):
    return data.draw(st.lists(st.floats(-1, 1) | st.none(), min_size=n, max_size=n))


def remembered(asked):
    numbers = asked.state.numbers()
    return repr((numbers["step"], numbers["groups"], vars(asked.rule) if hasattr(asked.rule, "asked") else None))


# 1. A step that does not count.


@each_rule
@settings(max_examples=30)
@given(data=st.data(), norms=group_norms(), smoothing=SMOOTHINGS)
def test_a_step_that_does_not_count_gives_one_and_changes_nothing(make_rule, data, norms, smoothing):
    n, asked = len(norms), Asked(make_rule(), len(norms), smoothing)
    asked.step(norms, data.draw(st.none() | group_errors(n, partial=True)), cosines(data, n))
    before, step = remembered(asked), asked.state.balance.step.item()
    assert step == 1
    m, bad = data.draw(st.integers(0, n - 1)), data.draw(st.sampled_from([math.nan, math.inf]))
    spoiled = [bad if i == m else x for i, x in enumerate(norms)]
    alone = [x if i == m else 0.0 for i, x in enumerate(norms)]
    errors = [bad if i == m else 1.0 for i in range(n)]
    for case in ((spoiled, None), (alone, None), ([0.0] * n, None), (norms, errors)):
        assert asked.step(*case, cosines(data, n)).tolist() == [1.0] * n
        assert remembered(asked) == before
        assert not asked.state.balance.conflicts.any()


@each_rule
@each_mode
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"noise": 1.0, "max_norm": 1.0}], ids=["plain", "noise"])
def test_a_gradient_that_is_not_finite_spreads_nowhere(model, make_rule, mode, bad, options):
    optimizer = penalised(model, make_rule(), apply_to=mode, **options)
    train(model, optimizer, range(3))
    state = repr(optimizer.state_dict()["param_groups"])
    backward(model, 3)
    model.text.bias.grad[0] = bad
    before = gradients(model)
    optimizer.step()
    assert set(optimizer.coefficients().values()) == {1.0}
    assert repr(optimizer.state_dict()["param_groups"]) == state
    assert equal(gradients(model), before)


@each_rule
@each_mode
def test_a_step_that_the_scaler_skips_does_not_count(model, make_rule, mode):
    optimizer = penalised(model, make_rule(), apply_to=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        loss = backward(model, step)
        model.zero_grad()
        scaler.scale((model(torch.ones(1, 9)) - loss.detach()).square().sum()).backward()
        if step == 2:
            model.text.bias.grad[0] = math.inf
        before, state = parameters(model), optimizer.state_dict()
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert equal(parameters(model), before)
            assert optimizer.state_dict() == state
    assert optimizer.balance.step == 3


# 2. Outside the window, and groups that are not active.


@each_rule
@settings(max_examples=30)
@given(data=st.data(), norms=group_norms(), window=WINDOWS)
def test_outside_the_window_and_for_a_group_that_is_not_active_the_coefficient_is_one(make_rule, data, norms, window):
    n, asked = len(norms), Asked(make_rule(), len(norms), window=window)
    start, stop = window or (0, None)
    for step in range(4):
        quiet = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 2))
        c = asked.step([0.0 if i in quiet else x for i, x in enumerate(norms)], None, cosines(data, n))
        inside = step >= start and (stop is None or step < stop)
        assert all(c[i] == 1 for i in (quiet if inside else range(n)))
        assert not (asked.state.balance.conflicts.any() and not inside)
    assert asked.state.balance.step == 4


@each_mode
@pytest.mark.usefixtures("host")
def test_outside_the_window_the_run_is_bitwise_the_plain_one(model, mode):
    other = copy.deepcopy(model)
    optimizer = penalised(model, ByHand(text=0.5), apply_to=mode, window=(2, 4), noise=1.0)
    plain = SGD(other.parameters(), lr=0.05)
    for step in range(6):
        assert equal(parameters(model), parameters(other)) is (step <= 2)
        assert (min(optimizer.coefficients().values()) < 1) is (step in (3, 4))
        train(model, optimizer, [step])
        train(other, plain, [step])


# 3. Wrong answers: see test_asking.


# 4. Permutations, and coefficients of 1.


@each_rule
@settings(max_examples=30)
@given(data=st.data(), norms=group_norms(inactive=True), smoothing=SMOOTHINGS)
def test_permuting_the_groups_permutes_everything(make_rule, data, norms, smoothing):
    n = len(norms)
    order = data.draw(st.permutations(range(n)))
    plain, permuted = (Asked(make_rule(), n, smoothing) for _ in range(2))
    permuted.state.names = tuple(plain.state.names[i] for i in order)
    for _ in range(2):
        errors, cos = data.draw(st.none() | group_errors(n, partial=True)), cosines(data, n)
        plain.step(norms, errors, cos)
        moved = None if errors is None else [errors[i] for i in order]
        permuted.step([norms[i] for i in order], moved, [cos[i] for i in order])
    one, other = plain.state.balance, permuted.state.balance
    for a, b in zip(one[:5], other[:5], strict=True):
        torch.testing.assert_close(b, a[order], rtol=1e-9, atol=0, equal_nan=True)
    assert torch.equal(other.conflicts, one.conflicts[order][:, order])


@each_rule
@each_mode
def test_the_order_of_the_groups_does_not_change_the_run(model, make_rule, mode):
    other = copy.deepcopy(model)
    train(model, penalised(model, make_rule(), apply_to=mode), range(5))
    reverse = dict(reversed(groups_of(other).items()))
    train(other, penalised(other, make_rule(), groups=reverse, apply_to=mode), range(5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_mode
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", [SGD, torch.optim.Rprop], ids=["rate", "displacement"])
@pytest.mark.filterwarnings("ignore:`apply_to")
def test_coefficients_of_one_leave_the_run_bitwise_as_it_is(model, mode, lr, make):
    other = copy.deepcopy(model)
    optimizer = ConflictAwarePenalty(make(model.parameters(), lr=lr), groups_of(model), ByHand(text=1), apply_to=mode)
    train(model, optimizer, range(5))
    train(other, make(other.parameters(), lr=lr), range(5))
    assert equal(parameters(model), parameters(other))


def test_parameters_of_no_group_are_bitwise_those_of_the_plain_optimizer(model):
    other = copy.deepcopy(model)
    optimizer = penalised(model, ByHand(text=0.1, audio=3), torch.optim.Adam)
    train(model, optimizer, range(1))
    train(other, torch.optim.Adam(other.parameters(), lr=0.05), range(1))
    assert equal(parameters(model.head), parameters(other.head))
    assert not equal(parameters(model.text), parameters(other.text))


# 6. Checkpoints.


@each_rule
@each_mode
@pytest.mark.parametrize("errors", [None, {"text": 0.0, "audio": 0.5}], ids=["norms", "errors"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(model, make_rule, mode, errors, every):
    options = {"apply_to": mode, "every": every, "smoothing": 0.5}
    optimizer = penalised(model, make_rule(), **options)
    train(model, optimizer, range(2))
    if errors is not None:
        optimizer.observe(**errors)
    train(model, optimizer, range(2, 5))
    resumed = copy.deepcopy(model)
    other = penalised(resumed, make_rule(), groups=dict(reversed(groups_of(resumed).items())), **options)
    other.load_state_dict(optimizer.state_dict())
    seen, again = train(model, optimizer, range(5, 9)), train(resumed, other, range(5, 9))
    assert [{name: c[name] for name in ("text", "audio")} for c in again] == seen
    assert equal(parameters(model), parameters(resumed))
    assert equal([t.flip(0) for t in other.balance[:5]], optimizer.balance[:5])
    assert other.balance.step == 9


def test_a_checkpoint_of_another_rule_or_of_other_groups_is_refused(model):
    state = penalised(model, Slower()).state_dict()
    for rule, groups, message in (
        (Coherence(), None, "`state_dict` must be of the rule `Coherence`. Got that of `Slower`."),
        (Slower(), {"text": model.text, "rest": model.audio}, "the groups text, rest. Got text, audio."),
    ):
        penalty = penalised(TwoBranches() if groups is None else model, rule, groups=groups)
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            penalty.load_state_dict(state)
        penalty.remove()


def test_without_persist_a_checkpoint_is_that_of_the_plain_optimizer(model):
    optimizer = penalised(model, Slower(), persist=False)
    train(model, optimizer, range(2))
    plain = SGD(model.parameters(), lr=0.05)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    other = penalised(TwoBranches(), Slower())
    state = other.state_dict()
    optimizer.load_state_dict(state)  # what another one persisted is left out
    assert optimizer.balance.step == 2


@each_rule
def test_a_copy_goes_on_as_the_original(model, make_rule):
    optimizer = penalised(model, make_rule())
    train(model, optimizer, range(3))
    copied, other = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, range(3, 6)) == train(copied, other, range(3, 6))
    assert equal(parameters(model), parameters(copied))


# 7. Balance and Recorder.


@each_rule
@each_mode
def test_the_recorder_and_the_balance_show_every_rule_alike(model, make_rule, mode):
    optimizer = penalised(model, make_rule(), apply_to=mode)
    with Recorder(optimizer) as recorder:
        seen = train(model, optimizer, range(3))
    recorded = recorder.to_dict()
    assert recorded["step"].tolist() == [1, 2, 3]
    assert np.allclose(recorded["coefficients"], [list(c.values()) for c in seen])
    balance = optimizer.balance
    assert [tuple(part.shape) for part in balance[:7]] == [(2,)] * 5 + [(2, 2), ()]
    assert balance.conflicts.dtype == torch.bool
    assert balance.names == ("text", "audio")


# every


@given(smoothing=st.sampled_from([0.0, 0.5, 0.9]), every=st.integers(1, 4))
def test_a_running_mean_forgets_as_fast_whatever_every(smoothing, every):
    model = TwoBranches()
    optimizer = penalised(model, Watch(), every=every, smoothing=smoothing)
    share = None
    for step in range(6):
        backward(model, step)
        norms = [
            math.sqrt(sum(float(p.grad.double().square().sum()) for p in m.parameters()))
            for m in (model.text, model.audio)
        ]
        now = norms[0] / sum(norms)
        if step % every == 0:
            weight = smoothing**every
            share = now if share is None else weight * share + (1 - weight) * now
        optimizer.step()
        assert optimizer.balance.shares[0].item() == pytest.approx(share, rel=1e-5)
        assert optimizer.balance.step == step + 1


def test_between_two_measurements_the_coefficients_are_kept(model):
    rule = Slower()
    seen = train(model, penalised(model, rule, every=3), range(7))
    assert [c["text"] for c in seen] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert rule.asked == 3
