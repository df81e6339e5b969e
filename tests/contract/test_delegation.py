"""Optimizers that hand some or all of their parameters to optimizers inside them."""

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from gradbalance import ConflictAwarePenalty, attach, rules
from tests.contract.fixed import Branches, assert_half_of_a_alone, feed
from tests.contract.oracle import refused
from tests.old_torch import needs_torch


class MuonAndAdamW(Optimizer):
    """Matrices by Muon and the rest by AdamW, as in many training scripts; lists all parameters itself."""

    def __init__(self, params):
        needs_torch("torch.optim.Muon")
        params = list(params)
        super().__init__(params, {"lr": 0.02})
        self.muon = torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.02, weight_decay=0.0)
        self.adamw = AdamW([p for p in params if p.dim() != 2], lr=0.01, weight_decay=0.0)

    def step(self, closure=None):
        self.muon.step()
        self.adamw.step()


class Container(Optimizer):
    """As torchtitan's OptimizersContainer: an optimizer for each part of the model."""

    def __init__(self, parts, **options):
        self.optimizers = [AdamW(part.parameters(), **options) for part in parts]
        parameters = [p for part in parts for p in part.parameters()]
        Optimizer.__init__(self, parameters, options)

    def step(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


class ByName(Optimizer):
    """Optimizers in a dict, and a list of param_groups that is shared with them."""

    def __init__(self, params):
        params = list(params)
        self.inside = {
            "even": AdamW(params[::2], weight_decay=0.0),
            "odd": SGD(params[1::2], lr=0.01),
        }
        super().__init__(params, {})
        self.param_groups = [
            group for inner in self.inside.values() for group in inner.param_groups
        ]

    def step(self, closure=None):
        for inner in self.inside.values():
            inner.step()


class Around(Optimizer):
    """Hands everything to one optimizer, under a name of its own."""

    def __init__(self, inner):
        self.wrapped_one = inner
        self.param_groups, self.state, self.defaults = (
            inner.param_groups,
            inner.state,
            inner.defaults,
        )

    def step(self, closure=None):
        return self.wrapped_one.step(closure)


CONTAINERS = {
    "MuonAndAdamW": lambda model: MuonAndAdamW(model.parameters()),
    "Container": lambda model: Container([model.a, model.b, model.head], lr=0.01, weight_decay=0.0),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_cannot_be_built_anew_is_refused_by_name_with_the_way_out(
    name, record_property
):
    model = Branches()
    with refused(
        record_property, ValueError, f"Got {name}, which fails in a trial.*apply_to=.displacement."
    ):
        attach(CONTAINERS[name](model), model.groups)


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_scaled_around_its_outer_step_if_the_user_says_so(name):
    assert_half_of_a_alone(CONTAINERS[name], "displacement", apply_to="displacement")


def test_inner_optimizers_in_a_dict_are_found():
    assert_half_of_a_alone(lambda model: ByName(model.parameters()), "displacement")


def test_a_single_inner_one_is_what_is_scaled():
    assert_half_of_a_alone(
        lambda model: Around(AdamW(model.parameters(), weight_decay=0.0)), "learning rate"
    )


def test_a_single_inner_one_counts_each_of_its_steps():
    model = Branches()
    optimizer = Around(AdamW(model.parameters(), weight_decay=0.0))
    optimizer = ConflictAwarePenalty(optimizer, model.groups, rule=rules.ByHand(a=0.5))
    for step in range(20):
        feed(model, step)
        optimizer.step()
    assert optimizer.balance.step == 20


class Rescaling(Around):
    """Goes as far in all as the longest step that its inner one has taken."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in params]
        super().step(closure)
        with torch.no_grad():
            total = sum((p - b).square().sum() for p, b in zip(params, before, strict=True)).sqrt()
            for p, b in zip(params, before, strict=True):
                p.copy_(b + (p - b) * 0.01 / total)


class SlowlyAround(Around):
    """As Lookahead: each fifth step goes back half of the way."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.slow = getattr(self, "slow", [p.detach().clone() for p in params])
        self.count = getattr(self, "count", 0) + 1
        super().step(closure)
        if self.count % 5 == 0:
            with torch.no_grad():
                for p, slow in zip(params, self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))


class Bounded(Around):
    """Cuts steps longer than 1."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in params]
        super().step(closure)
        with torch.no_grad():
            length = sum((p - b).square().sum() for p, b in zip(params, before, strict=True)).sqrt()
            for p, b in zip(params, before, strict=True):
                p.copy_(b + (p - b) / max(1.0, length))


class NeedsAModel(Around):
    def step(self, closure=None):
        if not hasattr(self.param_groups[0]["params"][0], "model"):
            raise AttributeError("model")
        return super().step(closure)


def around(cls, model):
    return cls(AdamW(model.parameters(), weight_decay=0.0))


@pytest.mark.parametrize("cls", [Around, Bounded, SlowlyAround])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_wrapper_that_follows_the_rate_is_known_from_a_trial_whatever_its_own_steps_so_far(
    cls, steps
):
    model = Branches()
    optimizer = around(cls, model)
    for step in range(steps):
        feed(model, step)
        optimizer.step()
    assert "update by learning rate" in repr(attach(optimizer, model.groups))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Rescaling, "which changes what the steps of AdamW do"),
        (NeedsAModel, "which fails in a trial.*apply_to=.learning_rate."),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_wrapper_that_changes_the_step_or_cannot_be_tried_is_refused_by_name(
    cls, why, steps, record_property
):
    model = Branches()
    optimizer = around(cls, model)
    for step in range(steps):
        feed(model, step)
        for p in model.parameters():
            p.model = model
        optimizer.step()
    with refused(record_property, ValueError, f"Got {cls.__name__}, {why}"):
        attach(optimizer, model.groups)


def test_the_choice_of_the_user_is_not_tried():
    def make(model):
        for p in model.parameters():
            p.model = model
        return around(NeedsAModel, model)

    assert_half_of_a_alone(make, "learning rate", apply_to="learning_rate")
    assert_half_of_a_alone(make, "displacement", apply_to="displacement")


def test_the_wrapper_of_a_framework_is_not_tried():
    class OfAFramework(Rescaling):
        __module__ = "accelerate.optimizer"

    model = Branches()
    optimizer = around(OfAFramework, model)
    assert "update by learning rate" in repr(attach(optimizer, model.groups))
