"""LoRA on a frozen base: only what is trained counts, whatever the optimizer holds."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, Recorder, rules
from gradbalance.rules import Measured
from tests import needs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    needs("peft")
    from transformers import TrainerCallback

    from examples import lora_towers
    from examples.lora_towers import (
        frozen,
        left_out,
        model_with_lora,
        said_of,
        towers,
        train,
        trainable,
        unheard,
    )

STEPS = 6


def to_the_smallest(measured: Measured) -> np.ndarray:
    """Each tower moves as if its gradient had the norm of the smallest."""
    return measured.shares.min() / measured.shares


to_the_smallest.needs_coherence = False


class ByHand(TrainerCallback):
    """Sets the rates of the param_groups, one for each tower, out of the gradients between backward and step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        norms = [
            sum(p.grad.double().square().sum() for p in group["params"]).sqrt()
            for group in optimizer.param_groups
        ]
        self.seen.append(
            {
                g["name"]: (min(norms) / n).item()
                for g, n in zip(optimizer.param_groups, norms, strict=True)
            }
        )
        for group, norm in zip(optimizer.param_groups, norms, strict=True):
            group["lr"] = group["rate"] * (min(norms) / norm).item()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"]


class Coefficients(TrainerCallback):
    def __init__(self, wrapper):
        self.wrapper, self.seen = wrapper, []

    def on_optimizer_step(self, *args, **kwargs):
        self.seen.append(self.wrapper.coefficients())


def trained_by_hand(rank):
    model = model_with_lora(rank)
    groups = [
        {"params": [p for p in own if p.requires_grad], "name": name, "rate": 1e-3}
        for name, own in towers(model).items()
    ]
    callback = ByHand()
    train(model, torch.optim.AdamW(groups, lr=1e-3), STEPS, (callback,))
    return model, callback.seen


def trained(rank, of=trainable, rule=to_the_smallest):
    model = model_with_lora(rank)
    wrapper = ConflictAwarePenalty(
        torch.optim.AdamW(of(model), lr=1e-3), towers(model), rule=rule, smoothing=0.0
    )
    callback = Coefficients(wrapper)
    train(model, wrapper, STEPS, (callback,))
    return model, wrapper, callback.seen


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "of", [trainable, lambda model: list(model.parameters())], ids=["trainable", "all"]
)
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_trainer_equals_coefficients_by_hand(rank, of):
    model, _, seen = trained(rank, of)
    twin, expected = trained_by_hand(rank)
    assert min(c for row in expected for c in row.values()) < 0.9
    assert seen == [pytest.approx(row, rel=1e-6) for row in expected]
    assert_same(model, twin)


def test_groups_by_name_hold_every_trained_entry():
    model = model_with_lora()
    grouped = {id(p) for own in towers(model).values() for p in own}
    assert {id(p) for p in trainable(model)} <= grouped
    assert len(trainable(model)) < len(grouped)
    assert any(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "of", [trainable, lambda model: list(model.parameters())], ids=["trainable", "all"]
)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_coherence_of_small_ranks_is_measured(rank, of):
    _, wrapper, _ = trained(rank, of, rule=rules.Useful())
    balance = wrapper.balance
    assert balance.step == STEPS
    assert np.isfinite(balance.coherences).all()
    assert (balance.coherences != 0).all()


def test_the_rule_acts_alike_whether_the_optimizer_holds_the_frozen_or_not():
    _, alone, _ = trained(2, trainable, rule=rules.Useful())
    _, among, _ = trained(2, lambda model: list(model.parameters()), rule=rules.Useful())
    for one, other in zip(alone.balance[1:], among.balance[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


class Quantised(nn.Linear):
    """A linear layer whose frozen weight is of integers, as QLoRA keeps it, with LoRA of rank 1."""

    def __init__(self, n_in, n_out, dtype):
        super().__init__(n_in, n_out, bias=False)
        self.weight = nn.Parameter((self.weight * 127).to(dtype), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(1, n_in)), nn.Parameter(torch.randn(n_out, 1))

    def forward(self, x):
        return x @ (self.weight.float() / 127).T + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize(
    "rule", [rules.ByHand(a=0.5), rules.Useful()], ids=["by hand", "coherence"]
)
def test_frozen_weights_of_integers_do_no_harm(dtype, rule):
    def run(hold_all):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": Quantised(4, 3, dtype), "b": Quantised(5, 3, dtype)})
        parameters = [p for p in model.parameters() if hold_all or p.requires_grad]
        optimizer = ConflictAwarePenalty(
            torch.optim.AdamW(parameters, lr=0.01), dict(model.items()), rule=rule
        )
        frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
        with Recorder(optimizer):
            for _ in range(4):
                (
                    model["a"](torch.randn(2, 4)) + model["b"](torch.randn(2, 5))
                ).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert all(map(torch.equal, frozen, (p for p in model.parameters() if not p.requires_grad)))
        return optimizer.balance, [p.detach() for p in model.parameters() if p.requires_grad]

    (alone, mine), (among, theirs) = run(False), run(True)
    assert alone.step == among.step == 4
    assert np.array_equal(alone.norms, among.norms)
    assert all(map(torch.equal, mine, theirs))


def test_the_example_prints_what_each_tower_does(capsys):
    balance = lora_towers.main(steps=3, rank=2)
    assert set(balance.penalty.coefficients()) == {"vision", "projector", "language"}
    assert str(balance.recorder.summary()) in capsys.readouterr().out


def test_each_mistake_planted_in_a_tower_is_found_by_name():
    (refusal,) = said_of(left_out)
    assert refusal.startswith("`groups['vision']` must hold parameters of the optimizer. Got 8 of")
    assert "`vision` is frozen: none of its parameters requires a gradient." in said_of(frozen)
    assert any(
        said.startswith("`vision` is in the optimizer but never had a gradient")
        for said in said_of(unheard)
    )
