"""The displacement of each group under constant coefficients: every class of torch, any division of the parameters."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, Rprop, SparseAdam

from gradbalance import ConflictAwarePenalty, attach, rules
from tests.contract.fixed import FACTOR, Branches, assert_half_of_a_alone, displacements, feed
from tests.contract.optimizers import REPRESENTATIVES, cancels

CLASSES = [
    cls
    for name in torch.optim.__all__
    if inspect.isclass(cls := getattr(torch.optim, name))
    and issubclass(cls, Optimizer)
    and cls not in (Optimizer, torch.optim.LBFGS, torch.optim.ASGD)  # these two are refused
]
STEPS = 6
COEFFICIENTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.7, 3.0])


@st.composite
def divisions(draw, minimum=2):
    """Of ten parameters: the param_group and the group of each, the coefficient of each group, the rates."""
    count = 10
    n = draw(st.integers(minimum, 4))
    group_of = draw(
        st.lists(st.integers(-1, n - 1), min_size=count, max_size=count).filter(
            lambda g: {*range(n)} <= {*g}
        )
    )
    at = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    rates = draw(st.lists(st.sampled_from([0.0003, 0.001, 0.003]), min_size=3, max_size=3))
    return group_of, at, draw(st.lists(COEFFICIENTS, min_size=n, max_size=n)), rates


def moved(cls, division, options, apply_to=None, tensor_rates=False, rule=None):
    group_of, at, coefficients, rates = division
    torch.manual_seed(0)
    vectors = cls.__name__ != "Muon"
    parameters = [
        nn.Parameter(
            torch.randn((5,) if i % 3 == 0 and vectors else (4, 3 + i), dtype=torch.float64)
        )
        for i in range(len(at))
    ]
    param_groups = [
        {"params": own, "lr": torch.tensor(rate) if tensor_rates else rate}
        for j, rate in enumerate(rates)
        if (own := [p for p, where in zip(parameters, at, strict=True) if where == j])
    ]
    optimizer = cls(param_groups, **options)
    before = [dict(group) for group in optimizer.param_groups]
    if apply_to is not None:
        groups = {
            f"g{m}": [p for p, of in zip(parameters, group_of, strict=True) if of == m]
            for m in range(len(coefficients))
        }
        rule = rule or rules.ByHand(**{f"g{m}": c for m, c in enumerate(coefficients)})
        optimizer = ConflictAwarePenalty(optimizer, groups, rule, apply_to=apply_to, persist=False)
    start = [p.detach().clone() for p in parameters]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = g.to_sparse(1) if cls is SparseAdam else g
        optimizer.step()
    for group, was in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] is was["lr"]
        assert list(map(id, group["params"])) == list(map(id, was["params"]))
    return [p.detach() - s for p, s in zip(parameters, start, strict=True)]


def assert_scaled(plain, scaled, division):
    group_of, _, coefficients, _ = division
    for before, after, m in zip(plain, scaled, group_of, strict=True):
        c = 1.0 if m < 0 else coefficients[m]
        assert (after - c * before).norm() <= 0.02 * max(c, 1.0) * before.norm()


def without_decay(cls):
    return {"weight_decay": 0.0} if "weight_decay" in inspect.signature(cls).parameters else {}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@settings(max_examples=12)
@given(division=divisions())
def test_in_update_mode_every_group_moves_by_its_coefficient(cls, division):
    options = without_decay(cls)
    assert_scaled(moved(cls, division, options), moved(cls, division, options, "update"), division)


@settings(max_examples=30)
@given(
    division=divisions(),
    momentum=st.sampled_from(
        [
            {},
            {"momentum": 0.9},
            {"momentum": 0.5, "nesterov": True},
            {"momentum": 0.9, "dampening": 0.5},
        ]
    ),
    maximize=st.booleans(),
)
def test_in_gradient_mode_every_group_of_sgd_moves_by_its_coefficient(division, momentum, maximize):
    options = {**momentum, "maximize": maximize}
    assert_scaled(
        moved(SGD, division, options), moved(SGD, division, options, "gradient"), division
    )


@pytest.mark.parametrize("cls", [SGD, AdamW, torch.optim.RMSprop])
@settings(max_examples=8)
@given(division=divisions())
def test_rates_in_tensors_are_scaled_as_floats_are(cls, division):
    options = {**without_decay(cls), "foreach": cls is not SGD}
    if cls is AdamW:
        options["capturable"] = False
        options["foreach"] = False
    plain = moved(cls, division, options, tensor_rates=True)
    assert_scaled(plain, moved(cls, division, options, "update", tensor_rates=True), division)


@cancels
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVES)
@pytest.mark.parametrize(
    "rule", [rules.ByHand(g0=1.0), rules.Watch(rules.ByHand(g0=0.5))], ids=["ones", "watch"]
)
def test_coefficients_of_one_leave_every_bit(name, mode, rule):
    cls = getattr(torch.optim, name)
    division = (
        [0, 1, -1, 0, 1, -1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        [1.0, 1.0],
        [0.01, 0.02, 0.03],
    )
    plain = moved(cls, division, without_decay(cls))
    assert all(map(torch.equal, plain, moved(cls, division, without_decay(cls), mode, rule=rule)))


class WithTensorCounter(Optimizer):
    """As timm's LAMBs: counts in a tensor of the param_group, in place, that it puts there in its first step."""

    def __init__(self, params, **others):
        super().__init__(params, {"lr": 0.01, **others})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = torch.ones(())
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / group["step"].item() * p.grad)


@pytest.mark.parametrize("there", [False, True])
def test_a_counter_in_a_tensor_of_the_param_group_counts_once_a_step(there):
    def make(model):
        kept.append(
            WithTensorCounter(model.parameters(), **({"step": torch.zeros(())} if there else {}))
        )
        return kept[-1]

    kept = []
    assert_half_of_a_alone(make, "learning rate", steps=10)
    assert [optimizer.param_groups[0]["step"] for optimizer in kept] == [10, 10]


def rprop(model):
    return Rprop(model.parameters(), lr=1e-3)


def test_a_rescaled_step_that_raised_leaves_nothing_behind():
    model = Branches()
    optimizer = Rprop(model.parameters(), lr=1e-3)
    attach(optimizer, model.groups, rule=rules.ByHand(a=0.5))
    plain = Branches()
    alone = Rprop(plain.parameters(), lr=1e-3)
    feed(model, 0)
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    start = [p.detach().clone() for p in model.parameters()]
    feed(model, 0)
    feed(plain, 0)
    optimizer.step()
    alone.step()
    for (name, p), q, s in zip(model.named_parameters(), plain.parameters(), start, strict=True):
        torch.testing.assert_close(p - s, (q - s) * (FACTOR if name.startswith("a.") else 1.0))


def test_a_group_with_coefficient_0_stays_where_it_is():
    found, optimizer = displacements(rprop, rule=rules.ByHand(a=0.0))
    assert "by displacement" in repr(optimizer)
    assert all(d.norm() == 0 for name, d in found.items() if name.startswith("a."))
    assert all(d.norm() > 0 for name, d in found.items() if not name.startswith("a."))


def test_a_parameter_without_a_gradient_is_not_rescaled():
    model = Branches()
    optimizer = Rprop(model.parameters(), lr=1e-3)
    attach(optimizer, model.groups, rule=rules.ByHand(a=0.5))
    feed(model, 0)
    model.a[0].weight.grad = None
    before = model.a[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.a[0].weight, before)


class IntoNewMemory(SGD):
    """Puts another tensor into each parameter."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.data = p.data - 0.01 * p.grad.sign()


def test_parameters_that_lie_elsewhere_after_the_step_are_rescaled_there():
    assert_half_of_a_alone(lambda model: IntoNewMemory(model.parameters(), lr=0.01), "displacement")


class ByItsOwnRate(Optimizer):
    """A step that the learning rate does not change."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float16, torch.bfloat16])
def test_every_kind_of_number_is_rescaled(dtype):
    def run(rule):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.ones(4, 3).to(dtype)) for _ in range(2))
        optimizer = ByItsOwnRate([a, b])
        if rule is not None:
            attach(optimizer, {"a": [a], "b": [b]}, rule=rule)
        for p in (a, b):
            p.grad = torch.ones(4, 3).to(dtype)
        optimizer.step()
        return a.detach(), b.detach()

    (a, b), (scaled, other) = run(None), run(rules.ByHand(a=0.5))
    torch.testing.assert_close(scaled - 1, (a - 1) * 0.5)
    assert torch.equal(b, other)


def test_a_step_of_infinite_gradients_is_not_rescaled():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = ByItsOwnRate([a, b])
    attach(optimizer, {"a": [a], "b": [b]}, rule=rules.ByHand(a=0.5))
    a.grad, b.grad = torch.tensor([torch.inf, 1.0]), torch.ones(2)
    optimizer.step()
    assert a.tolist() == [-torch.inf, 0.5]


def test_the_factor_may_change_from_step_to_step():
    for make in (rprop, lambda model: Adam(model.parameters(), lr=0.01)):
        plain, model = Branches(), Branches()
        alone, optimizer = make(plain), make(model)
        attach(optimizer, model.groups, rule=lambda m: [m.step / 4, 1.0])
        for step in range(5):
            start = [p.detach().clone() for p in model.parameters()]
            before = [p.detach().clone() for p in plain.parameters()]
            feed(model, step)
            feed(plain, step)
            optimizer.step()
            alone.step()
            for (name, p), q, s, b in zip(
                model.named_parameters(), plain.parameters(), start, before, strict=True
            ):
                c = step / 4 if name.startswith("a.") else 1.0
                torch.testing.assert_close(p - s, c * (q - b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [AdamW, Rprop])
def test_frozen_parameters_in_the_optimizer_change_nothing(cls):
    def run(hold_all):
        model = Branches()
        for p in (model.a[0].weight, model.b[0].weight, model.head.weight):
            p.requires_grad_(False)
        parameters = [p for p in model.parameters() if hold_all or p.requires_grad]
        optimizer = ConflictAwarePenalty(cls(parameters, lr=0.01), model.groups)
        coefficients = []
        for step in range(40):
            feed(model, step)
            for name, p in model.named_parameters():
                agreeing = torch.ones_like(p) if name.startswith("b.") else p.grad
                p.grad = agreeing if p.requires_grad else None
            optimizer.step()
            coefficients.append(list(optimizer.coefficients().values()))
        return coefficients, optimizer.balance, [p.detach() for p in model.parameters()]

    (alone, balance, values), (among, other, others) = run(False), run(True)
    assert alone == among
    assert any(c != 1.0 for row in alone for c in row)
    assert balance.coherences.tolist() == other.coherences.tolist()
    assert not any(map(math.isnan, balance.coherences))
    assert all(map(torch.equal, values, others))
