"""How the steps of an optimizer are scaled: what the table, the trial and the user decide."""

import copy
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from gradbalance import ConflictAwarePenalty, attach, rules
from tests.contract.fixed import Branches, displacements, feed
from tests.old_torch import needs_torch

BY_CHOICE = 'apply_to="learning_rate".*apply_to="displacement"'


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


class SlightlyTogether(OneForAll):
    """How far a parameter moves depends a little on where all of them are."""

    def rate(self, group, p):
        return 0.01 + 0.02 * self.common


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
        p.sub_(group["lr"] * p.grad * (torch.rand_like(p) < 0.5))


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


class Around(Optimizer):
    """Hands everything to one optimizer, under a name of its own."""

    def __init__(self, inner):
        self.wrapped_one = inner
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.defaults = inner.defaults

    def step(self, closure=None):
        return self.wrapped_one.step(closure)


class Rescaling(Around):
    """Goes as far in all as 0.01, however long the steps of its inner one are."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in params]
        super().step(closure)
        with torch.no_grad():
            moves = [p - b for p, b in zip(params, before, strict=True)]
            total = sum(move.square().sum() for move in moves).sqrt()
            for p, b, move in zip(params, before, moves, strict=True):
                p.copy_(b + move * 0.01 / total)


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


class NeedsAModel(Around):
    """Its step fails without what only the user's parameters have."""

    def step(self, closure=None):
        if not hasattr(self.param_groups[0]["params"][0], "model"):
            raise AttributeError("model")
        return super().step(closure)


class BuiltFromAModel(Around):
    def __init__(self, inner, model):
        super().__init__(inner)
        self.model = model


class Sharp(Optimizer):
    """As SAM: it builds its inner optimizer itself, and evaluates a closure at each step."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        torch.enable_grad()(closure)()
        self.base_optimizer.step()


class Container(Optimizer):
    """As torchtitan's OptimizersContainer: an optimizer for each part of the model."""

    def __init__(self, parts, **options):
        self.optimizers = [AdamW(part.parameters(), **options) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], options)

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


def of(cls, **options):
    return lambda model: cls(model.parameters(), **options)


def adamw(model):
    return AdamW(model.parameters(), weight_decay=0.0)


def assert_half_of_a_alone(make, scaling, **options):
    """Each parameter of branch a moves half as far as in the plain run, any other as far."""
    plain, _ = displacements(make)
    scaled, optimizer = displacements(make, rule=rules.ByHand(a=0.5), **options)
    assert f"update by {scaling}" in repr(optimizer)
    for name, moved in plain.items():
        assert moved.norm() > 0
        expected = moved * (0.5 if name.startswith("a.") else 1.0)
        assert (scaled[name] - expected).norm() <= 0.02 * moved.norm(), name


def wrapped(make, **options):
    model = Branches()
    rule = rules.ByHand(a=0.5)
    return ConflictAwarePenalty(make(model), model.groups, rule=rule, **options)


@pytest.mark.parametrize(
    "cls", [Descent, Clipped, SlowWeights, SlowFromConstruction, SetUpAtConstruction]
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
        WithViews,
    ],
)
def test_a_step_that_does_not_follow_the_rate_everywhere_is_rescaled_when_finished(cls):
    assert_half_of_a_alone(of(cls), "displacement")


@pytest.mark.parametrize("lr", [1.0, 0.001])
def test_a_cap_on_the_rate_is_found_however_late_it_shows(lr):
    assert_half_of_a_alone(of(Capped, lr=lr), "displacement")


@pytest.mark.parametrize("cls", [torch.optim.Adafactor, torch.optim.Rprop])
def test_torchs_own_with_a_schedule_inside_are_rescaled_when_finished(cls):
    assert_half_of_a_alone(of(cls, lr=0.001), "displacement")


def test_torchs_asgd_is_refused_for_updates_and_taken_for_gradients():
    with pytest.raises(ValueError, match=r'Got ASGD, which follows.*Use `apply_to="gradient"`'):
        wrapped(of(torch.optim.ASGD))


def test_a_class_of_torch_is_known_and_not_tried(monkeypatch):
    monkeypatch.setattr(AdamW, "step", None)
    assert "update by learning rate" in repr(attach(adamw(model := Branches()), model.groups))


def test_param_groups_of_other_settings_are_tried_too():
    def make(model):
        rest = [*model.b.parameters(), *model.head.parameters()]
        first = list(model.a.parameters())
        return OwnRateWhereFlagged(
            [{"params": rest, "flag": False}, {"params": first, "flag": True}]
        )

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


def test_an_empty_parameter_does_not_stand_in_the_way():
    empty = torch.nn.Parameter(torch.zeros(5, 0))
    model = Branches()
    optimizer = Descent([empty, *model.parameters()])
    penalty = attach(optimizer, {"a": [empty, *model.a.parameters()], "b": model.b})
    assert "update by learning rate" in repr(penalty)


def test_a_momentum_of_single_numbers_is_not_taken_for_a_copy():
    a, b = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    optimizer = MomentumFromConstruction([a, b])
    penalty = attach(optimizer, {"a": [a], "b": [b]})
    assert "update by displacement" in repr(penalty)


def test_random_steps_are_compared_with_the_same_random_numbers():
    _, optimizer = displacements(of(Stochastic), rule=rules.ByHand(a=0.5))
    assert "update by learning rate" in repr(optimizer)


@pytest.mark.parametrize("cls", [WithClosure, WithSecondDerivatives])
def test_what_needs_a_closure_or_second_derivatives_is_tried_with_them(cls):
    assert "update by learning rate" in repr(wrapped(of(cls)))


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
        (SlightlyTogether, "steps of some parameters change those of others"),
    ],
)
def test_what_cannot_be_scaled_is_refused_by_its_name(cls, why):
    model = Branches()
    with pytest.raises(ValueError, match=f"(?s)`apply_to.*Got {cls.__name__}, .*{why}"):
        attach(of(cls)(model), model.groups)


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


def test_a_trial_that_raises_is_a_refusal_with_its_words_and_the_way_out():
    a, b = (torch.nn.Parameter(torch.ones(600)) for _ in range(2))
    with pytest.raises(ValueError, match=f"Got TracedBySize, which fails.*shape.*{BY_CHOICE}"):
        attach(TracedBySize([a, b]), {"a": [a], "b": [b]})


def test_a_step_that_refuses_high_rates_is_not_taken_untried():
    with pytest.raises(ValueError, match=f"LowRatesAlone, which.*must be below 1.*{BY_CHOICE}"):
        wrapped(of(LowRatesAlone))


def test_an_optimizer_of_optimizers_is_refused_with_the_way_out_which_works():
    def make(model):
        return Container([model.a, model.b, model.head], lr=0.01, weight_decay=0.0)

    with pytest.raises(ValueError, match=f"Got Container, which fails.*{BY_CHOICE}"):
        wrapped(make)
    assert_half_of_a_alone(make, "displacement", apply_to="displacement")


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("cls", [Around, SlowlyAround])
def test_a_wrapper_is_tried_with_what_it_wraps_used_or_not(cls, steps):
    model = Branches()
    optimizer = cls(adamw(model))
    for step in range(steps):
        feed(model, step)
        optimizer.step()
    assert "update by learning rate" in repr(attach(optimizer, model.groups))


def test_a_wrapper_that_builds_its_inner_optimizer_is_tried_too():
    def make(model):
        return Sharp(model.parameters(), AdamW, weight_decay=0.0)

    assert "update by learning rate" in repr(wrapped(make))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda model: Rescaling(adamw(model)),
            r"changes what the steps of AdamW do\. Use another optimizer\.",
        ),
        (lambda model: NeedsAModel(adamw(model)), rf"fails in a trial.*model.*{BY_CHOICE}"),
        (lambda model: BuiltFromAModel(adamw(model), model), rf"fails in a trial.*{BY_CHOICE}"),
    ],
    ids=["rescales", "needs a model to step", "needs a model to be built"],
)
def test_a_wrapper_that_is_not_seen_to_work_is_refused_used_or_not(make, why, steps):
    model = Branches()
    model.a[0].weight.model = model
    optimizer = make(model)
    for step in range(steps):
        feed(model, step)
        optimizer.step()
    with pytest.raises(ValueError, match=f"(?s)Got {type(optimizer).__name__}, which {why}"):
        attach(optimizer, model.groups)


def test_the_wrapper_of_a_framework_is_not_tried():
    class OfAFramework(Rescaling):
        __module__ = "accelerate.optimizer"

    assert "update by learning rate" in repr(wrapped(lambda model: OfAFramework(adamw(model))))


@pytest.mark.parametrize(
    ("apply_to", "cls", "scaling"),
    [
        ("learning_rate", LowRatesAlone, "learning rate"),
        ("displacement", Descent, "displacement"),
        ("displacement", SGD, "displacement"),
    ],
)
def test_the_choice_of_the_user_is_taken_without_a_trial(apply_to, cls, scaling):
    assert_half_of_a_alone(of(cls, lr=0.01), scaling, apply_to=apply_to)


@pytest.mark.parametrize("apply_to", ["learning_rate", "displacement"])
def test_a_choice_of_the_user_builds_nothing(apply_to):
    class Once(Descent):
        built = False

        def __init__(self, params):
            assert not Once.built
            Once.built = True
            super().__init__(params)

    wrapped(of(Once), apply_to=apply_to)


def test_a_choice_of_the_learning_rate_needs_one():
    class WithoutRate(Descent):
        def __init__(self, params):
            Optimizer.__init__(self, params, {})

    with pytest.raises(
        ValueError, match=r'Got WithoutRate without\. Use `apply_to="displacement"`'
    ):
        wrapped(of(WithoutRate), apply_to="learning_rate")


def test_no_trial_is_held_where_nothing_is_scaled():
    model = Branches()
    attach(of(InBackward)(model), model.groups, rule=rules.Watch())


def test_a_rate_of_zero_before_a_warm_up_is_no_obstacle():
    assert "update by learning rate" in repr(wrapped(of(Descent, lr=0.0)))


def test_what_steps_in_a_mode_of_training_alone_is_tried_in_it():
    optimizer = wrapped(of(InTrainMode))
    assert "update by learning rate" in repr(optimizer)
    assert "training" not in optimizer.param_groups[0]


def test_a_rate_in_a_tensor_is_tried_as_a_tensor():
    assert_half_of_a_alone(of(Descent, lr=torch.tensor(0.01)), "learning rate")


class Drawing(Descent):
    """Draws numbers in some way, and moves by them."""

    draw = staticmethod(torch.rand_like)

    def update(self, group, p):
        p.sub_(self.rate(group, p) * p.grad * self.draw(p.abs()))


def drawing(function):
    """An optimizer whose steps draw by a function."""
    return type("Drawing", (Drawing,), {"draw": staticmethod(function)})


DRAWS = {
    "dropout": lambda x: torch.nn.functional.dropout(torch.ones_like(x)),
    "fused dropout": lambda x: torch.native_dropout(torch.ones_like(x), 0.5, True)[0],
    "poisson": lambda x: torch.poisson(torch.ones_like(x)) + 0.1,
    "binomial": lambda x: torch.binomial(3 * torch.ones_like(x), torch.full_like(x, 0.5)) + 0.1,
    "nn.init": lambda x: torch.nn.init.trunc_normal_(torch.empty_like(x), 1.0),
    "another generator": lambda x: torch.rand(
        x.shape, generator=torch.Generator().manual_seed(x.numel())
    ),
    "distribution": lambda x: torch.distributions.Gamma(torch.ones_like(x), 1.0).sample(),
    "randint_like": lambda x: torch.randint_like(x, 1, 4),
    "a new seed": lambda x: torch.manual_seed(x.numel()) and torch.rand(x.shape),
    "numpy": lambda x: np.random.rand(),
    "random": lambda x: random.random(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_step_that_draws_is_tried_and_moves_no_global_generator(draw):
    model = Branches()
    torch.manual_seed(7)
    drawn = torch.random.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert "update by learning rate" in repr(attach(of(drawing(draw))(model), model.groups))
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert (random.getstate(), repr(np.random.get_state())) == drawn[1:]


def test_a_trial_does_not_disturb_what_another_thread_draws_in_torch():
    needs_torch("a trial that draws beside another thread")
    model = Branches()
    torch.manual_seed(7)
    expected = [torch.rand(()) for _ in range(2000)]
    torch.manual_seed(7)
    seen = []
    is_done = threading.Event()

    def draw():
        while not is_done.is_set() or len(seen) < 2000:
            seen.append(torch.rand(()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        attach(of(Stochastic)(model), model.groups)
    finally:
        is_done.set()
        thread.join()
    assert seen[:2000] == expected


@pytest.mark.parametrize("cls", [Descent, OwnRate, Stochastic, Capped])
def test_a_trial_leaves_no_trace(cls):
    model = Branches()
    optimizer = of(cls)(model)
    feed(model, 0)
    optimizer.step()
    state = repr(optimizer.state_dict())
    drawn = torch.random.get_rng_state(), random.getstate()
    values = copy.deepcopy(list(model.parameters()))
    gradients = [p.grad for p in model.parameters()]
    penalty = attach(optimizer, model.groups, persist=False)
    assert repr(optimizer.state_dict()) == state
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    penalty.remove()


class WithHistory(Descent):
    """Appends to a list of its param_group."""

    def update(self, group, p):
        super().update(group, p)
        group["history"].append(1)


def test_a_trial_writes_into_no_list_of_the_user():
    history = []
    wrapped(lambda model: WithHistory([{"params": model.parameters(), "history": history}]))
    assert history == []


@pytest.mark.parametrize("cls", [Descent, Stochastic, Capped, drawing(DRAWS["numpy"])])
def test_threads_that_wrap_at_the_same_time_all_succeed(cls):
    models = [Branches() for _ in range(16)]
    optimizers = [of(cls)(model) for model in models]
    filters = list(warnings.filters)
    drawn = torch.random.get_rng_state(), random.getstate()
    scalings = []

    def wrap(some):
        for i in some:
            penalty = attach(optimizers[i], models[i].groups)
            scalings.append("displacement" in repr(penalty))

    threads = [threading.Thread(target=wrap, args=(range(i, 16, 2),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scalings == [cls is Capped] * 16
    assert list(warnings.filters) == filters
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_verdict(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert "update by learning rate" in repr(wrapped(of(Descent)))
    finally:
        torch.set_default_dtype(torch.float32)
