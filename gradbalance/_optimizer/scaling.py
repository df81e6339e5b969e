"""How the steps of some parameters are made shorter or longer while all others move as before."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

# Where bitsandbytes keeps settings of single parameters: by id, by position, not yet looked up.
OVERRIDES = ("pid2config", "index2config", "module_weight_config_triple")

ParamGroup = dict[str, Any]


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is on this rank; any other tensor as it is."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


class LearningRates:
    """Scales the steps of each group by its learning rate, whatever mix a ``param_group`` holds.

    For the time of a step the ``param_groups`` are replaced by stand-ins, one for each factor in
    each of them. The user's own are never written, except for what the step itself
    writes there (a counter, say): schedulers, checkpoints and loggers see what they would see
    without the penalty.

    Args:
        optimizer: The one that steps. It is not kept alive.
    """

    name = "learning rate"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = proxy(optimizer)  # which holds this object
        self._groups: list[list[int | None]] = []
        self._own: list[ParamGroup] | None = None
        self._written: list[ParamGroup] = []

    def divide(self, group_of: Mapping[int, int]) -> None:
        """Note the group of each parameter.

        Args:
            group_of: Index of the group of each parameter by ``id``, ungrouped ones left out.
        """
        self._groups = []
        for param_group in self._optimizer.param_groups:
            self._groups.append([group_of.get(id(p)) for p in param_group["params"]])

    def begin(self, factors: Sequence[float]) -> None:
        """Put the stand-ins in place.

        Args:
            factors: Factor of each group, on the host, shape ``[N]``.

        Raises:
            RuntimeError: If bitsandbytes has settings of parameters outside the ``param_groups``.
        """
        manager = getattr(self._optimizer, "mng", None)
        if any(getattr(manager, overrides, None) for overrides in OVERRIDES):
            raise RuntimeError(
                "`optimizer` must have all settings of its parameters in `param_groups`. Got "
                "overrides in the GlobalOptimManager of bitsandbytes, which hide the scaled "
                'learning rate. Use `param_groups` for them, or `apply_to="displacement"`.'
            )
        if all(factor == 1.0 for factor in factors):
            return
        own = self._optimizer.param_groups
        stand_ins: list[ParamGroup] = []
        self._written = []
        for param_group, groups in zip(own, self._groups, strict=True):
            # In the order of the param_group, in which some steps draw random numbers.
            members: dict[float, list[Tensor]] = {}
            for p, m in zip(param_group["params"], groups, strict=True):
                members.setdefault(1.0 if m is None else factors[m], []).append(p)
            if not members:  # the step of an empty one may write into it too
                members[1.0] = []
            # schedule-free weights its averages by the rate, and those of parameters that are not
            # scaled must not change: what the step writes is read from the factor closest to 1.
            closest = min(members, key=_distance_to_one)
            for factor, parameters in members.items():
                stand_in = _stand_in(param_group, parameters, factor)
                stand_ins.append(stand_in)
                if factor == closest:
                    self._written.append(stand_in)
        self._own = own
        self._optimizer.param_groups = stand_ins

    def end(self) -> None:
        """Put the user's ``param_groups`` back, with what the step wrote. May be called again."""
        if self._own is None:
            return
        self._optimizer.param_groups = self._own
        for param_group, written in zip(self._own, self._written, strict=True):
            for key, value in written.items():
                if key in ("params", "lr"):
                    continue
                if isinstance(value, Tensor) and isinstance(param_group.get(key), Tensor):
                    param_group[key].copy_(value)
                else:
                    param_group[key] = value
        self._own = None
        self._written = []


def _distance_to_one(factor: float) -> float:
    return abs(factor - 1.0)


def _stand_in(param_group: ParamGroup, parameters: list[Tensor], factor: float) -> ParamGroup:
    """The ``param_group`` for some of its parameters, with a learning rate of its own."""
    stand_in = dict(param_group, params=parameters)
    for key, value in param_group.items():
        # A tensor in which the step counts must count once, not once for each stand-in.
        if isinstance(value, Tensor) and key != "lr":
            stand_in[key] = value.clone()
    if factor != 1.0:
        stand_in["lr"] = param_group["lr"] * factor  # a tensor stays on its device
    return stand_in


class Displacement:
    r"""Scales the finished update: :math:`\theta \leftarrow \theta_0 + c\,(\theta - \theta_0)`.

    For optimizers whose step is not proportional to a learning rate. Costs a copy of the scaled
    groups' parameters for the time of the step.

    Args:
        optimizer: The one that steps. It is not kept alive.
    """

    name = "displacement"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = proxy(optimizer)  # which holds this object
        self._members: dict[int, list[Tensor]] = {}
        self._before: list[tuple[float, list[Tensor], list[Tensor]]] = []

    def divide(self, group_of: Mapping[int, int]) -> None:
        """Note the parameters of each group.

        Args:
            group_of: Index of the group of each parameter by ``id``, ungrouped ones left out.
        """
        self._members = {}
        for param_group in self._optimizer.param_groups:
            for p in param_group["params"]:
                if id(p) in group_of:
                    self._members.setdefault(group_of[id(p)], []).append(p)

    def begin(self, factors: Sequence[float]) -> None:
        """Copy the parameters that have a gradient, of the groups whose factor is not 1.

        Args:
            factors: Factor of each group, on the host, shape ``[N]``.
        """
        for m, members in self._members.items():
            if factors[m] == 1.0:
                continue
            moving = [p for p in members if p.grad is not None and p.device.type != "meta"]
            copies = [local(p.detach()).clone() for p in moving]
            if moving:
                self._before.append((factors[m], moving, copies))

    def end(self) -> None:
        """Scale what the step did to the parameters since. May be called again."""
        for factor, moved, copies in self._before:
            # Looked up now, as some steps put another tensor into `p.data`.
            values = [local(p.detach()) for p in moved]
            torch._foreach_lerp_(values, copies, 1.0 - factor)
        self._before = []
