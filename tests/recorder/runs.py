"""A penalty over one linear layer per group, and a function that steps it."""

import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, rules

NORMS_ALONE = rules.ConflictAware(eta=0.1)


def make_penalty(names=("text", "audio"), gains=(10.0, 1.0), rule=NORMS_ALONE, **options):
    """The gradient norm of each layer is its gain, times the scale of the step, times 2 √5."""
    layers = [nn.Linear(4, 1) for _ in names]
    parameters = [p for layer in layers for p in layer.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.01)
    optimizer = ConflictAwarePenalty(sgd, dict(zip(names, layers, strict=True)), rule, **options)

    def step(scale=1.0):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for layer, gain in zip(layers, gains, strict=True):
            loss = loss + gain * scale * layer(torch.ones(2, 4)).sum()
        loss.backward()
        optimizer.step()

    return optimizer, step


def make_group_names(count):
    return tuple(f"group {m}" for m in range(count))
