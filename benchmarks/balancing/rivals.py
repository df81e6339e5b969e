"""The rivals: a rule of its own for each that can be one, and what else it changes in a training step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.balancing.data import Part
from benchmarks.balancing.model import Model, losses, score
from benchmarks.balancing.rules import (
    Hypergradient,
    SignalToNoise,
    UsefulAlone,
    certain,
    in_proportion,
)
from gradbalance import PAPER, ConflictAwarePenalty
from gradbalance._step import sketch
from gradbalance.rules import OGM, ByHand, ClipGroups, Epochwise, Rule, Useful


class Step:
    """One training step on the joint loss plus ``weight`` times the losses of the branches' own heads."""

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        weight: float = 0.0,
        tell: Callable[[list[Tensor], Tensor], None] | None = None,
        after_epoch: Callable[[Part], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.weight, self.tell = model, optimizer, weight, tell
        self.after_epoch = after_epoch

    def __call__(self, inputs: list[Tensor], target: Tensor) -> None:
        self.optimizer.zero_grad()
        features = self.model.features(inputs)
        loss = losses(self.model.output(features), target).mean()
        if self.weight:
            own = zip(self.model.heads, features, strict=True)
            loss = loss + self.weight * sum(losses(head(f), target).mean() for head, f in own)
        loss.backward()
        if self.tell is not None:
            with torch.no_grad():
                self.tell(features, target)
        self.optimizer.step()

    def coefficients(self) -> list[float]:
        if isinstance(self.optimizer, ConflictAwarePenalty):
            return list(self.optimizer.coefficients().values())
        return [1.0] * len(self.model.encoders)


@dataclass(frozen=True)
class Rival:
    """How to train.

    Args:
        rule: From the model, the optimizer and the knob to a rule; None for the optimizer alone.
        knobs: The values tried on validation.
        options: Of the engine.
        weight: Of the losses of the branches' own heads.
        observe: What is observed: the ``loss`` of the contribution of each branch, the probability that it ``missed``,
            or what the validation score ``keeps`` without it.
        prepare: Changes the model or the optimizer, given the knob.
        watch: For how many epochs the default rule is watched first, whose factors are constant for a fresh run.
        entries: Of the sketch of all gradients, however small the model; None for that of the library.
    """

    rule: Callable[[Model, Optimizer, Any], Rule] | None = None
    knobs: tuple[Any, ...] = (None,)
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.0
    observe: str | None = None
    prepare: Callable[[Model, Optimizer, Any], None] | None = None
    watch: int = 0
    entries: int | None = None

    def step(self, model: Model, optimizer: Optimizer, knob: Any) -> Step:
        if self.prepare is not None:
            self.prepare(model, optimizer, knob)
        if self.rule is None:
            return Step(model, optimizer, self.weight)
        names = tuple(model.encoders)
        rule = self.rule(model, optimizer, knob)
        wrapped = ConflictAwarePenalty(
            optimizer, dict(model.encoders.items()), rule, **self.options
        )
        entries, small = self.entries or sketch.ENTRIES, -1 if self.entries else sketch.SMALL
        with patch.multiple(sketch, ENTRIES=entries, SMALL=small):
            wrapped.penalty._engine._current_layout()  # makes the sketch

        def tell(features: list[Tensor], target: Tensor) -> None:
            errors = [losses(part, target) for part in model.contributions(features)]
            if self.observe == "missed":
                errors = [1 - torch.exp(-e) for e in errors]
            wrapped.observe(**{name: e.mean() for name, e in zip(names, errors, strict=True)})

        def after_epoch(valid: Part) -> None:
            features = model.features(valid.inputs)
            whole = max(score(model.output(features), valid.target), 1e-3)
            kept = [score(o, valid.target) / whole for o in model.without(features, features)]
            wrapped.observe(
                **{name: min(max(k, 0.0), 1.0) for name, k in zip(names, kept, strict=True)}
            )

        keeps = self.observe == "keeps"
        return Step(
            model,
            wrapped,
            self.weight,
            None if keeps or not self.observe else tell,
            after_epoch if keeps else None,
        )


def _by(rule: Rule, **options: Any) -> Rival:
    return Rival(lambda model, optimizer, knob: rule, options=options)


def _first(model: Model, optimizer: Optimizer, factor: float) -> Rule:
    """The ratio of the first branch to all others, as factors around 1."""
    first, *others = model.encoders
    root = math.sqrt(factor)
    return ByHand(**{first: root}, **dict.fromkeys(others, 1 / root))


def _slower(model: Model, optimizer: Optimizer, factor: float) -> Rule:
    """A lower rate for the branch that is known to be noise, or worse than another."""
    noisy = model.testbed.noisy
    return ByHand(**({} if noisy is None else {noisy: factor}))


def by_hand(factors: dict[str, float]) -> Rival:
    """Constant factors."""
    return Rival(lambda model, optimizer, knob: ByHand(**factors))


def _decay(model: Model, optimizer: Optimizer, decay: float) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = decay


def _dropout(model: Model, optimizer: Optimizer, share: float) -> None:
    """Dropout after each hidden layer."""

    def drop(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, share, layer.training)

    for layer in model.encoders.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(drop)


def _signal(rule: Rule) -> Rival:
    def build(model: Model, optimizer: Optimizer, knob: Any) -> Rule:
        groups = optimizer.param_groups[: len(model.encoders)]
        return SignalToNoise(groups, optimizer.state, rule)

    return Rival(build)


_PAPER = {key: value for key, value in PAPER.items() if key != "rule"}
_AS_OGM: dict[str, Any] = {"smoothing": 0.0, "apply_to": "gradient"}

RIVALS = {
    "none": Rival(),
    "Useful": _by(Useful()),
    # Cures that everybody has.
    "a slower noisy branch": Rival(_slower, (0.1, 0.3)),
    "weight decay": Rival(knobs=(0.1, 1.0), prepare=_decay),
    "dropout": Rival(knobs=(0.2, 0.5), prepare=_dropout),
    "by hand": Rival(_first, (0.1, 0.3, 3.0, 10.0)),
    # The default rule watched, then its factors as constants for a fresh run.
    "watched for 1 epoch": Rival(watch=1),
    "watched for 5 epochs": Rival(watch=5),
    # Rivals.
    "hypergradient": Rival(
        lambda model, optimizer, beta: Hypergradient(beta), (1e-3, 1e-2), {"smoothing": 0.0}
    ),
    "own heads": Rival(weight=1.0),
    "own heads and Useful": Rival(lambda model, optimizer, knob: Useful(), weight=1.0),
    "OGM-GE": Rival(
        lambda model, optimizer, alpha: OGM(alpha),
        (0.1, 0.3, 1.0),
        _AS_OGM | {"noise": 1.0},
        observe="missed",
    ),
    "noise alone": _by(ByHand(), noise=1.0),
    "clip groups": Rival(lambda model, optimizer, most: ClipGroups(most), (0.1, 0.3, 1.0), _AS_OGM),
    "epochwise, as MILES": Rival(
        lambda model, optimizer, knob: Epochwise(), options={"smoothing": 0.0}, observe="keeps"
    ),
    "paper, on the update": Rival(
        lambda model, optimizer, knob: PAPER["rule"],
        options=_PAPER | {"apply_to": "update"},
        observe="loss",
    ),
    "update times signal to noise": _signal(in_proportion(1.0)),
    "update over signal to noise": _signal(in_proportion(-1.0)),
    # Parts of the formula.
    "every 4": _by(Useful(), every=4),
    "every 16": _by(Useful(), every=16),
    "without shrinkage": _by(certain(Useful())),
    "useful part alone": _by(UsefulAlone()),
    "most 3": _by(Useful(most=3.0)),
    "most 30": _by(Useful(most=30.0)),
    "smoothing 0.98": _by(Useful(), smoothing=0.98),
    "smoothing 0.999": _by(Useful(), smoothing=0.999),
    "1,024 entries": Rival(lambda model, optimizer, knob: Useful(), entries=1 << 10),
}
