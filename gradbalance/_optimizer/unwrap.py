"""Optimizers inside optimizers: which one steps."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Where accelerate, Lightning, Opacus, SAM and schedule-free keep the optimizer that they wrap.
WRAPPED_AS = ("optimizer", "_optimizer", "original_optimizer", "base_optimizer", "base")


def layers(optimizer: object) -> list[Any]:
    """The optimizer, the one that it wraps, and so on to the innermost."""
    outside: list[Any] = [optimizer]
    while True:
        inner = _wrapped_by(outside[-1])
        if inner is None or any(inner is layer for layer in outside):
            return outside
        outside.append(inner)


def unwrap(optimizer: object) -> tuple[Optimizer, Optimizer]:
    """The optimizer that lists all parameters, and the one that steps.

    They differ under ``ZeroRedundancyOptimizer`` alone, whose inner optimizer steps the parameters
    of this rank.

    Raises:
        TypeError: If there is no optimizer, or more than one.
    """
    innermost = layers(optimizer)[-1]
    if not isinstance(innermost, Optimizer) or isinstance(optimizer, LRScheduler):
        raise _refusal(optimizer)
    shard = getattr(innermost, "optim", None)
    if isinstance(shard, Optimizer):
        return innermost, shard
    return innermost, innermost


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step cannot be seen as one step with one gradient.

    Raises:
        ValueError: For LBFGS, and for optimizers that step during the backward pass.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "`optimizer` must take one gradient a step. Got LBFGS, which evaluates the closure "
            "many times. Use SGD, Adam or another first-order optimizer."
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "`optimizer` must step after the backward pass. "
            f"Got {type(optimizer).__name__} with `overlap_with_ddp=True`, which steps during it. "
            "Leave the overlap off."
        )


def _wrapped_by(optimizer: object) -> Optimizer | None:
    for name in WRAPPED_AS:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer) and inner is not optimizer:
            return inner
    if isinstance(optimizer, Optimizer):
        # Under any other name, if it is the only one and holds all parameters of this one.
        others = held_by(optimizer)
        own = _parameter_ids(getattr(optimizer, "param_groups", ()))
        if len(others) == 1 and own <= _parameter_ids(others[0].param_groups):
            return others[0]
    return None


def held_by(owner: object) -> list[Optimizer]:
    """The optimizers in a list, tuple or dict, or in the attributes of any other object."""
    if isinstance(owner, list | tuple):
        values = list(owner)
    elif isinstance(owner, Mapping):
        values = list(owner.values())
    else:
        values = []
        for value in getattr(owner, "__dict__", {}).values():
            is_container = isinstance(value, list | tuple | Mapping)
            values += held_by(value) if is_container else [value]
    optimizers: dict[int, Optimizer] = {}
    for value in values:
        if isinstance(value, Optimizer) and value is not owner:
            optimizers[id(value)] = value
    return list(optimizers.values())


def _parameter_ids(param_groups: Iterable[Mapping[str, list[object]]]) -> set[int]:
    return {id(p) for group in param_groups for p in group["params"]}


def _refusal(optimizer: object) -> TypeError:
    """The error message for something that is no optimizer, or several."""
    name = type(optimizer).__name__
    held = held_by(optimizer)
    if isinstance(optimizer, type):
        got = f"the class {optimizer.__name__}"
        advice = f"Build it first, as in `{optimizer.__name__}(model.parameters())`."
    elif isinstance(optimizer, LRScheduler):
        got = f"{name}, a scheduler"
        advice = "Pass the optimizer that it drives."
    elif len(held) == 1:
        got = f"{name}, which holds one"
        advice = f"Pass the {type(held[0]).__name__} itself."
    elif held:
        kinds = ", ".join(type(each).__name__ for each in held)
        got = f"{name} of {len(held)} optimizers ({kinds})"
        advice = "Put the branches into `param_groups` of one optimizer."
    else:
        got = name
        advice = "Build the optimizer first, then wrap it."
    return TypeError(f"`optimizer` must be a torch.optim.Optimizer. Got {got}. {advice}")
