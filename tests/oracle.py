"""The penalty by hand: coefficients in slow Python between ``backward()`` and the plain optimizer's ``step()``."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gradbalance._settings import Settings
from tests.reference import ReferenceRule

NAMES = ("text", "audio", "visual")
TOLERANCE = 1e-6
# Not the defaults: these tests are about optimizers, and the norms alone make conflicts enough.
RULE = {"eta": 0.1, "threshold": 3.0, "smoothing": 0.9, "agreement": None, "max_coefficient": 1.0}


class Toy(nn.Module):
    """Three branches, of which audio dominates, and a head that belongs to no group."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.text = nn.Linear(3, 2, bias=bias, dtype=dtype)
            self.audio = nn.Linear(4, 2, bias=bias, dtype=dtype)
            self.visual = nn.Linear(5, 2, bias=bias, dtype=dtype)
            self.head = nn.Linear(2, 2, bias=bias, dtype=dtype)

    def forward(self, text, audio, visual):
        return self.head(torch.tanh(self.text(text)) + self.audio(audio) + self.visual(visual))


def groups_of(model):
    return {name: getattr(model, name) for name in NAMES}


def batch(step, dtype=torch.float32, size=4):
    """Inputs and target of a step; audio is ten times as large, so that it dominates."""
    generator = torch.Generator().manual_seed(100 + step)
    text, audio, visual, target = (torch.randn(size, n, generator=generator).to(dtype) for n in (3, 4, 5, 2))
    return (text, 10 * audio, visual), target


def loss_of(model, step):
    inputs, target = batch(step, model.head.weight.dtype)
    return (model(*inputs) - target).abs().mean()


def errors_at(step):
    """Errors to observe, of another order at every step, so that penalty and modulation both come and go."""
    return {"text": 1.0 + step % 3, "audio": 1.5, "visual": 2.5 - step % 2}


def norm_by_hand(gradients):
    """The l2 norm of all entries, one after the other in Python floats."""
    squares = 0.0
    for g in gradients:
        if g is not None and g.device.type != "meta":
            g = g.coalesce().values() if g.is_sparse else g
            squares += sum(abs(x) ** 2 for x in g.detach().flatten().tolist())
    return math.sqrt(squares)


class ByHand:
    """A plain optimizer with one param_group per group, and the coefficients applied by hand at its every step.

    Args:
        factory: Makes the plain optimizer out of param_groups.
        model: A twin of the trained model.
        apply_to: ``"update"`` or ``"gradient"``.
        **options: Of the penalty.
    """

    def __init__(self, factory, model, apply_to, **options):
        self.groups = {name: list(module.parameters()) for name, module in groups_of(model).items()}
        grouped = {id(p) for members in self.groups.values() for p in members}
        rest = [p for p in model.parameters() if id(p) not in grouped]
        self.optimizer = factory([{"params": p} for p in (*self.groups.values(), rest) if p])
        self.model, self.apply_to = model, apply_to
        self.rule = ReferenceRule(Settings(apply_to=apply_to, **{**RULE, **options}))
        self.coefficients, self.last = {}, {}

    def decide(self, errors=None, scale=1.0):
        """The coefficients out of the gradients as they lie there, each divided by ``scale``."""
        norms = [norm_by_hand(p.grad for p in members) / scale for members in self.groups.values()]
        observed = None if errors is None else [errors.get(name) for name in NAMES]
        cosines = None if self.rule.settings.agreement is None else [self.cosine(name) for name in NAMES]
        self.coefficients = dict(zip(NAMES, self.rule.step(norms, observed, cosines), strict=True))

    def cosine(self, name):
        """The cosine between this gradient of a group and its last one, None if there is none."""
        now = [x.real for p in self.groups[name] for x in p.grad.to_dense().flatten().tolist()]
        last, self.last[name] = self.last.get(name), now
        if last is None:
            return None
        return sum(x * y for x, y in zip(now, last, strict=True)) / (math.hypot(*now) * math.hypot(*last))

    @contextmanager
    def applied(self):
        """The coefficients on the gradients for good, or on the learning rates for the time of a step."""
        if self.apply_to == "gradient":
            with torch.no_grad():
                for name, members in self.groups.items():
                    for p in members:
                        if p.grad is not None:
                            p.grad = p.grad * self.coefficients[name]
            yield
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, c in zip(self.optimizer.param_groups, self.coefficients.values(), strict=False):
            group["lr"] = group["lr"] * c
        yield
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def step(self, errors=None, scale=1.0):
        self.decide(errors, scale)
        with self.applied():
            getattr(self.optimizer, "second_step", self.optimizer.step)()

    def train(self, steps, observe=True):
        """Loss, backward, step, zero_grad; the coefficients of each step."""
        seen = []
        for step in steps:
            loss_of(self.model, step).backward()
            if hasattr(self.optimizer, "first_step"):  # SAM: the gradient that counts is the one up the hill
                self.optimizer.first_step(zero_grad=True)
                loss_of(self.model, step).backward()
            self.step(errors_at(step) if observe else None)
            self.optimizer.zero_grad()
            seen.append(self.coefficients)
        return seen


def train(model, optimizer, steps, *, penalty=None, observe=True, closure=False):
    """The user's loop with the optimizer as it is given; the coefficients of each step."""
    penalty = penalty or optimizer
    seen = []
    for step in steps:

        def evaluate(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if observe:
            penalty.observe(**errors_at(step))
        if hasattr(optimizer, "first_step"):  # SAM wants a gradient before the closure
            evaluate()
        if closure or hasattr(optimizer, "first_step"):
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        seen.append(penalty.coefficients())
    return seen


def assert_same_parameters(model, twin, tolerance=TOLERANCE):
    """The parameters agree; a tolerance of 0 means bitwise."""
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_coefficients(seen, expected):
    """The coefficients of all steps agree, and some of them act: a test where all are 1 would show nothing."""
    assert len(seen) == len(expected)
    for ours, by_hand in zip(seen, expected, strict=True):
        assert ours == pytest.approx(by_hand, rel=TOLERANCE)
    assert min(c for step in expected for c in step.values()) < 1


@contextmanager
def refused(record_property, error, match):
    """What is inside raises, and the message goes into the matrix of what works and what is refused."""
    with pytest.raises(error, match=match) as caught:
        yield
    record_property("refused", str(caught.value))
