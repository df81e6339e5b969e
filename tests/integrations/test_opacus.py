"""Opacus shows the penalty the noised gradients alone: it leaks no privacy."""

import pytest
import torch

from gradbalance import ConflictAwarePenalty, attach
from tests import needs
from tests.contract.optimizers import MODES, cancels
from tests.contract.oracle import (
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    put_on,
)
from tests.integrations.loops import STEPS, sgd

DPOptimizer = needs("opacus").optimizers.DPOptimizer

pytestmark = cancels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["penalty around", "penalty inside", "attached"])
def test_opacus_shows_the_penalty_noised_gradients_alone(mode, order):
    def private(optimizer, model):
        for p in model.parameters():
            p.grad_sample = None
        generator = torch.Generator().manual_seed(0)
        return DPOptimizer(
            optimizer,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
            generator=generator,
        )

    model, twin = (
        Toy(),
        ByHand(sgd, Toy(), mode, "own"),
    )  # which acts though the noise evens the norms out
    if order == "penalty inside":
        penalty = put_on(sgd(model.parameters()), model, mode, "own")
        optimizer = private(penalty, model)
    else:
        optimizer = private(sgd(model.parameters()), model)
        penalty = put_on(
            optimizer, model, mode, "own", attach if order == "attached" else ConflictAwarePenalty
        )
        optimizer = optimizer if order == "attached" else penalty
    reference = private(sgd(twin.model.parameters()), twin.model)
    seen, by_hand = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for (name, p), q in zip(model.named_parameters(), twin.model.parameters(), strict=True):
            p.grad_sample = torch.randn(4, *p.shape, generator=generator) * (
                1 + 9 * name.startswith("audio")
            )
            q.grad_sample = p.grad_sample.clone()
        optimizer.step()
        optimizer.zero_grad()
        reference.pre_step()
        twin.step()
        reference.zero_grad()
        seen.append(penalty.coefficients())
        by_hand.append(twin.coefficients)
    assert_same_coefficients(seen, by_hand)
    assert_same_parameters(model, twin.model)
