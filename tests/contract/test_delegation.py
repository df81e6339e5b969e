"""Optimizers that hand some or all of their parameters to optimizers inside them."""

import pytest
import torch
from torch.optim import SGD, AdamW, Muon, Optimizer

from gradbalance import ConflictAwarePenalty, attach, rules
from gradbalance._torch.trial import way_to_scale
from tests.contract.fixed import Branches, assert_half_of_a_alone, feed


class MuonAndAdamW(Optimizer):
    """Matrices by Muon and the rest by AdamW, as in many training scripts; lists all parameters itself."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, {"lr": 0.02})
        self.muon = Muon([p for p in params if p.dim() == 2], lr=0.02, weight_decay=0.0)
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
        self.inside = {"even": AdamW(params[::2], weight_decay=0.0), "odd": SGD(params[1::2], lr=0.01)}
        super().__init__(params, {})
        self.param_groups = [group for inner in self.inside.values() for group in inner.param_groups]

    def step(self, closure=None):
        for inner in self.inside.values():
            inner.step()


class Around(Optimizer):
    """Hands everything to one optimizer, under a name of its own."""

    def __init__(self, inner):
        self.wrapped_one = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure=None):
        return self.wrapped_one.step(closure)


class FromCopies(Optimizer):
    """Works every place out from a copy of the start."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    start, total = state.setdefault("start", p.clone()), state.setdefault("sum", torch.zeros_like(p))
                    p.copy_(start - total.add_(0.01 * p.grad))


class WithCopiesInside(MuonAndAdamW):
    def __init__(self, params):
        super().__init__(params)
        self.adamw = FromCopies(self.adamw.param_groups[0]["params"])


def test_one_for_matrices_and_one_for_the_rest_are_scaled_around_the_outer_step():
    assert_half_of_a_alone(lambda model: MuonAndAdamW(model.parameters()), "displacement")


def test_a_container_of_one_for_each_part_is_scaled_around_the_outer_step():
    make = lambda model: Container([model.a, model.b, model.head], lr=0.01, weight_decay=0.0)  # noqa: E731
    assert_half_of_a_alone(make, "displacement")


def test_inner_optimizers_in_a_dict_are_found():
    assert_half_of_a_alone(lambda model: ByName(model.parameters()), "displacement")


def test_a_single_inner_one_is_what_is_scaled():
    assert_half_of_a_alone(lambda model: Around(AdamW(model.parameters(), weight_decay=0.0)), "learning rate")


def test_an_inner_one_that_keeps_copies_is_refused():
    model = Branches()
    with pytest.raises(ValueError, match="Got WithCopiesInside, which does not follow it and keeps copies"):
        attach(WithCopiesInside(model.parameters()), model.groups)


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


class Once(Around):
    """Stops early."""

    def step(self, closure=None):
        if not hasattr(self, "done"):
            self.done = True
            super().step(closure)


def test_a_wrapper_is_tried_with_what_it_wraps():
    def around(cls):
        return cls(AdamW(Branches().parameters(), weight_decay=0.0))

    with pytest.raises(ValueError, match="Got Rescaling, which makes of the steps of AdamW others"):
        way_to_scale(around(Rescaling))
    for cls in (Around, Bounded, SlowlyAround, NeedsAModel):
        way = way_to_scale(around(cls))
        assert way.name == "learning rate"


@pytest.mark.parametrize("steps", [0, 1])
def test_a_wrapper_that_stops_is_tried_from_its_first_step_on_and_once_stepped_not_at_all(steps):
    model = Branches()
    optimizer = Once(AdamW(model.parameters(), weight_decay=0.0))
    for step in range(steps):
        feed(model, step)
        optimizer.step()
    assert way_to_scale(optimizer).name == "learning rate"


def test_the_wrapper_of_a_framework_is_not_tried():
    class OfAFramework(Rescaling):
        __module__ = "accelerate.optimizer"

    way = way_to_scale(OfAFramework(AdamW(Branches().parameters(), weight_decay=0.0)))
    assert way.name == "learning rate"
