"""Steps of some parameters made shorter or longer after the fact, for optimizers that do not follow a learning rate."""

from collections.abc import Mapping
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._gradients.layout import Vector, local, numbers


class Displacement:
    r"""Scales what a step did to the parameters: :math:`\theta \leftarrow \theta_0 + c\,(\theta - \theta_0)`.

    Costs a copy of the scaled groups' parameters for the time of the step, and a host read of the coefficients.
    """

    name = "displacement"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = proxy(optimizer)  # which holds this
        self._members: dict[int, list[Tensor]] = {}
        self._before: list[tuple[float, list[Tensor], list[Tensor]]] = []  # factor, parameters, copies

    def divide(self, group_of: Mapping[int, int]) -> None:
        """Note the parameters of each group.

        Args:
            group_of: The group of each parameter by ``id``, those of no group left out.
        """
        self._members = {}
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if id(p) in group_of and p.device.type != "meta":
                    self._members.setdefault(group_of[id(p)], []).append(p)

    def begin(self, coefficients: Vector) -> None:
        """Copy the parameters of the groups that are to be scaled.

        Args:
            coefficients: Factor of each group, as a tensor ``[N]`` on an accelerator.
        """
        factors = numbers(coefficients)
        for m, members in self._members.items():
            if factors[m] != 1.0:
                moving = [p for p in members if p.grad is not None]
                self._before.append((factors[m], moving, [local(p.detach()).clone() for p in moving]))

    def end(self) -> None:
        """Scale what has happened to them since; nothing if that was done."""
        for factor, moved, before in self._before:
            if moved:
                # Read now: some steps put another tensor into `p.data`.
                torch._foreach_lerp_([local(p.detach()) for p in moved], before, 1.0 - factor)
        self._before = []
