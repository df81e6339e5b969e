"""Steps of some parameters made shorter or longer by their learning rate, whatever mix a param_group holds."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._gradients.layout import Vector, numbers

# Where bitsandbytes keeps settings of single parameters: by id, by position, and those not yet looked up.
OVERRIDES = ("pid2config", "index2config", "module_weight_config_triple")


class LearningRates:
    """Stand-ins for an optimizer's ``param_groups``, one per group of parameters, each with its own learning rate.

    The true ``param_groups`` are never written but for what the step itself writes there (a counter, say): schedulers,
    checkpoints and loggers see what they would see without the penalty.
    """

    name = "learning rate"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = proxy(optimizer)  # which holds this
        self._parts: list[dict[int, list[Tensor]]] = []
        self._true: list[dict[str, Any]] | None = None
        self._written: list[dict[str, Any]] = []

    def divide(self, group_of: Mapping[int, int]) -> None:
        """Divide the parameters of each of the ``param_groups`` by their group.

        Args:
            group_of: The group of each parameter by ``id``, those of no group left out.
        """
        self._parts = []
        for group in self._optimizer.param_groups:
            parts: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                parts.setdefault(group_of.get(id(p), -1), []).append(p)
            # The ungrouped last: of what the step writes into several stand-ins, theirs stays among equals.
            self._parts.append(dict(sorted(parts.items(), key=lambda part: (part[0] < 0, part[0]))))

    def begin(self, coefficients: Vector) -> None:
        """Put the stand-ins in place; one host read where a learning rate is a float, none where all are tensors.

        Args:
            coefficients: Factor of each group, as a tensor ``[N]`` on an accelerator.

        Raises:
            RuntimeError: If the optimizer has settings of parameters beside those of its ``param_groups``.
        """
        manager = getattr(self._optimizer, "mng", None)
        if any(getattr(manager, overrides, None) for overrides in OVERRIDES):
            raise RuntimeError(
                '`apply_to="update"` must have all settings of the parameters in `param_groups`. Got overrides in the '
                "GlobalOptimManager of bitsandbytes, which go by position and hide the scaled learning rate. "
                'Use `param_groups` for them, or `apply_to="gradient"`.'
            )
        true = self._optimizer.param_groups
        factors: Sequence[Any]
        on_device = isinstance(coefficients, Tensor) and all(isinstance(group["lr"], Tensor) for group in true)
        if on_device:
            factors = torch.as_tensor(coefficients, dtype=torch.float32).unbind()
        else:
            factors = numbers(coefficients)
            if all(c == 1.0 for c in factors):
                return
        stand_ins, self._written = [], []
        for group, parts in zip(true, self._parts, strict=True):
            mine, lr = [], group["lr"]
            for index, params in parts.items():
                # A tensor that the step counts in must count once, not once for each stand-in.
                own = {k: v.clone() for k, v in group.items() if isinstance(v, Tensor) and k != "lr"}
                mine.append({**group, **own, "params": params, "lr": lr if index < 0 else lr * factors[index]})
            stand_ins += mine
            # What the step writes there stays as the one whose rate is nearest to the true one wrote it: schedule-free
            # weights its averages by the rate, and those of a group that is not scaled must not change.
            nearest = min(reversed(mine), key=lambda own: abs(own["lr"] - lr)) if not on_device else mine[-1]
            self._written.append(nearest)
        self._true, self._optimizer.param_groups = true, stand_ins

    def end(self) -> None:
        """Put the true ``param_groups`` back, with what the step wrote; nothing if they are there."""
        if self._true is not None:
            self._optimizer.param_groups = self._true
            for group, stand_in in zip(self._true, self._written, strict=True):
                for key, value in stand_in.items():
                    if key != "lr" and isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                        group[key].copy_(value)
                    elif key not in ("params", "lr"):
                        group[key] = value
            self._true, self._written = None, []
