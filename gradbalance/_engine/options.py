"""The ranges of the engine's options, and the settings of the paper."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from gradbalance.rules import ConflictAware

ApplyTo = Literal["update", "gradient"]

#: Settings of the paper (arXiv 2605.28575): ``ConflictAwarePenalty(optimizer, groups, **PAPER)``. Its window, epochs
#: 0 to 25 of 30, depends on the number of steps of an epoch and is left to the caller.
PAPER: dict[str, Any] = {
    "rule": ConflictAware(alpha=1.0, eta=0.5, threshold=1.0, centred=False),
    "smoothing": 0.0,
    "apply_to": "gradient",
    "noise": 1.0,
}


def check(options: dict[str, Any]) -> None:
    """Every option of :class:`Penalty` in its range.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If an option is of the wrong kind.
    """
    _check_rule(options["rule"])
    _check_range("smoothing", options["smoothing"], 0, 1)
    noise = options["noise"]
    for amount in noise.values() if isinstance(noise, Mapping) else [noise]:
        _check_range("noise", amount, 0)
    if options["max_norm"] is not None:
        _check_range("max_norm", options["max_norm"], 0, open_below=True)
    if options["apply_to"] not in get_args(ApplyTo):
        choices = ", ".join(map(repr, get_args(ApplyTo)))
        raise ValueError(f"`apply_to` must be one of {choices}. Got {options['apply_to']!r}. Pick one of these.")
    if type(options["every"]) is not int or options["every"] < 1:
        raise ValueError(
            f"`every` must be a positive integer. Got {options['every']!r}. Take 1 to measure at each step."
        )
    for name, kind in (("persist", bool), ("generator", torch.Generator)):
        if not isinstance(options[name], kind) and not (name == "generator" and options[name] is None):
            raise TypeError(f"`{name}` must be a {kind.__name__}. Got {options[name]!r}. Pass a {kind.__name__}.")
    if options["window"] is not None:
        _check_window(options["window"])


def noise_of(amount: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The noise of each group: one for all, or that of its name, 0 where there is none.

    Raises:
        ValueError: If there is one for another name.
    """
    if not isinstance(amount, Mapping):
        return [amount] * len(names)
    if unknown := [name for name in amount if name not in names]:
        raise ValueError(f"`noise` must name groups. Got {unknown[0]!r}. The groups are {', '.join(names)}.")
    return [amount.get(name, 0.0) for name in names]


def _check_rule(value: Any) -> None:
    if isinstance(value, type) or not callable(value):
        raise TypeError(
            f"`rule` must be a callable from Measured to coefficients. Got {value!r}. "
            "Pass an instance, such as rules.Coherence(), or a function."
        )


def _check_range(name: str, value: Any, low: float, high: float = float("inf"), *, open_below: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number. Got {value!r}. Pass a plain Python number.")
    if not ((value > low if open_below else value >= low) and value < high):
        interval = f"{'(' if open_below else '['}{low}, {high})"
        raise ValueError(f"`{name}` must be in {interval}. Got {value}. Choose a value inside the interval.")


def _check_window(value: Any) -> None:
    if isinstance(value, tuple | list) and len(value) == 2:
        start, stop = value
        if type(start) is int and start >= 0 and (stop is None or (type(stop) is int and stop > start)):
            return
    raise ValueError(
        f"`window` must be (start, stop) with 0 <= start < stop, or stop None. Got {value!r}. "
        "Count optimizer steps, not epochs."
    )
