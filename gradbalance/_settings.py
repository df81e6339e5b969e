"""The options of a penalty: their types, defaults and ranges, and the settings of the paper."""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch

ApplyTo = Literal["update", "gradient"]
Norm = Literal["l2", "rms", "relative"]

#: Settings of the paper (arXiv 2605.28575): ``ConflictAwarePenalty(optimizer, groups, **PAPER)``. Its window, epochs
#: 0 to 25 of 30, depends on the number of steps of an epoch and is left to the caller.
PAPER: dict[str, Any] = {
    "alpha": 1.0,
    "eta": 0.5,
    "threshold": 1.0,
    "smoothing": 0.0,
    "centred": False,
    "apply_to": "gradient",
    "noise": 1.0,
}


class Options(TypedDict, total=False):
    """The types of the keyword options; their meaning and defaults are those of :class:`Settings`."""

    alpha: float
    eta: float
    threshold: float
    smoothing: float
    agreement: float | None
    centred: bool
    apply_to: ApplyTo
    norm: Norm
    min_coefficient: float
    max_coefficient: float | None
    window: tuple[int, int | None] | None
    noise: float
    max_norm: float | None
    generator: torch.Generator | None
    process_group: Any
    persist: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked options of a penalty.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If an option is of the wrong kind.
    """

    alpha: float = 1.0
    eta: float = 0.05
    threshold: float = 3.0
    smoothing: float = 0.95
    agreement: float | None = 0.5
    centred: bool = True
    apply_to: ApplyTo = "update"
    norm: Norm = "l2"
    min_coefficient: float = 0.0
    max_coefficient: float | None = None
    window: tuple[int, int | None] | None = None
    noise: float = 0.0
    max_norm: float | None = None
    generator: torch.Generator | None = None
    process_group: Any = None
    persist: bool = True

    def __post_init__(self) -> None:
        _check_range("alpha", self.alpha, 0, None)
        _check_range("eta", self.eta, 0, 1)
        _check_range("threshold", self.threshold, 1, None)
        _check_range("smoothing", self.smoothing, 0, 1, below=True)
        if self.agreement is not None:
            _check_range("agreement", self.agreement, 0, 1)
        _check_range("min_coefficient", self.min_coefficient, 0, 1)
        if self.max_coefficient is not None:
            _check_range("max_coefficient", self.max_coefficient, 1, None)
        _check_range("noise", self.noise, 0, None)
        _check_choice("apply_to", self.apply_to, get_args(ApplyTo))
        _check_choice("norm", self.norm, get_args(Norm))
        _check_kind("centred", self.centred, bool)
        _check_kind("persist", self.persist, bool)
        if self.max_norm is not None:
            _check_range("max_norm", self.max_norm, 0, None, above=True)
        if self.generator is not None:
            _check_kind("generator", self.generator, torch.Generator)
        if self.window is not None:
            _check_window(self.window)

    @property
    def is_passive(self) -> bool:
        """Whether every coefficient is 1 whatever the norms: nothing has to be written or read."""
        return self.eta == 1 and self.alpha == 0


def _check_range(
    name: str, value: object, low: float, high: float | None, *, above: bool = False, below: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number. Got {value!r}. Pass a plain Python number.")
    inside = (value > low if above else value >= low) and (high is None or (value < high if below else value <= high))
    if not inside or value == float("inf"):
        closing = f"{high}]" if high is not None and not below else f"{'inf' if high is None else high})"
        interval = f"{'(' if above else '['}{low}, {closing}"
        raise ValueError(f"`{name}` must be in {interval}. Got {value}. Choose a value inside the interval.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}. Got {value!r}. Pick one of these.")


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}. Got {value!r}. Pass a {kind.__name__}.")


def _check_window(window: Any) -> None:
    if isinstance(window, tuple | list) and len(window) == 2:
        start, stop = window
        if type(start) is int and start >= 0 and (stop is None or (type(stop) is int and stop > start)):
            return
    raise ValueError(
        f"`window` must be (start, stop) with 0 <= start < stop, or stop None. Got {window!r}. "
        "Count optimizer steps, not epochs."
    )
