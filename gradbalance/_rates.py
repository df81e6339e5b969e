"""Learning rates scaled for the time of one step, whatever mix of groups a param_group holds."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradbalance._groups import UNGROUPED


class LearningRates:
    """Stand-ins for an optimizer's ``param_groups``, one per group of parameters, each with its own learning rate.

    The true ``param_groups`` are never written but for what the step itself writes there (a counter, say): schedulers,
    checkpoints and loggers see what they would see without the penalty.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._true: list[dict[str, Any]] | None = None
        self._stand_ins: list[tuple[dict[str, Any], dict[str, Any]]] = []

    @property
    def scaled(self) -> bool:
        """Whether the stand-ins are in place."""
        return self._true is not None

    def scale(self, coefficients: Tensor, group_of: Mapping[int, int]) -> None:
        """Put the stand-ins in place; one host read where a learning rate is a float, none where all are tensors.

        Args:
            coefficients: Factor of each group, shape ``[N]``.
            group_of: The group of each parameter, by ``id``; others are not scaled.
        """
        true = self._optimizer.param_groups
        factors = coefficients.unbind()
        numbers: list[float] | None = None
        if not all(isinstance(group["lr"], Tensor) for group in true):
            numbers = coefficients.tolist()
            if all(c == 1.0 for c in numbers):
                return
        stand_ins = []
        for group in true:
            parts: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                parts.setdefault(group_of.get(id(p), UNGROUPED), []).append(p)
            # The ungrouped come last: of what the step writes into several stand-ins, the last one's value stays.
            for index in sorted(parts, key=lambda i: (i == UNGROUPED, i)):
                stand_in = {**group, "params": parts[index]}
                if index != UNGROUPED:
                    lr = group["lr"]
                    stand_in["lr"] = lr * (factors[index].to(lr) if isinstance(lr, Tensor) else numbers[index])  # type: ignore[index]
                stand_ins.append((group, stand_in))
        self._true, self._stand_ins = true, stand_ins
        self._optimizer.param_groups = [stand_in for _, stand_in in stand_ins]

    def restore(self) -> None:
        """Put the true ``param_groups`` back, with what the step wrote."""
        if self._true is not None:
            self._optimizer.param_groups = self._true
            for group, stand_in in self._stand_ins:
                group.update({key: value for key, value in stand_in.items() if key not in ("params", "lr")})
            self._true, self._stand_ins = None, []
