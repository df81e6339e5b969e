"""Every learning-rate scheduler of torch drives the wrapped optimizer as it drives a plain one."""

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from gradbalance import ConflictAwarePenalty, attach
from tests.contract.oracle import (
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    errors_at,
    loss_of,
    put_on,
    train,
)

STEPS = 6
MAKE = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.8)],
        milestones=[2],
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.05, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS),
}
BASES = {
    "update": lambda params: torch.optim.AdamW(params, lr=0.02),
    "displacement": lambda params: torch.optim.Adam(params, lr=0.02),
    "gradient": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
}


def advance(scheduler):
    takes_metric = isinstance(scheduler, schedulers.ReduceLROnPlateau)
    scheduler.step(*([1.0] if takes_metric else []))


def train_scheduled(model, optimizer, scheduler, penalty, steps):
    rates, seen = [], []
    for step in steps:
        rates.append(optimizer.param_groups[0]["lr"])
        seen += train(model, optimizer, [step], penalty=penalty)
        advance(scheduler)
    return rates, seen


def train_by_hand(scheduler, mode):
    twin = ByHand(BASES[mode], Toy(), mode)
    scheduler = MAKE[scheduler](twin.optimizer)
    rates, seen = [], []
    for step in range(STEPS):
        rates.append(twin.optimizer.param_groups[0]["lr"])
        loss_of(twin.model, step).backward()
        twin.step(errors_at(step))
        twin.optimizer.zero_grad()
        seen.append(twin.coefficients)
        advance(scheduler)
    return twin, rates, seen


def test_every_scheduler_of_torch_is_covered():
    named = {n for n in schedulers.__all__ if inspect.isclass(getattr(schedulers, n))}
    assert named - {"LRScheduler"} == set(MAKE)


ORDERS = ["built before, on the plain one", "built after, on the wrapper", "attached"]
# Every schedule by rate in every order, and one that sets rates and momenta, one with a memory, in the other modes.
SCHEDULES = [(name, "update", order) for name in MAKE for order in ORDERS]
SCHEDULES += [
    (name, mode, order)
    for name in ("OneCycleLR", "ReduceLROnPlateau")
    for mode in ("displacement", "gradient")
    for order in ORDERS
]


@pytest.mark.parametrize(("scheduler", "mode", "order"), SCHEDULES)
def test_a_schedule_is_that_of_the_plain_optimizer(scheduler, mode, order):
    model = Toy()
    plain = BASES[mode](model.parameters())
    early = MAKE[scheduler](plain) if order.startswith("built before") else None
    penalty = put_on(plain, model, mode, by=attach if order == "attached" else ConflictAwarePenalty)
    optimizer = plain if order == "attached" else penalty
    rates, seen = train_scheduled(
        model, optimizer, early or MAKE[scheduler](optimizer), penalty, range(STEPS)
    )
    twin, plain_rates, expected = train_by_hand(scheduler, mode)
    assert rates == plain_rates
    assert len(set(rates)) > 1
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin.model)


@pytest.mark.parametrize(
    ("scheduler", "mode"), dict.fromkeys((name, mode) for name, mode, _ in SCHEDULES)
)
def test_a_schedule_goes_on_after_load_state_dict(scheduler, mode):
    def build():
        model = Toy()
        optimizer = put_on(BASES[mode](model.parameters()), model, mode)
        return model, optimizer, MAKE[scheduler](optimizer)

    model, optimizer, schedule = build()
    train_scheduled(model, optimizer, schedule, optimizer, range(3))
    resumed = build()
    for fresh, old in zip(resumed, (model, optimizer, schedule), strict=True):
        fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    expected = train_scheduled(model, optimizer, schedule, optimizer, range(3, STEPS))
    assert train_scheduled(*resumed, resumed[1], range(3, STEPS)) == expected
    assert_same_parameters(resumed[0], model, tolerance=0)
