"""Optimizers inside optimizers: which one to hook, which ones cannot be, and what the default depends on."""

from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from gradbalance._settings import Settings

# Where wrappers keep the optimizer that they wrap: accelerate, Lightning, Opacus, SAM, schedule-free.
WRAPPED_AS = ("optimizer", "_optimizer", "original_optimizer", "base_optimizer", "base")
# Their step is not proportional to the learning rate of the same step.
NOT_PROPORTIONAL = (torch.optim.Rprop, torch.optim.ASGD)
# How far the default raises learning rates where a step is as long as the gradient. Elsewhere the steps of a group with
# a small gradient are as long as any, and longer ones have been seen to do harm.
MAX_COEFFICIENT = 20.0


def layers(optimizer: Any) -> list[Optimizer]:
    """The optimizer, the one that it wraps, and so on to the innermost."""
    layers = [optimizer]
    while True:
        inner = next((o for name in WRAPPED_AS if isinstance(o := getattr(layers[-1], name, None), Optimizer)), None)
        if inner is None or inner is layers[-1]:
            return layers
        layers.append(inner)


def unwrap(optimizer: Any) -> tuple[Optimizer, Optimizer]:
    """The optimizer that lists all parameters, and the innermost one, which steps."""
    found = layers(optimizer)[-1]
    if not isinstance(found, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer. Got {type(optimizer).__name__}. "
            "Build the optimizer first, then wrap it."
        )
    shard = getattr(found, "optim", None)
    return found, shard if isinstance(shard, Optimizer) else found


def check_optimizer(optimizer: Optimizer, settings: Settings) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "`optimizer` must take one gradient a step. Got LBFGS, which evaluates the closure many times. "
            "Use SGD, Adam or another first-order optimizer."
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"`optimizer` must take its step in `step()`. Got {name} with `overlap_with_ddp=True`, which steps during "
            "backward. Leave the overlap off."
        )
    if settings.apply_to == "update":
        lacking = any(group.get("lr") is None for group in optimizer.param_groups)
        if lacking or isinstance(optimizer, NOT_PROPORTIONAL):
            raise ValueError(
                '`apply_to="update"` must have an optimizer whose step is proportional to its learning rate. '
                f'Got {name}. Use `apply_to="gradient"`.'
            )


def settle(settings: Settings, optimizer: Optimizer) -> Settings:
    """The settings with the ``max_coefficient`` that is left to the optimizer."""
    if settings.max_coefficient is not None:
        return settings
    raises = settings.apply_to == "update" and isinstance(optimizer, torch.optim.SGD)
    return replace(settings, max_coefficient=MAX_COEFFICIENT if raises else 1.0)
