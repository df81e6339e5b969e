"""Two branches and a head in a plain loop."""

import math

import torch
from torch import nn

from gradbalance import ConflictAwarePenalty
from gradbalance.rules import ConflictAware

# The norms of this step alone decide: text is damped, whose norm is always the larger one.
PLAIN = {"rule": ConflictAware(), "smoothing": 0.0}


def conflict_aware(**options):
    return {"rule": ConflictAware(**options), "smoothing": 0.0}


class TwoBranches(nn.Module):
    """Two encoders of unequal strength and a head that belongs to no group."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.text, self.audio, self.head = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 1)

    def forward(self, batch):
        text = torch.tanh(self.text(batch[:, :4]) * 3)
        return self.head(text + torch.tanh(self.audio(batch[:, 4:])))


def groups_of(model):
    return {"text": model.text, "audio": model.audio}


def penalised(model, rule, make=torch.optim.SGD, groups=None, lr=0.05, **options):
    """The wrapper around an optimizer of all parameters."""
    optimizer = make(model.parameters(), lr=lr)
    return ConflictAwarePenalty(optimizer, groups or groups_of(model), rule, **options)


def backward(model, step=0):
    model.zero_grad()
    batch = torch.randn(16, 9, generator=torch.Generator().manual_seed(step))
    loss = (model(batch) - 1).square().mean()
    loss.backward()
    return loss


def fixed_gradients(model, step=0):
    """Gradients that depend on the step alone, so that runs with other coefficients see the same ones."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if name.startswith("text"):  # small, and alike at all steps
            p.grad = 0.3 * (1 + p.grad)


def train(model, optimizer, steps, gradients=backward):
    """Some steps; the coefficients after each."""
    seen = []
    for step in steps:
        gradients(model, step)
        optimizer.step()
        seen.append(optimizer.coefficients() if hasattr(optimizer, "coefficients") else None)
    return seen


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def slow_norm(*members):
    """The norm of the gradients of modules and parameters."""
    total = 0.0
    for member in members:
        for p in member.parameters() if isinstance(member, nn.Module) else [member]:
            total += float((p.grad.double() ** 2).sum())
    return math.sqrt(total)


def equal(one, other):
    """Bitwise, tensor by tensor, NaN where the other has it."""
    for a, b in zip(one, other, strict=True):
        if not torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)):
            return False
    return True
