"""A model of branches that ranks train together, and the same training in one process by hand."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cosine_similarity
from torch.optim import AdamW

from gradbalance import ConflictAwarePenalty, rules
from tests.contract import own_rules
from tests.contract.oracle import ReferenceEngine
from tests.reference import SlowConflictAware

NAMES = ("text", "audio", "visual")
SMOOTHING, LR = 0.5, 0.01
CONFLICTS = rules.ConflictAware(eta=0.3, threshold=1.2)
RULES = {**own_rules.RULES, "conflicts": (lambda: CONFLICTS, lambda: SlowConflictAware(CONFLICTS))}


class Branches(nn.Module):
    """Branches of uneven strength; `visual` has one row only, so that with two ranks one holds nothing of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.audio = nn.Linear(6, 3)
        self.visual = nn.Linear(6, 1)
        self.head = nn.Linear(8, 1)
        self.double()

    def forward(self, x):
        features = [3 * self.text(x), self.audio(x), 0.3 * self.visual(x)]
        return self.head(torch.cat(features, 1)), [f.mean(1) for f in features]

    def groups(self):
        return {name: getattr(self, name) for name in NAMES}


def batch(step):
    """The global batch of a step: 8 samples."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x.sum(1, keepdim=True).tanh()


def losses(model, x, y):
    """The loss, and the error of each branch on its own."""
    prediction, alone = model(x)
    return (prediction - y).square().mean(), {
        n: (a - y[:, 0]).abs().mean() for n, a in zip(NAMES, alone, strict=True)
    }


class Run(NamedTuple):
    """What a training run shows: figures per step, and the parameters at the end."""

    norms: list
    coherences: list
    coefficients: list
    parameters: dict
    all_reduces: list  # how many the optimizer's step took, per step


def by_hand(
    steps=3,
    *,
    apply_to="update",
    rule="conflicts",
    every=1,
    max_norm=None,
    observing=True,
    late=False,
    make=AdamW,
):
    """Training in one process without the library: a plain optimizer, and the rule as slow loops."""
    model, run = Branches(), Run([], [], [], {}, [])
    engine = ReferenceEngine(RULES[rule][1](), every=every, smoothing=SMOOTHING)
    last, pending = None, [1.0] * 3
    parts = [list(getattr(model, name).parameters()) for name in (*NAMES, "head")]
    optimizer = make([{"params": part} for part in parts], lr=LR)
    for step in range(steps):
        optimizer.zero_grad()
        loss, errors = losses(model, *batch(step))
        loss.backward()
        gradients = [torch.cat([p.grad.flatten() for p in part]) for part in parts[:3]]
        norms = [g.norm().item() for g in gradients]
        cosines = [
            cosine_similarity(g, old, 0).item()
            for g, old in zip(gradients, last or gradients, strict=True)
        ]
        observed = [e.item() for e in errors.values()] if observing else None
        factors = engine.step(norms, observed, cosines if last else [None] * 3)
        if late:
            factors, pending = pending, factors
        if step % every == 0:
            last = gradients
        run.coherences.append(
            [math.nan if a is None else a for a in engine.means(engine.coherences, 3)]
        )
        run.norms.append(norms)
        run.coefficients.append(factors)
        if apply_to == "gradient":
            for part, c in zip(parts, factors, strict=False):
                for p in part:
                    p.grad *= c
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if apply_to == "update":
            for group, c in zip(optimizer.param_groups, factors, strict=False):
                group["lr"] = LR * c
        optimizer.step()
    run.parameters.update((n, p.detach()) for n, p in model.named_parameters())
    return run


def share(tensors):
    """This rank's part of a batch."""
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def backward(model, tensors):
    loss, errors = losses(model, *tensors)
    loss.backward()
    return [errors]


def full(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def train(model, optimizer, steps=range(3), *, part=share, backward=backward, observing=True):
    """Train on this rank's part of the batches with an optimizer that has the penalty on."""
    bare, run = getattr(model, "module", model), Run([], [], [], {}, [])
    for step in steps:
        optimizer.zero_grad()
        seen = backward(model, part(batch(step)))
        for errors in seen if observing else []:
            optimizer.observe(**errors)
        with CommDebugMode() as calls:
            optimizer.step()
        run.norms.append(optimizer.balance.norms.tolist())
        run.coherences.append(optimizer.balance.coherences.tolist())
        run.coefficients.append(list(optimizer.coefficients().values()))
        run.all_reduces.append(
            sum(n for call, n in calls.get_comm_counts().items() if "reduce" in str(call))
        )
    run.parameters.update((n, full(p)) for n, p in bare.named_parameters())
    return run


def adamw(parameters):
    return AdamW(parameters, lr=LR)


def penalised(model, make=adamw, rule="conflicts", **options):
    groups = getattr(model, "module", model).groups()
    return ConflictAwarePenalty(
        make(model.parameters()), groups, RULES[rule][0](), smoothing=SMOOTHING, **options
    )
