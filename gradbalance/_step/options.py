"""The options of a penalty, and their ranges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from gradbalance._step.measure import is_process_group
from gradbalance.rules import Rule, Useful
from gradbalance.rules.base import check_number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ApplyTo = Literal["update", "gradient", "learning_rate", "displacement"]

SMOOTHING = 0.995
USEFUL = Useful()


@dataclass(frozen=True)
class Options:
    """The options of :class:`gradbalance.ConflictAwarePenalty`, which documents them.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If an option is of the wrong kind.
    """

    rule: Rule = USEFUL
    apply_to: ApplyTo = "update"
    smoothing: float = SMOOTHING
    every: int = 1
    window: tuple[int, int | None] | None = None
    late: bool | None = None
    noise: float | Mapping[str, float] = 0.0
    max_norm: float | None = None
    generator: torch.Generator | None = None
    process_group: "ProcessGroup | None" = None
    persist: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rule, type) or not callable(self.rule):
            raise TypeError(
                f"`rule` must be a callable from Measured to coefficients. Got {self.rule!r}. "
                "Pass an instance, such as rules.Useful(), or a function."
            )
        if self.apply_to not in get_args(ApplyTo):
            choices = ", ".join(map(repr, get_args(ApplyTo)))
            raise ValueError(
                f"`apply_to` must be one of {choices}. Got {self.apply_to!r}. Pick one of these."
            )
        self._set("smoothing", _number("smoothing", self.smoothing))
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"`smoothing` must be in [0, 1). Got {self.smoothing}. "
                "Choose a value inside the interval."
            )
        if not _is_integer(self.every):
            raise TypeError(
                f"`every` must be an integer. Got {self.every!r}. Take 1 to measure at each step."
            )
        if not 1 <= self.every < 1 << 63:
            raise ValueError(
                f"`every` must be in [1, 2**63). Got {self.every}. Take 1 to measure at each step."
            )
        self._set("every", int(self.every))
        self._set("window", _checked_window(self.window))
        if self.late is not None and not isinstance(self.late, bool | np.bool_):
            raise TypeError(
                f"`late` must be True, False or None. Got {self.late!r}. "
                "None decides a step late on an accelerator alone."
            )
        if self.late is not None:
            self._set("late", bool(self.late))
        self._set("noise", _checked_noise(self.noise))
        if self.max_norm is not None:
            self._set("max_norm", _number("max_norm", self.max_norm))
            if not 0 < self.max_norm < inf:
                raise ValueError(
                    f"`max_norm` must be in (0, inf). Got {self.max_norm}. Take None not to clip."
                )
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"`generator` must be a torch.Generator. Got {self.generator!r}. "
                "Pass `torch.Generator()`, seeded."
            )
        if self.process_group is not None and not is_process_group(self.process_group):
            raise TypeError(
                "`process_group` must be a group that this process belongs to, or None. "
                f"Got {self.process_group!r}. Pass what torch.distributed.new_group returns."
            )
        if not isinstance(self.persist, bool | np.bool_):
            raise TypeError(f"`persist` must be a bool. Got {self.persist!r}. Pass a bool.")
        self._set("persist", bool(self.persist))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass has no other way

    def noise_of(self, names: Sequence[str]) -> list[float]:
        """The noise of each group, and 0 for the parameters of none.

        Raises:
            ValueError: If there is one for another name.
        """
        if not isinstance(self.noise, Mapping):
            return [self.noise] * len(names) + [0.0]
        for name in self.noise:
            if name not in names:
                raise ValueError(
                    f"`noise` must name groups. Got {name!r}. The groups are {', '.join(names)}."
                )
        return [self.noise.get(name, 0.0) for name in names] + [0.0]

    def changed(self) -> list[str]:
        """The options that are not the defaults, as ``name=value``."""
        changed = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rule", "apply_to") and value != field.default:
                changed.append(f"{field.name}={value!r}")
        return changed


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(name: str, value: object) -> float:
    """The option as a float, inf where it is too large for one."""
    check_number(name, value)
    try:
        return float(value)  # type: ignore[arg-type]  # a real number by now
    except OverflowError:
        return inf


def _checked_noise(noise: float | Mapping[str, float]) -> float | dict[str, float]:
    if isinstance(noise, Mapping):
        return {name: _checked_amount(amount) for name, amount in noise.items()}
    return _checked_amount(noise)


def _checked_amount(noise: float) -> float:
    amount = _number("noise", noise)
    if not 0 <= amount < inf:
        raise ValueError(
            f"`noise` must be in [0, inf). Got {amount}. Choose a value inside the interval."
        )
    return amount


def _checked_window(window: object) -> tuple[int, int | None] | None:
    if window is None:
        return None
    if isinstance(window, tuple | list) and len(window) == 2:
        start, stop = window
        starts = _is_integer(start) and start >= 0
        if starts and (stop is None or (_is_integer(stop) and stop > start)):
            return int(start), None if stop is None else int(stop)
    raise ValueError(
        "`window` must be (start, stop) with 0 <= start < stop, or stop None. "
        f"Got {window!r}. Count optimizer steps, not epochs."
    )
