"""What crashed without saying why: each in words, at the door."""

import copy

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer, Rprop

from gradbalance import attach, rules
from tests import needs
from tests.contract.fixed import Branches, assert_half_of_a_alone, feed


class Bare(Optimizer):
    """Does not call the constructor of Optimizer."""

    def __init__(self, params):
        self.param_groups, self.state, self.defaults = (
            [{"params": list(params), "lr": 0.01}],
            {},
            {},
        )

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p -= self.param_groups[0]["lr"] * p.grad


@pytest.mark.parametrize("rule", [rules.ByHand(a=0.5), rules.Watch()])
def test_an_optimizer_without_the_constructor_of_torch_is_refused_in_words(rule):
    model = Branches()
    with pytest.raises(ValueError, match=r"must run its step hooks. Got Bare.*super"):
        attach(Bare(model.parameters()), model.groups, rule=rule)


class Unhooked(SGD):
    """Puts its own step in place of the one that runs hooks."""

    def __init__(self, params):
        super().__init__(params, lr=0.01)
        self.step = lambda closure=None: None


def test_a_step_that_ran_no_hook_is_noticed():
    model = Branches()
    optimizer = Unhooked(model.parameters())
    attach(optimizer, model.groups, rule=rules.Watch())
    feed(model, 0)
    with pytest.raises(RuntimeError, match=r"must run its step hooks. Got Unhooked"):
        optimizer.step()


def test_empty_param_groups_are_refused_in_words():
    model = Branches()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups.clear()
    with pytest.raises(
        ValueError, match=r"`optimizer` must hold parameters. Got empty `param_groups`"
    ):
        attach(optimizer, model.groups)


def saved():
    model = Branches()
    optimizer = AdamW(model.parameters())
    attach(optimizer, model.groups)
    feed(model, 0)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("key", ["rule", "step", "groups", "errors", "sketch", "phase"])
def test_a_checkpoint_without_a_key_is_refused_in_words(key):
    state = saved()
    (kept,) = state["param_groups"][0]["gradbalance"]
    del kept[key]
    model = Branches()
    optimizer = AdamW(model.parameters())
    attach(optimizer, model.groups)
    with pytest.raises(
        ValueError, match=f"`state_dict` must hold what the penalty saved.* Got .* without '{key}'"
    ):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["state"] == {}  # nothing of it was loaded


@pytest.mark.parametrize("kept", [3.0, {"rule": "old"}, ["of", "an", "old", "version"]])
def test_a_checkpoint_of_another_kind_is_refused_in_words(kept):
    state = saved()
    state["param_groups"][0]["gradbalance"] = kept
    model = Branches()
    optimizer = AdamW(model.parameters())
    attach(optimizer, model.groups)
    with pytest.raises(
        ValueError,
        match=f"`state_dict` must hold what the penalty saved.* Got {type(kept).__name__}",
    ):
        optimizer.load_state_dict(state)


def test_of_a_checkpoint_without_param_groups_torch_speaks_itself():
    model = Branches()
    optimizer = AdamW(model.parameters())
    with pytest.raises(Exception) as plain:  # noqa: PT011  # whatever torch says
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    attach(optimizer, model.groups)
    with pytest.raises(type(plain.value), match="parameter group"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


@pytest.mark.parametrize("cls", [SGD, AdamW, Rprop])
def test_gradients_made_in_inference_mode_are_read_in_update_mode(cls):
    def run(context):
        model = Branches()
        optimizer = cls(model.parameters(), lr=0.01)
        handle = attach(optimizer, model.groups, rule=rules.ByHand(a=0.5))
        for step in range(3):
            with context():
                feed(model, step)
            optimizer.step()
        assert handle.balance.step == 3
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(torch.inference_mode), run(torch.no_grad)))


def test_adabound_whose_rates_go_by_position_works():
    pytorch_optimizer = needs("pytorch_optimizer")

    def make(model):
        return pytorch_optimizer.AdaBound(model.parameters(), lr=1e-3)

    assert_half_of_a_alone(make, "displacement")


def test_dadaptsgd_is_refused_by_name():
    pytorch_optimizer = needs("pytorch_optimizer")
    model = Branches()
    with pytest.raises(ValueError, match="Got DAdaptSGD, whose"):
        attach(pytorch_optimizer.DAdaptSGD(model.parameters()), model.groups)


def test_adafactor_with_relative_steps_is_not_refused_into_a_mode_that_cancels():
    transformers = pytest.importorskip("transformers")

    def make(model):
        return transformers.Adafactor(model.parameters(), relative_step=True, scale_parameter=False)

    assert_half_of_a_alone(make, "displacement")
