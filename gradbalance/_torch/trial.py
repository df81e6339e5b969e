"""A trial of an optimizer on a twin with toy parameters: how its steps can be scaled, or that they cannot."""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._torch.displacement import Displacement
from gradbalance._torch.learning_rates import LearningRates
from gradbalance._torch.twin import Twin, undisturbed
from gradbalance._torch.unwrap import layers, unwrap

# Torch's own whose step is no multiple of the rate: it is capped or decays by a schedule in which the rate stands.
NOT_BY_RATE = (torch.optim.Adafactor, torch.optim.Rprop)
# Their optimizers hand the step on as it is, and need more than parameters.
FRAMEWORKS = (
    "accelerate",
    "deepspeed",
    "gradbalance",
    "lightning",
    "lightning_fabric",
    "opacus",
    "pytorch_lightning",
    "torch",
)
STEPS, FACTOR = 24, 0.5  # more steps than slow weights wait
TOLERANCE = 0.02
AT_ONCE = 0.1  # of a factor that sets in later: what there is of averages follows slowly
RESOLVED = 1e-6  # of a parameter: what float32 can tell of a displacement

Way = type[LearningRates] | type[Displacement]


def way_to_scale(optimizer: Any) -> LearningRates | Displacement:
    """How the steps of some parameters of the optimizer are scaled while those of the others stay as they are.

    The classes of torch are known. Any other optimizer is tried: on a twin with toy parameters its step is scaled by
    the learning rate, and if the parameters do not move as they should, by their displacement. One around it is tried
    too, unless it is a framework's.

    Raises:
        ValueError: If neither works, or if it cannot be tried.
    """
    _, stepper = unwrap(optimizer)
    way = _way_alone(stepper)
    wrapper = next(
        (layer for layer in layers(optimizer) if isinstance(layer, Optimizer) and not _is_known(layer)), None
    )
    # Once it has stepped, what it keeps does not fit toy parameters.
    if wrapper is not None and wrapper is not stepper and not stepper.state:
        try:
            trial = _Trial(wrapper, stepper, at_one=False)
        except Exception:  # it may need a model
            return way(stepper)
        if not (trial.moves and trial.follows(way)):
            raise _refusal(wrapper, f"which makes of the steps of {type(stepper).__name__} others", False)
    return way(stepper)


def _way_alone(optimizer: Optimizer) -> Way:
    """The way for an optimizer around which there is no other."""
    has_rate = all(group.get("lr") is not None for group in optimizer.param_groups)
    if isinstance(optimizer, torch.optim.ASGD):
        raise _refusal(optimizer, "which follows its rate a step late and keeps averages of the parameters", True)
    if f"{type(optimizer).__module__}.".startswith("torch.optim."):
        return LearningRates if has_rate and not isinstance(optimizer, NOT_BY_RATE) else Displacement
    try:
        trial = _Trial(optimizer, optimizer, at_one=False)
    except Exception as error:
        raise _refusal(optimizer, f"which fails on a twin with small parameters: {error!r}", False) from error
    if not trial.moves:
        raise _refusal(optimizer, "whose `step()` hardly moves parameters, whatever its learning rate", False)
    if has_rate and trial.follows(LearningRates) and not _is_capped(optimizer, trial):
        return LearningRates
    if not trial.copied and trial.follows(Displacement):
        return Displacement
    why = "which does not follow it and keeps copies of the parameters"
    if not trial.copied:
        why = "in which the steps of some parameters change those of others"
    raise _refusal(optimizer, why, trial.follows(None))


def _is_known(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.split(".")[0] in FRAMEWORKS


def _refusal(optimizer: Optimizer, why: str, gradients_count: bool) -> ValueError:
    return ValueError(
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters alone, by the '
        f"learning rate or after the fact. Got {type(optimizer).__name__}, {why}. "
        + ('Use `apply_to="gradient"`, or another optimizer.' if gradients_count else "Use another optimizer.")
    )


def _is_capped(optimizer: Optimizer, trial: "_Trial") -> bool:
    """Whether at a rate of 1 and with gradients that agree the step can be scaled after the fact alone.

    Then it has a cap or a rate of its own, which a few steps at a low rate do not show.
    """
    try:
        high = _Trial(optimizer, optimizer, at_one=True)
    except Exception:
        return False
    if trial.copied or high.copied or high.follows(LearningRates):
        return False
    return trial.follows(Displacement) and high.follows(Displacement)


def _all_move(places: list[list[Tensor]]) -> bool:
    return all(bool((q - p).norm() > RESOLVED * p.norm()) for p, q in zip(places[0], places[-1], strict=True))


class _Trial:
    """Runs of an optimizer on a twin, plain and with every other parameter scaled.

    Args:
        optimizer: Is left as it is.
        stepper: The same, or the one inside it whose steps are scaled.
        at_one: Whether at a learning rate of 1 and with gradients that agree, instead of a low one and any gradients.
    """

    def __init__(self, optimizer: Optimizer, stepper: Optimizer, at_one: bool) -> None:
        self._optimizer, self._stepper, self._at_one = optimizer, stepper, at_one
        self._plain, twin = self._first_run()
        self.copied = twin.keeps_copies()

    def _first_run(self) -> tuple[list[list[Tensor]], Twin]:
        """The plain run, as simple as goes: some steps need a closure, or state that is set up at construction."""
        errors: list[Exception] = []
        for self._with_closure, self._with_state in product((False, True), repeat=2):
            try:
                found = self._run(None, STEPS)
            except Exception as error:
                errors.append(error)
            else:
                if _all_move(found[0]):
                    return found
        if errors:
            raise errors[0]
        return found

    @property
    def moves(self) -> bool:
        """Whether each toy moves by as much as can be told."""
        return _all_move(self._plain)

    def follows(self, way: Way | None) -> bool:
        """Whether the scaled parameters move FACTOR as far as in the plain run, and the others as before.

        Args:
            way: How they are scaled; None for their gradients.
        """
        late = self.copied or self._follows_from(STEPS // 2, way, AT_ONCE)
        return late and self._follows_from(0, way, TOLERANCE)

    def _follows_from(self, first: int, way: Way | None, tolerance: float) -> bool:
        try:
            scaled, _ = self._run(way, first)
        except Exception:  # not every step takes several param_groups
            return False
        places = zip(self._plain[first], self._plain[-1], scaled[-1], strict=True)
        for i, (start, plain, end) in enumerate(places):
            moved = plain - start
            expected = moved * (FACTOR if i % 2 == 0 else 1.0)
            if not (end - start - expected).norm() <= tolerance * moved.norm():
                return False
        return True

    @undisturbed()
    def _run(self, kind: Way | None, first: int) -> tuple[list[list[Tensor]], Twin]:
        """Where the toys are before each step and at the end; they are scaled from step ``first`` on."""
        twin = Twin(self._optimizer, self._stepper, self._at_one, self._with_state)
        places = [twin.places()]
        for step in range(STEPS):
            gradients = twin.gradients(agreeing=self._at_one)
            if step >= first and kind is None:
                gradients[::2] = [g * FACTOR for g in gradients[::2]]
            if step == first and kind is not None:
                way = kind(twin.stepper)
                way.divide({id(p): 0 for p in twin.toys[::2]})
                factor = torch.full((1,), FACTOR, device=twin.toys[0].device)
                twin.around_each_step(partial(way.begin, factor), way.end)
            twin.step(gradients, self._with_closure)
            places.append(twin.places())
        return places, twin
