"""The options of a penalty, and their ranges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

import torch

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
        check_number("smoothing", self.smoothing)
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"`smoothing` must be in [0, 1). Got {self.smoothing}. "
                "Choose a value inside the interval."
            )
        if not _is_integer(self.every):
            raise TypeError(
                f"`every` must be an integer. Got {self.every!r}. Take 1 to measure at each step."
            )
        if self.every < 1:
            raise ValueError(
                f"`every` must be positive. Got {self.every}. Take 1 to measure at each step."
            )
        _check_window(self.window)
        if self.late is not None and not isinstance(self.late, bool):
            raise TypeError(
                f"`late` must be True, False or None. Got {self.late!r}. "
                "None decides a step late on an accelerator alone."
            )
        _check_noise(self.noise)
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm)
            if not 0 < self.max_norm < inf:
                raise ValueError(
                    f"`max_norm` must be in (0, inf). Got {self.max_norm}. Take None not to clip."
                )
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"`generator` must be a torch.Generator. Got {self.generator!r}. "
                "Pass `torch.Generator()`, seeded."
            )
        if not isinstance(self.persist, bool):
            raise TypeError(f"`persist` must be a bool. Got {self.persist!r}. Pass a bool.")

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


def _check_noise(noise: float | Mapping[str, float]) -> None:
    amounts = list(noise.values()) if isinstance(noise, Mapping) else [noise]
    for amount in amounts:
        check_number("noise", amount)
        if not 0 <= amount < inf:
            raise ValueError(
                f"`noise` must be in [0, inf). Got {amount}. Choose a value inside the interval."
            )


def _check_window(window: object) -> None:
    if window is None:
        return
    if isinstance(window, tuple | list) and len(window) == 2:
        start, stop = window
        starts = _is_integer(start) and start >= 0
        if starts and (stop is None or (_is_integer(stop) and stop > start)):
            return
    raise ValueError(
        "`window` must be (start, stop) with 0 <= start < stop, or stop None. "
        f"Got {window!r}. Count optimizer steps, not epochs."
    )
