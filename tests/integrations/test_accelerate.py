"""Accelerate gives the parameters and coefficients of the loop by hand."""

import pytest

from gradbalance import attach
from tests import needs
from tests.contract.optimizers import cancels
from tests.contract.oracle import Toy, put_on
from tests.integrations.loops import (
    CLIP,
    STEPS,
    adamw,
    assert_equal_by_hand,
    batches,
    each_setup,
    loss_on,
    penalised,
    recorded,
)

Accelerator = needs("accelerate").Accelerator

pytestmark = cancels


@pytest.fixture(autouse=True)
def nothing_left_of_other_tests():
    """Accelerate keeps its state in the classes: one that accumulated would go on doing so."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@each_setup
@pytest.mark.parametrize("options", [{}, {"clip": CLIP}, {"accumulate": 2}])
def test_accelerate_equals_the_loop_by_hand(setup, options, tmp_path):
    def build():
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=options.get("accumulate", 1)
        )
        model = Toy()
        optimizer, penalty = penalised(model, setup)
        model, optimizer = accelerator.prepare(model, optimizer)
        return accelerator, model, optimizer, penalty

    accelerator, model, optimizer, penalty = build()
    seen = []
    for i, one in enumerate(batches()):
        with accelerator.accumulate(model):
            accelerator.backward(loss_on(model, one))
            if "clip" in options and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), options["clip"])
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            seen.append(penalty.coefficients())
        if i == STEPS // 2 - 1:
            accelerator.save_state(tmp_path / "half")
            accelerator, model, optimizer, penalty = build()
            accelerator.load_state(tmp_path / "half")
    assert_equal_by_hand(model, seen, setup, **options)


@each_setup
def test_attaching_to_what_accelerate_prepared_leaves_micro_batches_alone(setup):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Toy()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    penalty = put_on(optimizer, model, setup.mode, setup.rule, attach)
    seen = recorded(optimizer.optimizer, penalty)
    for one in batches():
        with accelerator.accumulate(model):
            accelerator.backward(loss_on(model, one))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_by_hand(model, seen, setup, accumulate=2)
