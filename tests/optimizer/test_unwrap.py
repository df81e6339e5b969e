"""Which optimizer steps, and what is said where there is none."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradbalance import ConflictAwarePenalty, attach
from tests.contract.fixed import Branches


class Both:
    """As the wrappers of training scripts that step one optimizer after the other."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers


class Holder:
    """An object with one optimizer under a name of its own."""

    def __init__(self, optimizer):
        self.mine = optimizer


def one(model):
    return SGD(model.parameters(), lr=0.1)


def two(model):
    return AdamW(model.a.parameters()), SGD(model.b.parameters())


MISTAKES = {
    "a list": (
        lambda model: list(two(model)),
        r"list of 2 optimizers \(AdamW, SGD\)\. Put the branches into `param_groups` of one",
    ),
    "a dict": (
        lambda model: dict(zip("ab", two(model), strict=True)),
        r"dict of 2 optimizers \(AdamW, SGD\)\. Put the branches into `param_groups` of one",
    ),
    "an object that holds several": (
        lambda model: Both(*two(model)),
        r"Both of 2 optimizers \(AdamW, SGD\)\. Put the branches into `param_groups` of one",
    ),
    "an object that holds one": (
        lambda model: Holder(one(model)),
        r"Holder, which holds one\. Pass the SGD itself",
    ),
    "a list of one": (
        lambda model: [one(model)],
        r"list, which holds one\. Pass the SGD itself",
    ),
    "a class": (
        lambda model: AdamW,
        r"the class AdamW\. Build it first, as in `AdamW\(model\.parameters\(\)\)`",
    ),
    "a scheduler": (
        lambda model: torch.optim.lr_scheduler.StepLR(one(model), 1),
        r"StepLR, a scheduler\. Pass the optimizer that it drives",
    ),
    "parameters": (
        lambda model: model.parameters(),
        r"generator\. Build the optimizer first, then wrap it",
    ),
    "a model": (lambda model: model, r"Branches\. Build the optimizer first, then wrap it"),
    "nothing": (lambda model: None, r"NoneType\. Build the optimizer first, then wrap it"),
}


@pytest.mark.parametrize("by", [ConflictAwarePenalty, attach])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_optimizer_is_refused_by_what_it_is(mistake, by):
    model = Branches()
    make, message = MISTAKES[mistake]
    with pytest.raises(
        TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer\. Got " + message
    ):
        by(make(model), model.groups)


@pytest.mark.parametrize(
    "name", ["optimizer", "_optimizer", "original_optimizer", "base_optimizer", "base"]
)
def test_the_optimizer_inside_a_framework_wrapper_is_the_one_that_steps(name):
    class Wrapper:
        __module__ = "accelerate.optimizer"

    model = Branches()
    optimizer = one(model)
    wrapper = Wrapper()
    setattr(wrapper, name, optimizer)
    attach(wrapper, model.groups)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match="must not be wrapped twice"):
        attach(optimizer, model.groups)


def test_wrappers_around_each_other_end():
    class Wrapper(nn.Module):
        __module__ = "accelerate.optimizer"

    model = Branches()
    outer = Wrapper()
    outer.optimizer = one(model)
    outer.optimizer.optimizer = outer.optimizer
    attach(outer, model.groups)
