"""The penalty by hand: coefficients in slow Python between ``backward()`` and the plain optimizer's ``step()``."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty
from tests.contract.own_rules import RULES
from tests.reference import Reference

NAMES = ("text", "audio", "visual")
TOLERANCE = 1e-6
SMOOTHING = 0.9


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


def put_on(optimizer, model, mode="update", rule="conflicts", by=ConflictAwarePenalty, **options):
    """The penalty on an optimizer of the model, by the wrapper or by ``attach``, with one of the rules of the tests."""
    rule = RULES[rule][0]() if isinstance(rule, str) else rule
    return by(
        optimizer, groups_of(model), rule, apply_to=mode, **{"smoothing": SMOOTHING, **options}
    )


def batch(step, dtype=torch.float32, size=4):
    """Inputs and target of a step; audio is ten times as large, so that it dominates."""
    generator = torch.Generator().manual_seed(100 + step)
    text, audio, visual, target = (
        torch.randn(size, n, generator=generator).to(dtype) for n in (3, 4, 5, 2)
    )
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


class ReferenceEngine(Reference):
    """The slow reference, which also keeps its coefficients between the steps that are measured."""

    def __init__(self, rule, *, every=1, smoothing=SMOOTHING, window=None):
        def remembering(given):
            self.decided = rule(given)
            return self.decided

        super().__init__(remembering, smoothing**every, window)
        self.every, self.calls, self.decided = every, 0, None
        self.told = []  # errors since the last step that was measured

    def step(self, norms, errors=None, cosines=None):
        """The coefficients of a step; lists of floats, None for a group without an error or a cosine."""
        self.calls += 1
        self.told += [] if errors is None else [errors]
        if (self.calls - 1) % self.every == 0:
            told, self.told = self.told, []
            return super().step(
                norms, [mean(column) for column in zip(*told, strict=True)] or None, cosines
            )
        start, stop = self.window or (0, None)
        inside = start <= self.steps and (stop is None or self.steps < stop)
        self.steps += 1
        return list(self.decided) if inside and self.decided else [1.0] * len(norms)


def mean(values):
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


class ByHand:
    """A plain optimizer with one param_group per group, and the coefficients applied by hand at its every step.

    Args:
        factory: Makes the plain optimizer out of param_groups.
        model: A twin of the trained model.
        apply_to: As for the penalty.
        rule: The name of one of the rules of the tests.
        by_rate: Whether an update is scaled by the learning rate, or by rescaling the finished update.
        late: Whether a step has the coefficients of the step before.
        **options: Of the engine.
    """

    def __init__(
        self,
        factory,
        model,
        apply_to="update",
        rule="conflicts",
        by_rate=True,
        late=False,
        **options,
    ):
        self.groups = {name: list(module.parameters()) for name, module in groups_of(model).items()}
        grouped = {id(p) for members in self.groups.values() for p in members}
        rest = [p for p in model.parameters() if id(p) not in grouped]
        self.optimizer = factory([{"params": p} for p in (*self.groups.values(), rest) if p])
        self.model, self.apply_to = model, apply_to
        self.by_rate = by_rate and apply_to != "displacement"
        # A late decision is that of the step before, and the window is that of the step itself.
        self.window = options.pop("window", None) or (0, None) if late else None
        self.engine = ReferenceEngine(RULES[rule][1](), **options)
        self.coefficients, self.last = {}, {}
        self.pending = dict.fromkeys(NAMES, 1.0)

    def decide(self, errors=None, scale=1.0):
        """The coefficients out of the gradients as they lie there, each divided by ``scale``."""
        norms = [norm_by_hand(p.grad for p in members) / scale for members in self.groups.values()]
        observed = None if errors is None else [errors.get(name) for name in NAMES]
        before = self.engine.steps
        cosines, now = zip(*map(self.cosine, NAMES), strict=True)
        # At the steps that are measured, and at those just before: coherence is that of successive gradients.
        reads = any((self.engine.calls + ahead) % self.engine.every == 0 for ahead in (0, 1))
        self.coefficients = dict(
            zip(NAMES, self.engine.step(norms, observed, cosines), strict=True)
        )
        if reads and self.engine.steps > before:
            self.last |= {name: g for name, g in zip(NAMES, now, strict=True) if any(g)}
        if self.window is not None:
            start, stop = self.window
            decided, self.pending = self.pending, self.coefficients
            inside = start <= before and (stop is None or before < stop)
            self.coefficients = decided if inside else dict.fromkeys(NAMES, 1.0)

    def cosine(self, name):
        """The cosine between this gradient of a group and the last one that it had, if any; and the gradient."""
        now = []
        for p in self.groups[name]:
            if p.device.type != "meta" and p.requires_grad:
                g = torch.zeros_like(p) if p.grad is None else p.grad
                now += [x.real for x in g.detach().to_dense().flatten().tolist()]
        last = self.last.get(name)
        if last is None or len(last) != len(now) or not any(last) or not any(now):
            return None, now
        return sum(x * y for x, y in zip(now, last, strict=True)) / (
            math.hypot(*now) * math.hypot(*last)
        ), now

    @contextmanager
    def applied(self):
        """The coefficients on the gradients for good, on the rates for the time of a step, or on what the step did."""
        if self.apply_to == "gradient":
            with torch.no_grad():
                for name, members in self.groups.items():
                    for p in members:
                        if p.grad is not None:
                            p.grad = p.grad * self.coefficients[name]
            yield
        elif self.by_rate:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            for group, c in zip(
                self.optimizer.param_groups, self.coefficients.values(), strict=False
            ):
                group["lr"] = group["lr"] * c
            yield
            for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
        else:
            start = {
                name: [p.detach().clone() for p in members] for name, members in self.groups.items()
            }
            yield
            with torch.no_grad():
                for name, c in self.coefficients.items():
                    for p, before in zip(self.groups[name], start[name], strict=True):
                        p.copy_(before + c * (p - before))

    def step(self, errors=None, scale=1.0):
        self.decide(errors, scale)
        with self.applied():
            getattr(self.optimizer, "second_step", self.optimizer.step)()

    def train(self, steps, observe=True):
        """Loss, backward, step, zero_grad; the coefficients of each step."""
        seen = []
        for step in steps:
            loss_of(self.model, step).backward()
            if hasattr(
                self.optimizer, "first_step"
            ):  # SAM: the gradient that counts is the one up the hill
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
        torch.testing.assert_close(
            p, q, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_coefficients(seen, expected):
    """The coefficients of all steps agree, and some of them act: a test where all are 1 would show nothing."""
    assert len(seen) == len(expected)
    for ours, by_hand in zip(seen, expected, strict=True):
        assert ours == pytest.approx(by_hand, rel=TOLERANCE)
    assert any(c != 1 for step in expected for c in step.values())


@contextmanager
def refused(record_property, error, match):
    """What is inside raises, and the message goes into the matrix of what works and what is refused."""
    with pytest.raises(error, match=match) as caught:
        yield
    record_property("refused", str(caught.value))
