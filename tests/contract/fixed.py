"""Displacements on fixed gradients: two branches and a rest in one param_group, with and without the penalty."""

import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, rules

FACTOR = 0.5


class Branches(nn.Module):
    """Two branches of matrices and vectors, and a head that is in no group."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(4, 6, bias), nn.Linear(6, 3, bias))
        self.b = nn.Sequential(nn.Linear(5, 6, bias), nn.Linear(6, 3, bias))
        self.head = nn.Linear(3, 2, bias)
        for p in self.parameters():
            nn.init.normal_(p)

    @property
    def groups(self):
        return {"a": self.a, "b": self.b}


def feed(model, step):
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def displacements(make, steps=20, bias=True, **options):
    """How far each parameter moves, by name; the optimizer, wrapped if there are options of a penalty."""
    model = Branches(bias)
    torch.manual_seed(1)
    optimizer = make(model)
    if options:
        optimizer = ConflictAwarePenalty(optimizer, model.groups, **options)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(steps):
        feed(model, step)
        optimizer.step()
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}, optimizer


def assert_half_of_a_alone(make, way, steps=20, bias=True, **options):
    """Every parameter of the branch moves by half of what it does in the plain run, and every other one by all."""
    plain, _ = displacements(make, steps, bias)
    scaled, optimizer = displacements(make, steps, bias, rule=rules.ByHand(a=FACTOR), **options)
    assert f"update by {way}" in repr(optimizer)
    for name, before in plain.items():
        assert before.norm() > 0
        expected = before * (FACTOR if name.startswith("a.") else 1.0)
        assert (scaled[name] - expected).norm() <= 0.02 * before.norm(), name
