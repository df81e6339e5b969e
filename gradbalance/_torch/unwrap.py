"""Optimizers inside optimizers: which one to hook."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import LBFGS, Optimizer

# Where wrappers keep the optimizer that they wrap: accelerate, Lightning, Opacus, SAM, schedule-free.
WRAPPED_AS = ("optimizer", "_optimizer", "original_optimizer", "base_optimizer", "base")


def layers(optimizer: Any) -> list[Any]:
    """The optimizer, the one that it wraps, and so on to the innermost."""
    found = [optimizer]
    while (inner := _wrapped_by(found[-1])) is not None and all(inner is not outer for outer in found):
        found.append(inner)
    return found


def unwrap(optimizer: Any) -> tuple[Optimizer, Optimizer]:
    """The optimizer that lists all parameters, and the innermost one, which steps.

    They differ under ZeroRedundancyOptimizer alone, whose inner optimizer steps this rank's share of the parameters.

    Raises:
        TypeError: If there is no optimizer.
    """
    found = layers(optimizer)[-1]
    if not isinstance(found, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer. Got {type(optimizer).__name__}. "
            "Build the optimizer first, then wrap it."
        )
    shard = getattr(found, "optim", None)
    return found, shard if isinstance(shard, Optimizer) else found


def parts(optimizer: Any) -> list[Optimizer]:
    """The optimizers that this one keeps in its attributes, or in a list, tuple or dict there."""
    found: list[Any] = []
    for value in vars(optimizer).values():
        if isinstance(value, Mapping):
            found += value.values()
        elif isinstance(value, list | tuple):
            found += value
        else:
            found.append(value)
    return list({id(o): o for o in found if isinstance(o, Optimizer) and o is not optimizer}.values())


def _wrapped_by(optimizer: Any) -> Optimizer | None:
    for name in WRAPPED_AS:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer) and inner is not optimizer:
            return inner
    if isinstance(optimizer, Optimizer):
        # Under any other name, if it is the only one and holds whatever this one does.
        others = parts(optimizer)
        if len(others) == 1 and _ids(getattr(optimizer, "param_groups", ())) <= _ids(others[0].param_groups):
            return others[0]
    return None


def _ids(param_groups: Iterable[Mapping[str, Any]]) -> set[int]:
    return {id(p) for group in param_groups for p in group["params"]}


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step cannot be seen as one step with one gradient.

    Raises:
        ValueError: For LBFGS, and for optimizers that step during backward.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "`optimizer` must take one gradient a step. Got LBFGS, which evaluates the closure many times. "
            "Use SGD, Adam or another first-order optimizer."
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"`optimizer` must step after the backward pass. Got {type(optimizer).__name__} with "
            "`overlap_with_ddp=True`, which steps during it. Leave the overlap off."
        )
