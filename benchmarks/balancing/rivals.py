"""The rivals: a rule of its own for each that can be one, and what else it changes in a training step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.balancing.data import Part
from benchmarks.balancing.model import Model, losses, score
from benchmarks.balancing.rules import (
    OGM,
    ClipGroups,
    Epochwise,
    SignalToNoise,
    Threshold,
    in_proportion,
    ones,
)
from gradbalance import PAPER, ConflictAwarePenalty
from gradbalance._step import sketch
from gradbalance.rules import ByHand, Coherence, Rule


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
        rule: From the names of the branches, the optimizer and the knob to a rule; None for the optimizer alone.
        knobs: The values tried on validation.
        options: Of the engine.
        weight: Of the losses of the branches' own heads.
        observe: What is observed: the ``loss`` of the contribution of each branch, the probability that it ``missed``,
            or what the validation score ``keeps`` without it.
        entries: Of the sketch of all gradients, however small the model; None for that of the library.
    """

    rule: Callable[[tuple[str, ...], Optimizer, Any], Rule] | None = None
    knobs: tuple[Any, ...] = (None,)
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.0
    observe: str | None = None
    entries: int | None = None

    def step(self, model: Model, optimizer: Optimizer, knob: Any) -> Step:
        if self.rule is None:
            return Step(model, optimizer, self.weight)
        names = tuple(model.encoders)
        rule = self.rule(names, optimizer, knob)
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
    return Rival(lambda names, optimizer, knob: rule, options=options)


def _first(names: tuple[str, ...], optimizer: Optimizer, factor: float) -> Rule:
    """The ratio of the first branch to all others, as factors around 1."""
    return ByHand(
        **{name: math.sqrt(factor if m == 0 else 1 / factor) for m, name in enumerate(names)}
    )


def _signal(rule: Rule) -> Rival:
    def build(names: tuple[str, ...], optimizer: Optimizer, knob: Any) -> Rule:
        return SignalToNoise(optimizer.param_groups[: len(names)], optimizer.state, rule)

    return Rival(build)


_PAPER = {key: value for key, value in PAPER.items() if key != "rule"}
_AS_OGM: dict[str, Any] = {"smoothing": 0.0, "apply_to": "gradient"}

RIVALS = {
    "none": Rival(),
    "Coherence": _by(Coherence()),
    # Rivals.
    "by hand": Rival(_first, (0.1, 0.3, 3.0, 10.0)),
    "own heads": Rival(weight=1.0),
    "own heads and Coherence": Rival(lambda names, optimizer, knob: Coherence(), weight=1.0),
    "OGM-GE": Rival(
        lambda names, optimizer, alpha: OGM(alpha),
        (0.1, 0.3, 1.0),
        _AS_OGM | {"noise": 1.0},
        observe="missed",
    ),
    "noise alone": _by(ones, noise=1.0),
    "clip groups": Rival(lambda names, optimizer, most: ClipGroups(most), (0.1, 0.3, 1.0), _AS_OGM),
    "epochwise, as MILES": Rival(
        lambda names, optimizer, knob: Epochwise(), options={"smoothing": 0.0}, observe="keeps"
    ),
    "paper, on the update": Rival(
        lambda names, optimizer, knob: PAPER["rule"],
        options=_PAPER | {"apply_to": "update"},
        observe="loss",
    ),
    "Adam's signal to noise": _signal(Coherence()),
    "update times signal to noise": _signal(in_proportion(1.0)),
    "update over signal to noise": _signal(in_proportion(-1.0)),
    # Parts of the formula.
    "every 4": _by(Coherence(), every=4),
    "every 16": _by(Coherence(), every=16),
    "chance 0.01": _by(Coherence(chance=0.01)),
    "raise only": _by(Coherence(clear=1e-6)),
    "damp only": _by(Coherence(clear=1e6)),
    "most 2": _by(Coherence(most=2.0)),
    "most 10": _by(Coherence(most=10.0)),
    "a threshold": _by(Threshold()),
    "smoothing 0.9": _by(Coherence(), smoothing=0.9),
    "smoothing 0.995": _by(Coherence(), smoothing=0.995),
    "1,024 entries": Rival(lambda names, optimizer, knob: Coherence(), entries=1 << 10),
    "65,536 entries": Rival(lambda names, optimizer, knob: Coherence(), entries=1 << 16),
}
