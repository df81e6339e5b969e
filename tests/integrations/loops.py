"""The loop by hand that the loops of others are compared with, and what goes into both."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from gradbalance import ConflictAwarePenalty, attach
from tests.contract.oracle import (
    NAMES,
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    batch,
    put_on,
)

STEPS = 8
CLIP = 0.5


class Setup(NamedTuple):
    """How the penalty is put on."""

    mode: str = "update"
    by: Callable = ConflictAwarePenalty  # or attach
    rule: str = "conflicts"

    def __str__(self) -> str:
        return f"{self.mode}-{self.by.__name__}-{self.rule}"


each_setup = pytest.mark.parametrize(
    "setup",
    [
        Setup(),
        Setup(by=attach, rule="own"),
        Setup(rule="coherence"),
        Setup("gradient", attach),
    ],
    ids=str,
)


def sgd(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.02)


def penalised(model, setup, make=adamw):
    """The optimizer to hand to the framework, and the penalty on it."""
    optimizer = make(model.parameters())
    penalty = put_on(optimizer, model, setup.mode, setup.rule, setup.by)
    return optimizer if setup.by is attach else penalty, penalty


def batches(steps=range(STEPS)):
    return DataLoader([batch(step) for step in steps], batch_size=None)


def loss_on(model, one):
    inputs, target = one
    return (model(*inputs) - target).abs().mean()


def expected(setup, *, accumulate=1, clip=None, make=adamw):
    """The twin trained by hand, and the coefficients of its steps."""
    twin = ByHand(make, Toy(), setup.mode, setup.rule)
    seen = []
    for i, one in enumerate(batches()):
        (loss_on(twin.model, one) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip is not None:
                clip_grad_norm_(twin.model.parameters(), clip)
            twin.step()
            twin.optimizer.zero_grad()
            seen.append(twin.coefficients)
    return twin.model, seen


def assert_equal_by_hand(model, seen, setup, **loop):
    twin, coefficients = expected(setup, **loop)
    assert_same_coefficients(seen, coefficients)
    assert_same_parameters(model, twin)


def recorded(optimizer, penalty):
    """The coefficients of each step that takes place, filled while the framework trains."""
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(penalty.coefficients()))
    return seen


def coefficients_of(callback):
    """The coefficients of each step that a ``BalanceCallback`` recorded."""
    record = callback.recorder.to_dict()
    return [dict(zip(NAMES, row, strict=True)) for row in record["coefficients"].tolist()]
