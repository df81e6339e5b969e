"""Scaling of steps by the learning rate and by displacement, without an engine around it."""

import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gradbalance import attach, rules
from gradbalance._optimizer.scaling import Displacement, LearningRates
from tests.contract.fixed import Branches, feed

SCALINGS = [LearningRates, Displacement]


def three(shape=(4, 3)):
    return [nn.Parameter(torch.ones(shape)) for _ in range(3)]


def give_gradients(parameters):
    for p in parameters:
        p.grad = torch.ones_like(p)


def scaled_step(scaling, optimizer, parameters, factors=(0.5, 1.0)):
    """One step of an optimizer whose first parameters are in groups 0, 1, ..., by these factors."""
    scaling.divide({id(p): m for m, p in enumerate(parameters[: len(factors)])})
    scaling.begin(factors)
    optimizer.step()
    scaling.end()


@pytest.mark.parametrize("kind", SCALINGS)
def test_each_group_moves_by_its_factor_and_the_others_as_before(kind):
    parameters = three()
    optimizer = SGD(parameters, lr=0.1)
    give_gradients(parameters)
    scaled_step(kind(optimizer), optimizer, parameters, (0.5, 3.0))
    for p, moved in zip(parameters, (0.05, 0.3, 0.1), strict=True):
        torch.testing.assert_close(p, torch.ones_like(p) - moved)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("where", [0, 1])
def test_an_empty_param_group_steps_as_under_the_plain_optimizer(kind, where):
    parameters = three()
    param_groups = [{"params": parameters}]
    param_groups.insert(where, {"params": [], "weight_decay": 0.0})
    optimizer = AdamW(param_groups, lr=0.1, weight_decay=0.0)
    scaling = kind(optimizer)
    for _ in range(2):
        give_gradients(parameters)
        scaled_step(scaling, optimizer, parameters)
    torch.testing.assert_close(parameters[0], torch.full((4, 3), 0.9))
    torch.testing.assert_close(parameters[2], torch.full((4, 3), 0.8))
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 3][:: 1 - 2 * where]


@pytest.mark.parametrize("scaling", ["learning_rate", "displacement"])
def test_an_empty_param_group_changes_nothing_under_a_penalty(scaling):
    def run(empty):
        model = Branches()
        param_groups = [{"params": list(model.parameters())}]
        if empty:
            param_groups.append({"params": [], "weight_decay": 0.5})
        optimizer = AdamW(param_groups)
        attach(optimizer, model.groups, rules.ByHand(a=0.5), apply_to=scaling)
        for step in range(2):
            feed(model, step)
            optimizer.step()
        return list(model.parameters())

    assert all(map(torch.equal, run(empty=True), run(empty=False)))


@pytest.mark.parametrize("kind", SCALINGS)
def test_neither_keeps_the_optimizer_nor_refers_weakly_to_parameters(kind):
    parameters = three()
    optimizer = SGD(parameters, lr=0.1)
    optimizer.scaling = kind(optimizer)
    give_gradients(parameters)
    scaled_step(optimizer.scaling, optimizer, parameters)
    assert not any(weakref.getweakrefs(p) for p in parameters)
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None


@pytest.mark.parametrize("kind", SCALINGS)
def test_parameters_can_be_swapped_after_a_step(kind):
    model = Branches()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaling = kind(optimizer)
    scaling.divide({id(p): 0 for p in model.a.parameters()})
    feed(model, 0)
    scaling.begin([0.5])
    optimizer.step()
    scaling.end()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(
        p.dtype is torch.float64 for group in optimizer.param_groups for p in group["params"]
    )


def test_a_learning_rate_in_a_tensor_stays_one_and_the_users_own_is_put_back():
    parameters = three()
    lr = torch.tensor(0.1)
    optimizer = Adam(parameters, lr=lr, capturable=False, foreach=False)
    scaling = LearningRates(optimizer)
    scaling.divide({id(parameters[0]): 0})
    scaling.begin([0.5])
    scaled, ungrouped = optimizer.param_groups
    assert ungrouped["lr"] is lr
    assert isinstance(scaled["lr"], torch.Tensor)
    assert scaled["lr"].device == lr.device
    assert scaled["lr"].item() == pytest.approx(0.05)
    scaling.end()
    assert optimizer.param_groups[0]["lr"] is lr


def test_the_parameters_of_a_step_stay_in_order_so_that_each_draws_its_own_random_numbers():
    parameters = three()
    optimizer = SGD(parameters, lr=0.1)
    scaling = LearningRates(optimizer)
    scaling.divide({id(parameters[0]): 1, id(parameters[1]): 0})
    scaling.begin([0.5, 2.0])
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(stepped, parameters, strict=True))
    scaling.end()


class NeverRead(torch.Tensor):
    """As a tensor on an accelerator whose values the host must not wait for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "__float__", "__bool__", "tolist", "__index__", "__int__"):
            raise AssertionError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", SCALINGS)
def test_no_value_of_a_tensor_is_read(kind):
    parameters = three()
    optimizer = SGD(parameters, lr=0.1)
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(0.1).as_subclass(NeverRead)
    group["count"] = torch.tensor(3.0).as_subclass(NeverRead)
    scaling = kind(optimizer)
    scaling.divide({id(p): m for m, p in enumerate(parameters[:2])})
    for factors in [(0.5, 2.0), (1.0, 1.0)]:
        scaling.begin(factors)
        scaling.end()
    assert optimizer.param_groups == [group]


class Noting(SGD):
    """Writes into its param_groups: a number, and in place into a tensor."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["noted"] = group["lr"]
            group.setdefault("count", torch.zeros(())).add_(1)


@pytest.mark.parametrize(
    ("factors", "noted"),
    [
        ((2.0, 0.5, 3.0), 0.05),  # of all three, the one closest to 1
        ((2.0, 0.5), 0.1),  # of the ungrouped parameter
        ((0.1, 1.0, 3.0), 0.1),
    ],
)
@pytest.mark.parametrize("tensors", [False, True])
def test_what_the_step_writes_stays_as_under_the_factor_closest_to_1(factors, noted, tensors):
    parameters = three()
    optimizer = Noting(parameters, lr=torch.tensor(0.1) if tensors else 0.1)
    scaling = LearningRates(optimizer)
    for _ in range(3):
        give_gradients(parameters)
        scaled_step(scaling, optimizer, parameters, factors)
    (group,) = optimizer.param_groups
    assert float(group["noted"]) == pytest.approx(noted)
    assert group["count"] == 3


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_end_may_come_twice_or_without_a_beginning(kind):
    parameters = three()
    optimizer = SGD(parameters, lr=0.1)
    scaling = kind(optimizer)
    scaling.end()
    give_gradients(parameters)
    scaled_step(scaling, optimizer, parameters)
    after = [p.detach().clone() for p in parameters]
    scaling.end()
    assert all(map(torch.equal, parameters, after))


def test_a_displacement_copies_only_what_moves_and_is_scaled():
    class Counting(nn.Parameter):
        copies = 0

        def detach(self):
            Counting.copies += 1
            return super().detach()

    parameters = [Counting(torch.ones(2)) for _ in range(4)]
    optimizer = SGD(parameters, lr=0.1)
    scaling = Displacement(optimizer)
    scaling.divide({id(p): min(m, 1) for m, p in enumerate(parameters[:3])})
    give_gradients(parameters[1:])
    scaling.begin([0.5, 1.0])
    assert Counting.copies == 0
    scaling.begin([0.5, 0.5])
    assert Counting.copies == 2
    scaling.end()


class ByItsOwnRate(Optimizer):
    """A step that the learning rate does not change, into new memory."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - 0.5 * p.grad


def test_a_displacement_finds_parameters_that_lie_elsewhere_after_the_step():
    parameters = three()
    optimizer = ByItsOwnRate(parameters)
    give_gradients(parameters)
    scaled_step(Displacement(optimizer), optimizer, parameters, (0.5, 1.0))
    for p, moved in zip(parameters, (0.25, 0.5, 0.5), strict=True):
        torch.testing.assert_close(p, torch.ones_like(p) - moved)


@pytest.mark.parametrize("apply_to", ["learning_rate", "displacement"])
def test_a_parameter_frozen_after_backward_moves_as_under_the_plain_optimizer(apply_to):
    model = Branches()
    frozen = model.a[0].weight
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model.groups, rules.ByHand(a=0.5), apply_to=apply_to)
    for step, moved in enumerate([0.05, 0.1]):
        feed(model, step)
        frozen.requires_grad_(step == 0)
        before = frozen.detach().clone()
        optimizer.step()
        torch.testing.assert_close(frozen.detach(), before - moved * frozen.grad)
