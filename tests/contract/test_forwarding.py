"""What is read, called and written on the wrapper reaches the optimizer that it wraps."""

import inspect

import pytest
import torch
from torch.optim import SGD, Optimizer

from gradbalance import ConflictAwarePenalty, rules
from tests.contract.oracle import Toy, groups_of, loss_of, put_on

PUBLIC_METHODS = [
    name
    for name, value in inspect.getmembers(Optimizer, inspect.isfunction)
    if not name.startswith("_")
    and not isinstance(inspect.getattr_static(Optimizer, name), staticmethod)
]


class Noisy(Optimizer):
    """As Opacus' DPOptimizer: adds noise to the gradients, then steps the optimizer inside."""

    def __init__(self, optimizer, noise_multiplier):
        self.original_optimizer = optimizer
        self.noise_multiplier = noise_multiplier
        self.amounts = []  # of noise, step by step

    defaults = property(lambda self: self.original_optimizer.defaults)
    state = property(lambda self: self.original_optimizer.state)

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups):
        self.original_optimizer.param_groups = param_groups

    def step(self, closure=None):
        self.amounts.append(self.noise_multiplier)
        return self.original_optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.original_optimizer.zero_grad(set_to_none)


@pytest.fixture
def noisy():
    model = Toy()
    inner = Noisy(SGD(model.parameters(), lr=0.1), 1.0)
    optimizer = ConflictAwarePenalty(
        inner, groups_of(model), rules.ByHand(audio=0.5), apply_to="learning_rate"
    )
    loss_of(model, 0).backward()
    return inner, optimizer


def test_an_attribute_set_on_the_wrapper_is_that_of_the_wrapped_optimizer_in_its_step(noisy):
    inner, optimizer = noisy
    for _ in range(3):  # as a scheduler of the noise does
        optimizer.step()
        optimizer.noise_multiplier *= 0.1
    assert inner.amounts == pytest.approx([1.0, 0.1, 0.01])
    assert optimizer.noise_multiplier == inner.noise_multiplier == pytest.approx(0.001)


def test_an_attribute_that_the_wrapped_optimizer_did_not_have_is_set_and_deleted_there(noisy):
    inner, optimizer = noisy
    optimizer.expected_batch_size = 8
    assert inner.expected_batch_size == 8
    del optimizer.expected_batch_size
    assert not hasattr(inner, "expected_batch_size")


def test_param_groups_that_are_replaced_on_the_wrapper_are_those_that_step(noisy):
    inner, optimizer = noisy
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.0}]
    assert inner.original_optimizer.param_groups[0]["lr"] == 0.0
    optimizer.step()
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))


def test_a_method_that_is_patched_on_the_wrapper_stays_there(noisy):
    inner, optimizer = noisy
    steps = []
    original = optimizer.step

    def counted(*args):
        steps.append(len(inner.amounts))
        return original(*args)

    optimizer.step = counted
    optimizer.step()
    inner.step()
    assert (steps, len(inner.amounts)) == ([0], 2)
    del optimizer.step
    optimizer.step()
    assert (steps, len(inner.amounts)) == ([0], 3)


@pytest.mark.parametrize("name", PUBLIC_METHODS)
def test_a_public_method_called_on_the_wrapper_is_that_of_the_wrapped_optimizer(name):
    received = []

    def method(self, *args, **kwargs):
        if not isinstance(optimizer, ConflictAwarePenalty):  # while both are built
            return getattr(super(Own, self), name)(*args, **kwargs)
        received.append((args, kwargs))
        return "returned"

    Own = type("Own", (SGD,), {name: method})
    model, optimizer = Toy(), None
    inner = Own(model.parameters(), lr=0.1)
    optimizer = ConflictAwarePenalty(
        inner, groups_of(model), rules.ByHand(audio=0.5), apply_to="learning_rate"
    )
    returned = getattr(optimizer, name)(1, option=2)
    assert received == [((1,), {"option": 2})]
    assert returned == (
        None if name in ("zero_grad", "add_param_group", "load_state_dict") else "returned"
    )


def test_a_method_of_the_wrapped_optimizer_alone_is_called_on_it():
    class WithModes(SGD):
        def eval(self, mode=True):
            return self, mode

    model = Toy()
    inner = WithModes(model.parameters(), lr=0.1)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), apply_to="learning_rate")
    assert optimizer.eval(False) == (inner, False)
    with pytest.raises(AttributeError, match="train"):
        optimizer.train()


def test_a_state_that_is_set_on_the_wrapper_is_that_of_the_wrapped_optimizer():
    model = Toy()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = put_on(inner, model)
    optimizer.__setstate__({"state": {}, "param_groups": optimizer.param_groups, "mark": 1})
    assert inner.mark == 1
    assert not {"state", "param_groups", "mark"} & set(vars(optimizer))
    before = vars(type(optimizer))["step"]
    optimizer._patch_step_function()
    assert vars(type(optimizer))["step"] is before
