"""The contract on optimizers of third parties, which the library knows only by a trial."""

import copy
import re
import warnings
from functools import partial
from operator import attrgetter

import pytest
import torch

from gradbalance import attach, rules
from tests import needs
from tests.contract.optimizers import Case, cancels
from tests.contract.oracle import Toy, groups_of, loss_of, put_on, refused, train
from tests.contract.promises import Contract, wrapped

pytestmark = cancels


def taken_from(package):
    """The package, or a skip of the test that needs it."""
    with warnings.catch_warnings():
        # bitsandbytes registers its kernels with a deprecated call when it is first imported.
        warnings.simplefilter("ignore")
        return needs(package)


def make(package, name, params, **options):
    optimizer = attrgetter(name)(taken_from(package))(params, **options)
    if package == "schedulefree":
        optimizer.train()
    return optimizer


def lookahead(params):
    return taken_from("pytorch_optimizer").Lookahead(torch.optim.AdamW(params, lr=0.02), k=2)


def sam(params):
    return taken_from("pytorch_optimizer").SAM(params, torch.optim.AdamW, lr=0.02)


def case(package, name, nature, **options):
    return Case(
        f"{package}-{name.split('.')[-1]}",
        partial(make, package, name, lr=0.02, **options),
        **nature,
    )


class TestThirdParty(Contract):
    representatives = (
        ("schedulefree-AdamWScheduleFree", "update"),
        ("bitsandbytes-AdamW8bit", "update"),
        ("pytorch_optimizer-Lookahead", "update"),
        ("pytorch_optimizer-SAM", "update"),
    )
    cases = (
        *(
            case("schedulefree", name, {"averages": True})
            for name in ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree")
        ),
        case("bitsandbytes", "optim.AdamW", {"copies": False}),
        case("bitsandbytes", "optim.Lion", {"copies": False}),
        case("bitsandbytes", "optim.AdamW8bit", {"copies": False}, min_8bit_size=0),
        Case("pytorch_optimizer-Lookahead", lookahead, copies=False),
        Case("pytorch_optimizer-SAM", sam, closure_alone=True, copies=False, grows=False),
    )


@pytest.mark.parametrize("of", [c for c in TestThirdParty.cases if not c.copies], ids=str)
def test_a_copy_that_could_not_train_without_the_penalty_is_refused_with_it(of, record_property):
    def train_a_copy(model, optimizer):
        model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(1), observe=False, penalty=penalty)

    plain, (model, penalty) = Toy(of.bias), wrapped(of, "update")
    with pytest.raises(AttributeError) as expected:
        train_a_copy(plain, of.make(plain.parameters()))
    with refused(record_property, (AttributeError, ValueError), re.escape(str(expected.value))):
        train_a_copy(model, penalty)


@pytest.fixture
def overrides(monkeypatch):
    """Sets a learning rate of one parameter in the manager of bitsandbytes, in one of its three places."""
    bitsandbytes = taken_from("bitsandbytes")
    manager = object.__new__(bitsandbytes.optim.GlobalOptimManager)
    manager.initialize()
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", manager)

    def override(model, where):
        if where == "pid2config":
            manager.override_config(model.text.weight, "lr", 1.0)
        elif where == "index2config":
            manager.index2config[0, 0] = {
                "lr": 1.0
            }  # which `register_parameters` gets out of the former
        else:
            manager.register_module_override(model.text, "weight", {"lr": 1.0})

    return override


PLACES = ["pid2config", "index2config", "module_weight_config_triple"]


@pytest.mark.parametrize("where", PLACES)
def test_settings_of_bitsandbytes_beside_the_param_groups_are_scaled_after_the_fact(
    where, overrides
):
    def distances(model, damped):
        overrides(model, where)
        optimizer = taken_from("bitsandbytes").optim.AdamW(
            model.parameters(), lr=0.02, weight_decay=0.0
        )
        if damped:
            penalty = attach(optimizer, groups_of(model), rules.ByHand(text=0.5))
            assert "update by displacement" in repr(penalty)
        start = [p.detach().clone() for p in model.parameters()]
        loss_of(model, 0).backward()
        optimizer.step()
        return {
            n: (p - p0).norm().item()
            for (n, p), p0 in zip(model.named_parameters(), start, strict=True)
        }

    models = Toy(), Toy()  # both alive: the manager knows parameters by their id
    plain, damped = distances(models[0], damped=False), distances(models[1], damped=True)
    for name in plain:
        assert damped[name] == pytest.approx(
            (0.5 if "text" in name else 1.0) * plain[name], rel=1e-3
        )


@pytest.mark.parametrize("where", PLACES)
def test_such_settings_that_come_later_are_refused_in_update_mode(
    where, overrides, record_property
):
    model = Toy()
    optimizer = taken_from("bitsandbytes").optim.AdamW(model.parameters(), lr=0.02)
    penalty = put_on(optimizer, model, by=attach)
    overrides(model, where)
    loss_of(model, 0).backward()
    with refused(record_property, RuntimeError, "`param_groups`. Got overrides"):
        optimizer.step()
    penalty.remove()
    put_on(optimizer, model, "gradient", by=attach)
    optimizer.step()
