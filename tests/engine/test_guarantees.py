"""What the engine guarantees whatever the rule: SPEC 1.3, one heading each."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradbalance import Balance, ConflictAwarePenalty, Recorder, attach
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
from tests.rules.asking import NAMES, Asked
from tests.strategies import SMOOTHINGS, WINDOWS, group_cosines, group_errors, group_norms

SGD = torch.optim.SGD
# Made anew for each test: one of them has a state.
RULES = {
    "Useful": Useful,
    "ConflictAware": ConflictAware,
    "ByHand": lambda: ByHand(text=0.25),
    "Watch": Watch,
    "function": lambda: inverse_share,
    "stateful": Slower,
}
each_rule = pytest.mark.parametrize("make_rule", RULES.values(), ids=RULES)
each_mode = pytest.mark.parametrize("mode", ["update", "gradient"])
# By the learning rate, by rescaling the finished update, and the gradient.
each_way = pytest.mark.parametrize(
    ("make", "mode"),
    [(SGD, "update"), (torch.optim.Rprop, "update"), (SGD, "gradient")],
    ids=["rate", "displacement", "gradient"],
)


def remembered(optimizer):
    """What a checkpoint holds of the penalty."""
    return repr(optimizer.state_dict()["param_groups"][0]["gradbalance"])


# 1. A step with a non-finite norm or error, with fewer than two active groups, or that GradScaler
# skips, does not count: it changes no state, and nothing is made NaN that was not. Where that is
# known in time every coefficient of the step is 1. After 100 such steps one warning says why.


@each_rule
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@settings(max_examples=15)
@given(data=st.data(), norms=group_norms(), smoothing=SMOOTHINGS)
def test_a_step_that_does_not_count_changes_no_state(make_rule, late, data, norms, smoothing):
    n, asked = len(norms), Asked(make_rule(), len(norms), smoothing, late=late)
    errors = data.draw(st.none() | group_errors(n, partial=True))
    asked.step(norms, errors, data.draw(group_cosines(n)))
    before = remembered(asked.optimizer)
    assert asked.penalty.balance.step == 1
    m = data.draw(st.integers(0, n - 1))
    bad = data.draw(st.sampled_from([math.nan, math.inf]))
    spoiled = [bad if i == m else x for i, x in enumerate(norms)]
    alone = [x if i == m else 0.0 for i, x in enumerate(norms)]
    spoiled_errors = [bad if i == m else 1.0 for i in range(n)]
    cases = [(spoiled, None), (alone, None), ([0.0] * n, None)]
    if errors is not None:  # that errors were observed at all is remembered even so
        cases.append((norms, spoiled_errors))
    for case in cases:
        coefficients = asked.step(*case, data.draw(group_cosines(n)))
        assert remembered(asked.optimizer) == before
        if not late:
            assert coefficients.tolist() == [1.0] * n
            assert not asked.penalty.balance.conflicts.any()


@each_rule
@each_mode
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"noise": 1.0, "max_norm": 1.0}], ids=["plain", "noise"])
def test_a_gradient_that_is_not_finite_spreads_nowhere(model, make_rule, mode, bad, options):
    optimizer = penalised(model, make_rule(), apply_to=mode, **options)
    train(model, optimizer, range(3))
    state = remembered(optimizer)
    backward(model, 3)
    model.text.bias.grad[0] = bad
    before = gradients(model)
    optimizer.step()
    assert set(optimizer.coefficients().values()) == {1.0}
    assert remembered(optimizer) == state
    assert equal(gradients(model), before)


@each_way
def test_a_gradient_that_is_not_finite_spreads_nowhere_where_it_is_known_a_step_late(
    model, make, mode
):
    optimizer = penalised(
        model, ByHand(text=0.25), make, apply_to=mode, late=True, noise=1.0, max_norm=1.0
    )
    train(model, optimizer, range(3), fixed_gradients)
    state = remembered(optimizer)
    fixed_gradients(model, 3)
    model.text.bias.grad[0] = math.nan
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all() or name == "text.bias"
        assert p.grad.isfinite().all() or name == "text.bias"
    assert remembered(optimizer) == state


@each_rule
@each_mode
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_a_step_that_the_scaler_skips_does_not_count(model, make_rule, mode, late):
    optimizer = penalised(model, make_rule(), apply_to=mode, late=late)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        loss = backward(model, step)
        model.zero_grad()
        loss = (model(torch.ones(1, 9)) - loss.detach()).square().sum()
        scaler.scale(loss).backward()
        if step == 2:
            model.text.bias.grad[0] = math.inf
        before, state = parameters(model), optimizer.state_dict()
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert equal(parameters(model), before)
            assert optimizer.state_dict() == state
    optimizer.state_dict()  # a late step is decided
    assert optimizer.balance.step == 3


def warned_in(asked, steps, norms, errors=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            asked.step(norms(step) if callable(norms) else norms, errors)
    return [str(warning.message) for warning in caught]


WHY = {
    "NaN": ([math.nan, 1.0], None, "The gradient norms are not finite"),
    "errors": ([1.0, 1.0], [math.nan, 1.0], "The observed errors are not finite"),
    "one alone": ([1.0, 0.0], None, "No parameter of `audio` has a gradient"),
    "none": ([0.0, 0.0], None, "No parameter of `text`, `audio` has a gradient"),
    "in turn": (lambda i: [i % 2, 1 - i % 2], None, "Fewer than two groups have a gradient in the"),
}


@pytest.mark.parametrize(("norms", "errors", "why"), WHY.values(), ids=WHY)
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_if_no_step_has_counted_for_100_steps_one_warning_says_why(norms, errors, why, late):
    asked = Asked(Watch(), 2, late=late)
    asked.step([1.0, 1.0])
    assert warned_in(asked, 99, norms, errors) == []
    (message,) = warned_in(asked, 200, norms, errors)
    assert message.startswith("No step has counted for 100 measured steps, so nothing is balanced.")
    assert why in message


def test_a_step_that_counts_begins_the_hundred_anew():
    asked = Asked(Watch(), 2)
    for _ in range(3):
        assert warned_in(asked, 99, [math.nan, 1.0]) == []
        asked.step([1.0, 1.0])


# 2. Outside the window of counted steps, and for a group that is not active, the coefficient is 1.


@each_rule
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@settings(max_examples=15)
@given(data=st.data(), norms=group_norms(), window=WINDOWS)
def test_outside_the_window_and_for_a_group_that_is_not_active_the_coefficient_is_one(
    make_rule, late, data, norms, window
):
    n, asked = len(norms), Asked(make_rule(), len(norms), window=window, late=late)
    start, stop = window or (0, None)
    for step in range(4):
        quiet = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 2))
        heard = [0.0 if i in quiet else x for i, x in enumerate(norms)]
        c = asked.step(heard, None, data.draw(group_cosines(n)))
        inside = step >= start and (stop is None or step < stop)
        if not inside:
            assert c.tolist() == [1.0] * n
        elif not late:  # late, a gradient of zeros is not known in time
            assert all(c[i] == 1 for i in quiet)
    asked.optimizer.state_dict()
    assert asked.penalty.balance.step == 4


@each_way
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_outside_the_window_the_run_is_bitwise_the_plain_one(model, make, mode, late):
    other = copy.deepcopy(model)
    optimizer = penalised(
        model, ByHand(text=0.5), make, apply_to=mode, window=(2, 4), noise=1.0, late=late
    )
    plain = make(other.parameters(), lr=0.05)
    for step in range(6):
        assert equal(parameters(model), parameters(other)) is (step <= 2)
        assert (min(optimizer.coefficients().values()) < 1) is (step in (3, 4))
        train(model, optimizer, [step])
        train(other, plain, [step])


def test_the_window_is_one_of_steps_that_counted():
    asked = Asked(ByHand(text=0.5), 2, window=(1, 2))
    steps = [1.0, math.nan, 1.0, math.nan, 1.0]
    seen = [asked.step([norm, 1.0]).tolist()[0] for norm in steps]
    assert seen == [1.0, 1.0, 0.5, 1.0, 1.0]


# 3. Coefficients that are negative, not finite or not of shape [N] never reach a parameter.


def wrong_rule(answer, after=0):
    answers = iter([np.ones(2)] * after)

    def misjudging(measured):
        return next(answers, answer)

    return misjudging


FLAGS = [[False, True], [False, False]]
WRONG = {
    "negative": (np.array([-0.5, 1.0]), ValueError, "Got [-0.5, 1.0]"),
    "NaN": ([math.nan, 1.0], ValueError, "Got [nan, 1.0]"),
    "inf": (torch.tensor([1.0, math.inf]), ValueError, "Got [1.0, inf]"),
    "too many": (np.ones(3), ValueError, "Got [1.0, 1.0, 1.0]"),
    "too few": ([0.5], ValueError, "Got [0.5]"),
    "three in a tuple": ((1.0, 1.0, 1.0), ValueError, "Got [1.0, 1.0, 1.0]"),
    "three arrays": ((np.ones(2), FLAGS, FLAGS), ValueError, "Got a tuple of 3"),
    "a matrix": (np.ones((2, 2)), ValueError, "Got (2, 2)"),
    "a scalar": (1.0, ValueError, "Got ()"),
    "ragged": ([1.0, [1.0, 2.0]], TypeError, "Got list"),
    "complex": (np.array([1j, 1.0]), TypeError, "Got complex128"),
    "strings": (["1", "1"], TypeError, "Got <U1"),
    "a string": ("fast", TypeError, "Got <U4"),
    "nothing": (None, TypeError, "Got NoneType"),
    "a pair of nothing": ((None, None), TypeError, "Got tuple"),
    "a dict": ({"text": 1.0}, TypeError, "Got dict"),
    "a tensor on a device": (torch.ones(2, device="meta"), TypeError, "Got a tensor on meta"),
    "conflicts of floats": ((np.ones(2), np.ones((2, 2))), TypeError, "Got float64"),
    "conflicts of integers": (([1.0, 1.0], [[0, 1], [0, 0]]), TypeError, "Got int64"),
    "conflicts of another shape": ((np.ones(2), [True, False]), ValueError, "Got (2,)"),
    "ragged conflicts": ((np.ones(2), [[True], [True, False]]), TypeError, "Got list"),
}


@each_way
@pytest.mark.parametrize(("answer", "kind", "got"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_an_error_that_names_the_rule_and_never_reaches_a_parameter(
    model, make, mode, answer, kind, got
):
    optimizer = penalised(model, wrong_rule(answer, after=2), make, apply_to=mode)
    train(model, optimizer, range(2))
    backward(model, 2)
    state, before, given = str(optimizer.state_dict()), parameters(model), gradients(model)
    message = r"^`wrong_rule.<locals>.misjudging` must return .*\. " + re.escape(got)
    with pytest.raises(kind, match=message) as caught:
        optimizer.step()
    assert re.search(r"\. [A-Z][^.]*\.$", str(caught.value)), "what to do"
    assert str(optimizer.state_dict()) == state
    assert equal(parameters(model), before)
    assert equal(gradients(model), given)
    assert set(optimizer.coefficients().values()) == {1.0}


# 4. Permuting the groups permutes everything. Coefficients of 1 leave gradients and updates bitwise
# those of the plain optimizer.


@each_rule
@settings(max_examples=20)
@given(data=st.data(), norms=group_norms(inactive=True), smoothing=SMOOTHINGS)
def test_permuting_the_groups_permutes_everything(make_rule, data, norms, smoothing):
    n = len(norms)
    order = data.draw(st.permutations(range(n)))
    plain = Asked(make_rule(), n, smoothing)
    permuted = Asked(make_rule(), n, smoothing, names=[NAMES[i] for i in order])
    for _ in range(3):
        errors = data.draw(st.none() | group_errors(n, partial=True))
        cosines = data.draw(group_cosines(n))
        plain.step(norms, errors, cosines)
        moved = None if errors is None else [errors[i] for i in order]
        permuted.step([norms[i] for i in order], moved, [cosines[i] for i in order])
    one, other = plain.penalty.balance, permuted.penalty.balance
    for name in Balance._fields[2:-1]:
        expected, found = getattr(one, name)[order], getattr(other, name)
        # The error of equal values is the root of what rounding leaves.
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7, err_msg=name)
    assert np.array_equal(other.conflicts, one.conflicts[order][:, order])


@each_rule
@each_way
def test_the_order_of_the_groups_does_not_change_the_run(model, make_rule, make, mode):
    other = copy.deepcopy(model)
    train(model, penalised(model, make_rule(), make, apply_to=mode), range(5))
    reverse = dict(reversed(groups_of(other).items()))
    train(other, penalised(other, make_rule(), make, groups=reverse, apply_to=mode), range(5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_way
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
def test_coefficients_of_one_leave_the_run_bitwise_as_it_is(model, make, mode, late, lr):
    other = copy.deepcopy(model)
    optimizer = penalised(model, ByHand(text=1), make, lr=lr, apply_to=mode, late=late)
    plain = make(other.parameters(), lr=lr)
    for step in range(5):
        train(model, optimizer, [step])
        train(other, plain, [step])
        assert equal(gradients(model), gradients(other))
        assert equal(parameters(model), parameters(other))


@pytest.mark.parametrize("make", [SGD, torch.optim.Adam, torch.optim.Rprop])
def test_parameters_of_no_group_are_bitwise_those_of_the_plain_optimizer(model, make):
    other = copy.deepcopy(model)
    optimizer = penalised(model, ByHand(text=0.1, audio=3), make)
    plain = make(other.parameters(), lr=0.05)
    for step in range(5):
        train(model, optimizer, [step], fixed_gradients)
        train(other, plain, [step], fixed_gradients)
    assert equal(parameters(model.head), parameters(other.head))
    assert not equal(parameters(model.text), parameters(other.text))


# 5. Sharded, replicated and single-process runs give the same coefficients, with one all_reduce per
# mesh dimension and counted step. On several ranks: tests/contract/test_distributed.py.


@pytest.fixture
def one_rank():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_coherence(measured):
    return np.nan_to_num(1 + measured.coherences, nan=1.0)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "make_rule", [lambda: by_coherence, ConflictAware], ids=["coherence", "norms"]
)
@pytest.mark.parametrize("observes", [False, True], ids=["norms", "errors"])
def test_a_sharded_run_gives_the_same_coefficients_with_one_all_reduce_a_step(
    model, monkeypatch, make_rule, observes
):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))

    def shard(name, module, mesh):
        for key, p in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(p.detach().clone(), mesh, [Shard(0)])
            setattr(module, key, nn.Parameter(sharded))

    plain = copy.deepcopy(model)
    sharded = distribute_module(model, mesh, shard)
    sums = []
    all_reduce = dist.all_reduce

    def counted(*args, **kwargs):
        sums.append(1)
        return all_reduce(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counted)
    one = penalised(plain, make_rule(), smoothing=0.5, late=False)
    other = penalised(sharded, make_rule(), smoothing=0.5, late=False)
    for step in range(4):
        fixed_gradients(plain, step)
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
        if observes:
            for penalty in (one, other):
                penalty.observe(text=0.5, audio=1.0 + step)
        one.step()
        assert sums == []
        other.step()
        assert sums == [1]
        sums.clear()
        assert other.coefficients() == pytest.approx(one.coefficients(), rel=1e-6)
    assert set(one.coefficients().values()) != {1.0}


# 6. What was measured, and whatever the rule keeps, is in the optimizer's checkpoint by group name,
# and a resumed run equals the unbroken one bit for bit. Another order of the groups is matched by
# name; other names or another rule are an error that says which. The live `param_groups[0]` holds
# one key of ours from construction on. Every way of saving: tests/contract/test_checkpoints.py.


@each_rule
@each_mode
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(model, make_rule, mode, late, every):
    options = {"apply_to": mode, "every": every, "smoothing": 0.5, "late": late}
    optimizer = penalised(model, make_rule(), **options)
    train(model, optimizer, range(2))
    optimizer.observe(text=0.0, audio=0.5)
    train(model, optimizer, range(2, 5))
    resumed = copy.deepcopy(model)
    reverse = dict(reversed(groups_of(resumed).items()))
    other = penalised(resumed, make_rule(), groups=reverse, **options)
    other.load_state_dict(optimizer.state_dict())
    seen, again = train(model, optimizer, range(5, 9)), train(resumed, other, range(5, 9))
    assert again == seen
    assert equal(parameters(model), parameters(resumed))
    for name in Balance._fields[2:-1]:
        one, reversed_one = getattr(optimizer.balance, name), getattr(other.balance, name)
        assert np.array_equal(reversed_one[::-1], one, equal_nan=True), name
    assert other.balance.step == optimizer.balance.step


def test_taking_a_checkpoint_does_not_change_the_run(model):
    other = copy.deepcopy(model)
    optimizer = penalised(model, Useful(), late=True)
    saving = penalised(other, Useful(), late=True)
    seen = train(model, optimizer, range(6))
    saved = []
    for step in range(6):
        saved += train(other, saving, [step])
        saving.state_dict()
    assert saved == seen
    assert equal(parameters(model), parameters(other))


def test_the_live_param_groups_hold_one_key_of_ours_from_construction_on(model):
    inner = SGD([{"params": m.parameters()} for m in model.children()], lr=0.1)
    before = [set(group) for group in inner.param_groups]
    optimizer = ConflictAwarePenalty(inner, groups_of(model), Slower())

    def assert_one_key():
        assert inner.param_groups[0]["gradbalance"] == ()
        added = [set(group) - keys for group, keys in zip(inner.param_groups, before, strict=True)]
        assert added == [{"gradbalance"}, set(), set()]

    assert_one_key()
    train(model, optimizer, range(2))
    assert_one_key()
    state = optimizer.state_dict()
    assert_one_key()
    optimizer.load_state_dict(state)
    assert_one_key()
    train(model, optimizer, range(2))
    assert_one_key()
    assert [set(group) for group in state["param_groups"]] == [set(g) for g in inner.param_groups]


def test_a_checkpoint_of_another_rule_or_of_other_groups_is_refused(model):
    state = penalised(model, Slower()).state_dict()
    for rule, groups, message in (
        (Useful(), None, "must be of the rule `Useful`. Got that of `Slower`. Build with"),
        (Slower(), ("text", "rest"), "the groups text, rest. Got text, audio. Load a checkpoint"),
    ):
        other = TwoBranches()
        named = dict(zip(groups or groups_of(other), (other.text, other.audio), strict=True))
        optimizer = penalised(other, rule, groups=named)
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.load_state_dict(state)


@each_rule
def test_a_checkpoint_that_is_refused_changes_nothing(model, make_rule):
    optimizer = penalised(model, make_rule())
    train(model, optimizer, range(3))
    before = str(optimizer.state_dict())
    other = TwoBranches()
    fewer = ConflictAwarePenalty(
        SGD([*other.text.parameters(), *other.audio.parameters()], lr=7.0),
        groups_of(other),
        make_rule(),
    )
    train(other, fewer, range(5))
    another = penalised(TwoBranches(), lambda m: [1.0, 1.0], lr=7.0)
    broken = copy.deepcopy(optimizer.state_dict())
    broken["param_groups"][0]["gradbalance"] = ({"step": 3},)
    for state, message in (
        (fewer.state_dict(), "doesn't match the size of optimizer's group"),
        (another.state_dict(), "`state_dict` must be of the rule"),
        (broken, "`state_dict` must hold what the penalty saved"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert str(optimizer.state_dict()) == before


def test_the_checkpoint_of_a_plain_optimizer_is_loaded_and_leaves_the_penalty_as_it_is(model):
    optimizer = penalised(model, Slower())
    train(model, optimizer, range(2))
    optimizer.load_state_dict(SGD(model.parameters(), lr=0.2).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.param_groups[0]["gradbalance"] == ()
    assert optimizer.balance.step == 2


def test_without_persist_a_checkpoint_is_that_of_the_plain_optimizer(model):
    optimizer = penalised(model, Slower(), persist=False)
    train(model, optimizer, range(2))
    plain = SGD(model.parameters(), lr=0.05)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    other = penalised(TwoBranches(), Slower())
    optimizer.load_state_dict(other.state_dict())  # what another one persisted is left out
    assert optimizer.balance.step == 2


@each_rule
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_a_copy_goes_on_as_the_original(model, make_rule, late):
    optimizer = penalised(model, make_rule(), late=late)
    train(model, optimizer, range(3))
    copied, other = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, range(3, 6)) == train(copied, other, range(3, 6))
    assert equal(parameters(model), parameters(copied))


# 7. Recorder and Balance show every rule alike.


@each_rule
@each_mode
def test_the_recorder_and_the_balance_show_every_rule_alike(model, make_rule, mode):
    optimizer = penalised(model, make_rule(), apply_to=mode, window=(1, None))
    with Recorder(optimizer) as recorder:
        seen = train(model, optimizer, range(3))
    recorded = recorder.to_dict()
    assert recorded["step"].tolist() == [1, 2, 3]
    assert np.allclose(recorded["coefficients"], [list(c.values()) for c in seen])
    balance = optimizer.balance
    assert balance.names == ("text", "audio")
    assert balance.step == 3
    for name in Balance._fields[2:-1]:
        value = getattr(balance, name)
        assert value.shape == (2,)
        assert value.dtype == np.float64
    assert balance.conflicts.shape == (2, 2)
    assert balance.conflicts.dtype == bool


def test_what_is_written_into_a_balance_changes_nothing(model):
    optimizer = penalised(model, ByHand(text=0.5))
    train(model, optimizer, range(3))
    before = repr(optimizer.balance)
    for value in optimizer.balance[2:]:
        value[:] = 0
    assert repr(optimizer.balance) == before


# 8. A rule, hook or step that raises leaves the optimizer as it was: learning rates, parameters'
# groups, nothing half applied.


def failing_rule():
    def rule(measured):
        if measured.step == 2:
            raise MemoryError
        return [0.5, 1.0]

    return rule


@each_way
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@pytest.mark.parametrize(
    "where", ["a rule", "a hook before", "a hook after", "the closure", "the step"]
)
def test_what_raises_leaves_the_optimizer_as_it_was(model, make, mode, late, where):
    class Stepping(make):
        fails = False

        @torch.no_grad()
        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    def fail(*_):
        raise MemoryError

    inner = Stepping(model.parameters(), lr=0.1)
    rule = failing_rule() if where == "a rule" else ByHand(text=0.5)
    if mode == "update":  # which would try a class that it does not know
        mode = "learning_rate" if make is SGD else "displacement"
    optimizer = ConflictAwarePenalty(inner, groups_of(model), rule, late=late, apply_to=mode)
    train(model, optimizer, range(3 if where == "a rule" and late else 2))
    backward(model, 2)
    before, given = parameters(model), gradients(model)
    param_groups, held = inner.param_groups, list(inner.param_groups[0]["params"])
    settings = {k: v for k, v in param_groups[0].items() if k != "params"}
    handle = None
    if where == "a hook before":
        handle = inner.register_step_pre_hook(fail)
    elif where == "a hook after":
        handle = inner.register_step_post_hook(fail)
    Stepping.fails = where == "the step"
    with pytest.raises(MemoryError):
        optimizer.step(*([fail] if where == "the closure" else []))
    assert inner.param_groups is param_groups
    assert all(p is q for p, q in zip(param_groups[0]["params"], held, strict=True))
    assert {k: v for k, v in param_groups[0].items() if k != "params"} == settings
    if where != "a hook after":  # the step was taken
        assert equal(parameters(model), before)
    if where in ("a rule", "a hook before", "the closure"):
        assert equal(gradients(model), given)
    if handle:
        handle.remove()
    Stepping.fails = False
    if where != "a rule":
        optimizer.step()
        assert optimizer.coefficients() == {"text": 0.5, "audio": 1.0}
        assert inner.param_groups is param_groups


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_a_rule_that_raises_leaves_what_was_measured_as_it_was(model, late):
    optimizer = penalised(model, failing_rule(), late=late)
    train(model, optimizer, range(3 if late else 2), fixed_gradients)
    before = repr(optimizer.balance)
    fixed_gradients(model, 3)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert optimizer.balance.step == 2
    assert repr(optimizer.balance.shares) in before
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_penalty_that_is_refused_leaves_the_optimizer_as_it_was(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    before, keys = set(vars(optimizer)), set(optimizer.param_groups[0])
    for rule, options in (
        (ByHand(video=1), {}),
        (ByHand(text=1), {"noise": {"video": 1.0}}),
        (ByHand(text=1), {"apply_to": "nothing"}),
    ):
        with pytest.raises(ValueError, match=r"must (name groups|be one of)"):
            attach(optimizer, groups_of(model), rule, **options)
        assert set(vars(optimizer)) == before
        assert set(optimizer.param_groups[0]) == keys
        assert not optimizer._optimizer_step_pre_hooks
    attach(optimizer, groups_of(model), ByHand(text=1))
