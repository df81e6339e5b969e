"""What the trial of an optimizer finds out: how its steps can be scaled, or that they cannot."""

import random
import threading
import warnings

import pytest
import torch
from torch.optim import Optimizer

from gradbalance import ConflictAwarePenalty, attach, rules
from gradbalance._torch.twin import FAR, RATE, Twin, undisturbed
from tests.contract.fixed import Branches, assert_half_of_a_alone, displacements, feed


class Descent(Optimizer):
    """Plain descent, to be changed in one way at a time."""

    def __init__(self, params, lr=0.01, **others):
        super().__init__(params, {"lr": lr, **others})

    def rate(self, group, p):
        return group["lr"]

    def update(self, group, p):
        p.sub_(self.rate(group, p) * p.grad)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p)


class OwnRate(Descent):
    def rate(self, group, p):
        return 0.01


class OwnRateForVectors(Descent):
    def rate(self, group, p):
        return group["lr"] if p.dim() == 2 else 0.01


class OwnRateWhereFlagged(Descent):
    def rate(self, group, p):
        return 0.01 if group["flag"] else group["lr"]


class OwnRateWhereMarked(Descent):
    """As those that look up a mark on the parameter."""

    def rate(self, group, p):
        return 0.01 if getattr(p, "own_rate", False) else group["lr"]


class OwnRateForSmallGradients(Descent):
    def rate(self, group, p):
        return group["lr"] if p.grad.norm() > 1 else 0.01


class MomentumFromConstruction(OwnRate):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    def update(self, group, p):
        super().update(group, p)
        self.state[p]["momentum"].lerp_(p.grad, 1e-3)


class WithAverage(OwnRate):
    """Keeps an average of the parameters for evaluation."""

    def update(self, group, p):
        super().update(group, p)
        self.state[p].setdefault("average", p.clone()).lerp_(p, 0.5)


class LowRatesAlone(Descent):
    def rate(self, group, p):
        if group["lr"] >= 1:
            raise ValueError("the learning rate must be below 1")
        return group["lr"]


class Clipped(Descent):
    """As those of a critic: parameters stay within bounds, of which a trial at a high rate starts outside."""

    def update(self, group, p):
        super().update(group, p)
        p.clamp_(-10, 10)


class RateOfTheFirstStep(Descent):
    """As those that compute their own rate once, out of what the learning rate was then."""

    def rate(self, group, p):
        return self.state[p].setdefault("rate", group["lr"])


class Capped(Descent):
    """The cap falls from 1 and reaches a small rate late."""

    def rate(self, group, p):
        step = self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return min(group["lr"], step**-0.5)


class RateOfTheFirstGroup(Descent):
    """As Prodigy and D-Adaptation: one rate for all."""

    def rate(self, group, p):
        return self.param_groups[0]["lr"]


class RateByPosition(Descent):
    """As AdaBound: settings beside the param_groups, one for each of them."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.base_rates = [group["lr"] for group in self.param_groups]

    def step(self, closure=None):
        self.rates = dict(zip(map(id, self.param_groups), self.base_rates, strict=False))
        super().step()

    def rate(self, group, p):
        return self.rates[id(group)]


class WithViews(OwnRate):
    """As those of heavyball: keeps views of the parameters."""

    def update(self, group, p):
        super().update(group, p)
        self.state[p]["view"] = p.view(p.shape)


class AwayFromTheStart(Descent):
    """As MADGRAD: the place is worked out anew from a copy of the start."""

    def update(self, group, p):
        state = self.state[p]
        if not state:
            state["start"], state["sum"] = p.clone(), torch.zeros_like(p)
        state["sum"] += 0.01 * p.grad
        p.copy_(state["start"] - state["sum"])


class BackAfterLong(OwnRate):
    """Keeps a copy of the start for later than any trial lasts."""

    def update(self, group, p):
        super().update(group, p)
        self.state[p].setdefault("start", p.clone())


class SlowWeights(Descent):
    """As Ranger: each fifth step goes back half of the way, to a copy."""

    def update(self, group, p):
        super().update(group, p)
        state = self.state[p]
        slow = state.setdefault("slow", p.clone())
        state["step"] = state.get("step", 0) + 1
        if state["step"] % 5 == 0:
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class NonNegative(Descent):
    """As those of factorisations without negative parts."""

    def update(self, group, p):
        super().update(group, p)
        p.clamp_(min=0)


class OneForAll(Descent):
    """How far a parameter moves depends on where all of them are."""

    def step(self, closure=None):
        total = sum(float(p.sum()) for group in self.param_groups for p in group["params"])
        self.start = getattr(self, "start", total)
        self.common = 0.01 * (1.5 + torch.tanh(torch.tensor(total - self.start)).item())
        super().step()

    def rate(self, group, p):
        return self.common


class InBackward(Descent):
    """As LOMO: `step` is there for the looks."""

    def step(self, closure=None):
        return None


class WithClosure(Descent):
    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise ValueError("a closure is needed")
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


class WithSecondDerivatives(Descent):
    """As AdaHessian: gradients of gradients."""

    def update(self, group, p):
        if p.grad.grad_fn is None:
            raise RuntimeError("a graph of the gradients is needed")
        with torch.enable_grad():
            (hessian,) = torch.autograd.grad(p.grad.sum(), p, retain_graph=True)
        p.sub_(self.rate(group, p) * p.grad.detach() / hessian)

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        super().step()


class Stochastic(Descent):
    def update(self, group, p):
        p.sub_(group["lr"] * p.grad * (torch.rand_like(p) < 0.5) * (random.random() < 0.9))


class Locked(OwnRate):
    """Something in it cannot be copied."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.lock = threading.Lock()


class SetUpAtConstruction(Descent):
    """As torch's Adagrad: state is there before the first step, of parameters and of none."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.state["all"] = 0
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.zeros_like(p)

    def update(self, group, p):
        self.state["all"] += 1
        p.sub_(group["lr"] * self.state[p]["sum"].add_(p.grad))


class InTrainMode(Descent):
    """As schedule-free ones: built for evaluation, set to training by the loop."""

    def train(self):
        for group in self.param_groups:
            group["training"] = True

    @torch.no_grad()
    def step(self, closure=None):
        if not all(group.get("training") for group in self.param_groups):
            raise RuntimeError("not in train mode")
        super().step()


class SlowFromConstruction(Descent):
    """Slow weights that are copied when it is built."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for p in self.param_groups[0]["params"]:
            self.state[p].update(slow=p.detach().clone(), step=0)

    def update(self, group, p):
        super().update(group, p)
        state = self.state[p]
        state["step"] += 1
        if state["step"] % 5 == 0:
            p.copy_(state["slow"].lerp_(p, 0.5))


class RateInTheStart(Descent):
    """As Gravity: the momentum starts from random numbers, divided by the learning rate."""

    def update(self, group, p):
        velocity = self.state[p].setdefault("velocity", torch.randn(p.shape) * 0.1 / group["lr"])
        p.sub_(group["lr"] * velocity.mul_(0.9).add_(p.grad))


class Projected(Descent):
    """As Nero: parameters have the length 1 from the first step on."""

    def update(self, group, p):
        super().update(group, p)
        p.div_(p.norm())


class TracedBySize(Descent):
    """Fails where a parameter is not as large as the true one."""

    def update(self, group, p):
        p.view(30, 20).sub_(self.rate(group, p) * p.grad.view(30, 20))


def of(cls, **options):
    return lambda model: cls(model.parameters(), **options)


@pytest.mark.parametrize(
    "cls", [Descent, LowRatesAlone, Clipped, SlowWeights, SlowFromConstruction, SetUpAtConstruction]
)
def test_a_step_that_follows_the_rate_is_scaled_by_it(cls):
    assert_half_of_a_alone(of(cls), "learning rate")


@pytest.mark.parametrize(
    "cls",
    [
        OwnRate,
        OwnRateForVectors,
        OwnRateForSmallGradients,
        RateOfTheFirstStep,
        RateInTheStart,
        RateOfTheFirstGroup,
        RateByPosition,
        MomentumFromConstruction,
        Locked,
        WithViews,
    ],
)
def test_a_step_that_does_not_follow_the_rate_everywhere_is_scaled_after_the_fact(cls):
    assert_half_of_a_alone(of(cls), "displacement")


@pytest.mark.parametrize("lr", [1.0, 0.001])
def test_a_cap_on_the_rate_is_found_however_late_it_shows(lr):
    assert_half_of_a_alone(of(Capped, lr=lr), "displacement")


def test_param_groups_of_other_settings_are_tried_too():
    def make(model):
        first, rest = list(model.a.parameters()), [*model.b.parameters(), *model.head.parameters()]
        return OwnRateWhereFlagged([{"params": rest, "flag": False}, {"params": first, "flag": True}])

    assert_half_of_a_alone(make, "displacement")


def test_parameters_with_other_marks_are_tried_too():
    def make(model):
        model.b[1].weight.own_rate = True
        return OwnRateWhereMarked(model.parameters())

    assert_half_of_a_alone(make, "displacement")


def test_parameters_on_the_meta_device_are_tried_on_the_cpu():
    model = Branches()
    model.a[0].to("meta")
    optimizer = ConflictAwarePenalty(of(Descent)(model), model.groups, rule=rules.ByHand(a=0.5))
    assert "update by learning rate" in repr(optimizer)


def test_a_momentum_of_single_numbers_is_not_taken_for_a_copy():
    a, b = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    optimizer = ConflictAwarePenalty(MomentumFromConstruction([a, b]), {"a": [a], "b": [b]}, rule=rules.ByHand(a=0.5))
    assert "update by displacement" in repr(optimizer)


@pytest.mark.parametrize(("lr", "at_one", "rate"), [(0.01, False, RATE), (0.01, True, 1.0), (3.0, True, 3.0)])
def test_a_twin_has_two_toys_of_a_kind_of_a_size_like_the_rate_and_no_weight_decay(lr, at_one, rate):
    optimizer = of(Descent, lr=lr, weight_decay=0.1)(Branches())
    twin = Twin(optimizer, optimizer, at_one=at_one, with_state=False)
    (group,) = twin.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (rate, 0.0)
    assert [tuple(p.shape) for p in twin.toys] == [(6, 4), (3, 6), (6,), (3,)]
    entries = torch.cat([p.detach().flatten() for p in twin.toys])
    assert {*entries.sign().tolist()} == {-1.0, 1.0}
    assert FAR * rate <= entries.abs().min() < entries.abs().max() <= 2 * FAR * rate


def test_the_closure_of_a_twin_gives_the_gradients_asked_for_and_a_hessian_of_the_identity():
    optimizer = of(WithClosure)(Branches())
    twin = Twin(optimizer, optimizer, at_one=False, with_state=False)
    gradients = twin.gradients(agreeing=False)
    with undisturbed():  # torch warns of graphs of gradients
        twin.step(gradients, with_closure=True)
    for p, g in zip(twin.toys, gradients, strict=True):
        assert torch.equal(p.grad, g)
        (hessian,) = torch.autograd.grad(p.grad.sum(), p)
        assert torch.equal(hessian, torch.ones_like(p))


@pytest.mark.parametrize("cls", [torch.optim.Adafactor, torch.optim.Rprop])
def test_torchs_own_with_a_schedule_inside_are_scaled_after_the_fact(cls):
    assert_half_of_a_alone(of(cls, lr=0.001), "displacement")


def test_random_steps_are_compared_with_the_same_random_numbers():
    _, optimizer = displacements(of(Stochastic), rule=rules.ByHand(a=0.5))
    assert "update by" in repr(optimizer)


@pytest.mark.parametrize("cls", [WithClosure, WithSecondDerivatives])
def test_what_needs_a_closure_or_second_derivatives_is_tried_with_them(cls):
    model = Branches()
    optimizer = ConflictAwarePenalty(of(cls)(model), model.groups, rule=rules.ByHand(a=0.5))
    assert "update by learning rate" in repr(optimizer)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (AwayFromTheStart, "keeps copies of the parameters"),
        (WithAverage, "keeps copies of the parameters"),
        (BackAfterLong, "keeps copies of the parameters"),
        (InBackward, "hardly moves parameters"),
        (NonNegative, "steps of some parameters change those of others"),
        (Projected, "steps of some parameters change those of others"),
        (OneForAll, "steps of some parameters change those of others"),
    ],
)
def test_what_cannot_be_scaled_is_refused_by_its_name(cls, why):
    model = Branches()
    with pytest.raises(ValueError, match=f"(?s)`apply_to.*Got {cls.__name__}, .*{why}"):
        attach(of(cls)(model), model.groups)


def test_what_cannot_be_tried_is_refused_with_its_own_words():
    weight, other = (torch.nn.Parameter(torch.ones(600)) for _ in range(2))
    with pytest.raises(ValueError, match=r"TracedBySize, which fails on a twin with small parameters.*shape"):
        attach(TracedBySize([weight, other]), {"a": [weight], "b": [other]})


def test_a_refusal_advises_the_gradient_mode_only_where_the_step_follows_the_gradient():
    class SignAwayFromTheStart(AwayFromTheStart):
        def update(self, group, p):
            p.grad = p.grad.sign()
            super().update(group, p)

    model = Branches()
    with pytest.raises(ValueError, match='Use `apply_to="gradient"`, or another optimizer'):
        attach(of(AwayFromTheStart)(model), model.groups)
    with pytest.raises(ValueError, match=r"parameters\. Use another optimizer\.$"):
        attach(of(SignAwayFromTheStart)(model), model.groups)


@pytest.mark.parametrize("cls", [Descent, OwnRate, Stochastic])
def test_a_trial_leaves_no_trace(cls):
    model = Branches()
    optimizer = of(cls)(model)
    feed(model, 0)
    optimizer.step()
    state, numbers = repr(optimizer.state_dict()), (torch.random.get_rng_state(), random.getstate())
    values = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = attach(optimizer, model.groups, persist=False)
    assert repr(optimizer.state_dict()) == state
    assert torch.equal(torch.random.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    handle.remove()


def test_a_rate_of_zero_before_a_warm_up_is_no_obstacle():
    model = Branches()
    optimizer = ConflictAwarePenalty(of(Descent, lr=0.0)(model), model.groups, rule=rules.ByHand(a=0.5))
    assert "update by learning rate" in repr(optimizer)


def test_what_steps_in_a_mode_of_training_alone_is_tried_in_it():
    model = Branches()
    optimizer = of(InTrainMode)(model)
    optimizer = ConflictAwarePenalty(optimizer, model.groups, rule=rules.ByHand(a=0.5))
    assert "update by learning rate" in repr(optimizer)
    assert "training" not in optimizer.param_groups[0]


def test_a_rate_in_a_tensor_is_tried_as_a_tensor():
    assert_half_of_a_alone(of(Descent, lr=torch.tensor(0.01)), "learning rate")


def test_no_trial_is_held_where_nothing_is_scaled():
    model = Branches()
    attach(of(InBackward)(model), model.groups, rule=rules.Watch())
