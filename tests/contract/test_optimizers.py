"""The contract on every optimizer of torch, and what no optimizer is spared."""

import copy
import inspect
import warnings

import pytest
import torch

from gradbalance import ConflictAwarePenalty, rules
from tests.contract.optimizers import GRADIENT_ONLY, MODES, REPRESENTATIVES, TORCH, cancels
from tests.contract.oracle import (
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    groups_of,
    loss_of,
    put_on,
    refused,
    train,
)
from tests.contract.promises import Contract, saved, wrapped

pytestmark = cancels


class TestTorch(Contract):
    cases = TORCH
    representatives = REPRESENTATIVES


each_representative = pytest.mark.parametrize(("name", "mode"), REPRESENTATIVES)


def make(name, parameters):
    return getattr(torch.optim, name)(parameters, lr=0.02)


@each_representative
def test_the_live_param_groups_hold_one_key_from_construction_to_removal(name, mode):
    model = Toy()
    plain = make(name, model.parameters())
    keys = set(plain.param_groups[0])
    optimizer = put_on(plain, model, mode)

    def assert_one_key_more():
        [group] = optimizer.param_groups
        assert set(group) == keys | {"gradbalance"}
        assert group["gradbalance"] == ()

    assert_one_key_more()
    for step in range(2):
        train(model, optimizer, [step])
        assert_one_key_more()
        state = optimizer.state_dict()
        (remembered,) = state["param_groups"][0]["gradbalance"]
        assert isinstance(remembered, dict)
        assert optimizer.state_dict()["param_groups"] == state["param_groups"]
        assert_one_key_more()
        optimizer.load_state_dict(state)
        assert_one_key_more()
        del state["param_groups"][0]["gradbalance"]  # of a plain optimizer
        optimizer.load_state_dict(state)
        assert_one_key_more()
    optimizer.remove()
    assert set(optimizer.param_groups[0]) == keys


@each_representative
def test_a_checkpoint_that_the_optimizer_refuses_changes_nothing(name, mode):
    smaller = Toy()
    other = put_on(make(name, list(smaller.parameters())[:-1]), smaller, mode, "own")
    train(smaller, other, range(3))
    [state] = saved(other)
    model, untouched = Toy(), Toy()
    optimizer, alone = (
        put_on(make(name, m.parameters()), m, mode, "own") for m in (model, untouched)
    )
    train(model, optimizer, range(2))
    train(untouched, alone, range(2))
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(state)
    assert train(model, optimizer, range(2, 5)) == train(untouched, alone, range(2, 5))
    assert_same_parameters(model, untouched, tolerance=0)


def test_the_contract_covers_every_class_of_torch_optim():
    classes = {n for n in torch.optim.__all__ if inspect.isclass(getattr(torch.optim, n))}
    assert classes - {"Optimizer", "LBFGS", "SparseAdam"} == {
        case.name.split("-")[0] for case in TORCH
    }


@each_representative
def test_a_step_that_raised_leaves_no_trace(name, mode):
    base = getattr(torch.optim, name)

    class Fragile(base):
        """Fails when told to, and steps by its base class's step, which has hooks of its own."""

        fails = False

        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    model, twin = (
        Toy(),
        ByHand(lambda g: base(g, lr=0.02), Toy(), mode, by_rate=base is not torch.optim.Rprop),
    )
    optimizer = put_on(Fragile(model.parameters(), lr=0.02), model, mode)
    shown = copy.deepcopy(optimizer.state_dict()["param_groups"][0]["lr"])
    seen = []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.fails = optimizer.optimizer.fails = step == 1
        if step == 1:
            with pytest.raises(MemoryError):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == shown
        assert len(optimizer.param_groups) == 1
        seen.append(optimizer.coefficients())
    expected = []
    for step in range(4):
        twin.optimizer.zero_grad()
        loss_of(twin.model, step).backward()
        if step == 1:
            twin.decide()
        else:
            twin.step()
        expected.append(twin.coefficients)
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin.model)


@each_representative
def test_a_step_that_calls_the_step_of_its_base_class_counts_once(name, mode):
    base = getattr(torch.optim, name)

    class Derived(base):
        def step(self, closure=None):
            return super().step(closure)

    model = Toy()
    twin = ByHand(lambda g: base(g, lr=0.02), Toy(), mode, "coherence", by_rate=name != "Rprop")
    optimizer = put_on(Derived(model.parameters(), lr=0.02), model, mode, "coherence")
    seen = train(model, optimizer, range(3), observe=False)
    assert optimizer.balance.step == 3
    assert_same_coefficients(seen, twin.train(range(3), observe=False))
    assert_same_parameters(model, twin.model)


@pytest.mark.parametrize("case", [case for case in TORCH if not case.variant], ids=str)
def test_a_gradient_whose_scale_cancels_is_warned_of_at_construction(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped(case, "gradient")
        wrapped(case, "gradient", rules.Watch())
    assert len(caught) == (case.name != "SGD")
    assert all(
        w.category is UserWarning and "does nothing lasting" in str(w.message) for w in caught
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", [True, False])
def test_lbfgs_is_refused(mode, named, record_property):
    model = Toy()
    parameters = list(model.named_parameters()) if named else list(model.parameters())
    with refused(record_property, ValueError, "LBFGS, which evaluates the closure many times"):
        put_on(torch.optim.LBFGS(parameters), model, mode)


@pytest.mark.parametrize("cls", GRADIENT_ONLY)
def test_a_step_that_can_be_scaled_neither_by_a_rate_nor_afterwards_is_refused(
    cls, record_property
):
    model = Toy()
    with refused(record_property, ValueError, 'Use `apply_to="gradient"`, or another optimizer'):
        put_on(cls(model.parameters()), model)


def test_an_optimizer_that_holds_no_group_is_refused(record_property):
    """As where each parameter has an optimizer of its own, which steps in backward."""
    model = Toy()
    adamw = torch.optim.AdamW([model.text.weight])
    message = "must hold parameters of the optimizer"
    partly = pytest.warns(UserWarning, match="does not have 1 of the 2 trainable parameters")
    with partly, refused(record_property, ValueError, message):
        ConflictAwarePenalty(adamw, groups_of(model))
    with refused(record_property, ValueError, "at least two groups"):
        ConflictAwarePenalty(adamw, {"text": [model.text.weight]})


class Noting(torch.optim.SGD):
    """Writes its rate into the param_group, as schedule-free does with its sums."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["noted"] = group["lr"]


def test_of_what_the_step_writes_that_of_the_parameters_that_are_not_scaled_stays():
    model = Toy()
    optimizer = ConflictAwarePenalty(
        Noting(model.parameters(), lr=0.1),
        groups_of(model),
        rules.ByHand(text=2.0, audio=0.5, visual=3.0),
    )
    train(model, optimizer, range(1), observe=False)
    assert optimizer.param_groups[0]["noted"] == 0.1


def test_a_class_of_torch_is_known_and_not_tried(monkeypatch):
    model = Toy()
    monkeypatch.setattr(
        torch.random, "fork_rng", None
    )  # with several GPUs it warns, and it starts CUDA
    assert "learning rate" in repr(put_on(torch.optim.AdamW(model.parameters()), model))
