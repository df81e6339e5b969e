"""Loss scaling on the CPU: GradScaler with every kind of step, infinities, clipping, and the fused protocol."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from gradbalance import ConflictAwarePenalty, attach
from tests.contract.optimizers import cancels
from tests.contract.oracle import (
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    loss_of,
    put_on,
)
from tests.old_torch import needs_torch

pytestmark = cancels


def fused_adagrad(params):
    needs_torch("fused Adagrad under GradScaler")
    return torch.optim.Adagrad(params, lr=0.02, fused=True)


SCALE = 1024.0
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
    "fused adam": lambda params: torch.optim.Adam(params, lr=0.02, fused=True),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True),
    "fused adagrad": fused_adagrad,
}


# By rate with every kind of step; by displacement and in the gradient plain, and fused with the scaler.
PAIRS = [*((base, "update") for base in BASES)]
PAIRS += [(base, mode) for mode in ("displacement", "gradient") for base in ("sgd", "fused sgd")]
each_base = pytest.mark.parametrize(("base", "mode"), PAIRS, ids=map("-".join, PAIRS))


def build(base, mode, attached=False, rule="conflicts", **options):
    """A model, the object to step, the penalty on it, a scaler, and the twin by hand."""
    model, twin = Toy(), ByHand(BASES[base], Toy(), mode, rule, **options)
    optimizer = BASES[base](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
    penalty = put_on(
        optimizer, model, mode, rule, attach if attached else ConflictAwarePenalty, **options
    )
    return model, optimizer if attached else penalty, penalty, scaler, twin


OPTIONS = [
    {},
    {"rule": "coherence"},
    {"rule": "own", "every": 2},
    {"late": True},
    {"rule": "coherence", "late": True},
]
each_way = pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=["conflicts", "coherence", "own-every-2", "conflicts-late", "coherence-late"],
)


@pytest.mark.parametrize(("clip", "accumulate"), [(False, 1), (True, 2)])
@each_way
@each_base
def test_a_scaled_loop_equals_the_oracle_by_hand_without_a_scaler(
    base, mode, options, clip, accumulate
):
    model, optimizer, penalty, scaler, twin = build(base, mode, **options)
    seen, expected = [], []
    for step in range(4 * accumulate):
        scaler.scale(loss_of(model, step) / accumulate).backward()
        (loss_of(twin.model, step) / accumulate).backward()
        if (step + 1) % accumulate:
            continue
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.5)
            clip_grad_norm_(twin.model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        twin.step()
        twin.optimizer.zero_grad()
        seen.append(penalty.coefficients())
        expected.append(twin.coefficients)
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin.model)


@each_way
@each_base
def test_a_step_skipped_for_an_infinity_does_not_count(base, mode, options):
    model, optimizer, penalty, scaler, twin = build(base, mode, attached=options == {}, **options)
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.audio.weight.grad[0, 0] = torch.inf
            before = [p.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            assert all(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))
            assert optimizer.param_groups[0]["lr"] == 0.02
            assert scaler.get_scale() == SCALE / 2
            # A late decision was made before the infinity was known.
            assert (
                "fused" not in base
                or options.get("late")
                or set(penalty.coefficients().values()) == {1.0}
            )
            twin.engine.calls += (
                "fused" in base
            )  # which step is measured goes by steps however they end
        else:
            loss_of(twin.model, step).backward()
            twin.step()
            twin.optimizer.zero_grad()
    assert penalty.balance.step == 3 - options.get(
        "late", False
    )  # the last one is decided on in the next
    assert_same_coefficients([penalty.coefficients()], [twin.coefficients])
    assert_same_parameters(model, twin.model)


@each_base
def test_a_step_skipped_for_an_infinity_outside_the_groups_does_not_count(base, mode):
    model, optimizer, penalty, scaler, _ = build(base, mode)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert penalty.balance.step == 2


@each_base
def test_norms_are_those_of_unscaled_gradients(base, mode):
    model, optimizer, penalty, scaler, twin = build(base, mode)
    scaler.scale(loss_of(model, 0)).backward()
    loss_of(twin.model, 0).backward()
    expected = [
        torch.cat([p.grad.flatten() for p in members]).norm().item()
        for members in twin.groups.values()
    ]
    scaler.step(optimizer)
    assert penalty.balance.norms.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["update", "displacement", "gradient"])
def test_max_norm_clips_unscaled_gradients_of_a_fused_step(mode):
    model, twin = Toy(), ByHand(BASES["fused sgd"], Toy(), mode)
    optimizer = put_on(BASES["fused sgd"](model.parameters()), model, mode, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_of(twin.model, step).backward()
        twin.decide()
        with twin.applied():
            clip_grad_norm_(twin.model.parameters(), 0.5)
            twin.optimizer.step()
        twin.optimizer.zero_grad()
    assert_same_parameters(model, twin.model)


@pytest.mark.parametrize("base", BASES)
def test_the_wrapper_passes_the_scaler_to_the_fused_optimizer_and_keeps_nothing(base):
    model, optimizer, _, scaler, _ = build(base, "update")
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == ("fused" in base)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer.optimizer, "grad_scale")


@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_autocast_to_bfloat16_equals_the_oracle_by_hand(mode):
    model, optimizer, _, _, twin = build("adamw", mode)
    seen, expected = [], []
    for step in range(3):
        for module in (model, twin.model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(module, step)
            loss.backward()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
        twin.optimizer.zero_grad()
        seen.append(optimizer.coefficients())
        expected.append(twin.coefficients)
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin.model)
