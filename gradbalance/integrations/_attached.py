"""What the callbacks share: the penalty on the optimizer of a trainer, and its record."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from gradbalance._optimizer.checkpoint import KEY, Saved
from gradbalance._step.options import Options
from gradbalance._warn import warn
from gradbalance.groups import Groups, groups_by_name
from gradbalance.penalty import Penalty, penalty_of
from gradbalance.recorder import LOGGED, Recorder

GroupsOrPatterns = Mapping[str, nn.Module | str | Iterable[Tensor] | Iterable[str]]

# Recorded steps after which mistakes are told: at the end of a long training is too late.
EARLY = 20


class Attached:
    """A penalty that is put on an optimizer when there is one.

    Args:
        groups: Maps names to modules, parameters, or patterns as for ``groups_by_name``.
        options: Of the penalty.

    Attributes:
        penalty: The penalty, None before there is an optimizer.
        recorder: Its record, None before that.

    Raises:
        TypeError: If ``groups`` is not a mapping.
    """

    def __init__(self, groups: GroupsOrPatterns, options: Options) -> None:
        if not isinstance(groups, Mapping):
            raise TypeError(
                "`groups` must map names to modules, parameters or patterns. "
                f"Got {type(groups).__name__}. "
                'Pass a dict, such as {"vision": "*.vision_tower.*", "text": model.text}.'
            )
        self._groups: dict[str, Any] = {}
        for name, group in groups.items():
            # A generator of parameters would be empty at the second training.
            self._groups[name] = list(group) if isinstance(group, Iterator) else group
        self._options = options
        self._has_looked = False
        self.penalty: Penalty | None = None
        self.recorder: Recorder | None = None

    def attach(self, optimizers: Sequence[Optimizer], model: nn.Module) -> None:
        """Put the penalty on the one of the optimizers that has the groups.

        Args:
            optimizers: All of a trainer.
            model: Whose names the patterns mean.
        """
        groups = self._parameters(model)
        optimizer = _holder(optimizers, groups)
        if self.penalty is not None and penalty_of(optimizer) is self.penalty:
            return  # trained on
        self.penalty = Penalty(optimizer, groups, self._options)
        self.recorder = Recorder(self.penalty)
        self._has_looked = False

    @property
    def key(self) -> str:
        """What the state is called where a trainer saves it."""
        return f"{KEY}: {', '.join(self._groups)}"

    def bring(self, optimizer: Optimizer, saved: Saved | None) -> None:
        """Leave what a trainer has saved where the penalty takes it, if the optimizer brings none.

        Args:
            optimizer: To which the penalty will be attached.
            saved: What :meth:`sharded_state` gave.
        """
        group = optimizer.param_groups[0]
        if saved is not None and not group.get(KEY):
            group[KEY] = (saved,)

    def sharded_state(self) -> Saved | None:
        """What is remembered, in builtin types, if the parameters are sharded; else None."""
        if self.penalty is None or not self._options.persist:
            return None
        engine = self.penalty._engine
        return engine.save() if engine._current_layout().is_sharded else None

    def scalars(self) -> dict[str, float]:
        """What is known of the last step, by ``gradbalance/<quantity>/<group>``."""
        if self.penalty is None:
            return {}
        balance = self.penalty.balance
        scalars = {}
        for quantity in LOGGED:
            for name, value in zip(balance.names, getattr(balance, quantity), strict=True):
                if np.isfinite(value):
                    scalars[f"gradbalance/{quantity}/{name}"] = float(value)
        return scalars

    def look(self, steps: int) -> None:
        """Warn once of what is wrong, after the first few steps.

        Args:
            steps: How many optimizer steps the trainer has taken.
        """
        if self.recorder is None or self._has_looked or steps < EARLY:
            return
        summary = self.recorder.summary()
        if summary.recorded < EARLY:
            return
        self._has_looked = True
        for warning in summary.warnings:
            warn(warning)

    def table(self) -> str:
        """The summary of the record, with its warnings."""
        return "" if self.recorder is None else str(self.recorder.summary())

    def _parameters(self, model: nn.Module) -> Groups:
        groups: dict[str, Any] = {}
        for name, group in self._groups.items():
            groups[name] = group
            if _is_pattern(group):
                groups[name] = groups_by_name(model, **{name: group})[name]
        return groups


def _is_pattern(group: object) -> bool:
    """Whether a group is a name or glob, or a list of them."""
    if isinstance(group, list | tuple):
        return any(isinstance(each, str) for each in group)
    return isinstance(group, str)


def _holder(optimizers: Sequence[Optimizer], groups: Groups) -> Optimizer:
    """The optimizer that has the most parameters of the groups."""
    wanted: set[int] = set()
    for group in groups.values():
        parameters = group.parameters() if isinstance(group, nn.Module) else group
        wanted.update(map(id, parameters))

    def count(optimizer: Optimizer) -> int:
        return sum(id(p) in wanted for p in _tensors(optimizer))

    return max(optimizers, key=count)


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
