"""The errors that the user observes between two steps."""

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from gradbalance._optimizer.checkpoint import count_in, number_in
from gradbalance._step.gradients import on_host, wide
from gradbalance._step.measure import UNSEEN, world_size


class ObservedErrors:
    """Sums the errors of each group until a step takes them.

    Args:
        names: The groups.

    Attributes:
        sums: The sum of the errors of each observed group, by name.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, errors: Mapping[str, object]) -> None:
        """Take the errors of one call; checked as :meth:`gradbalance.Penalty.observe` says."""
        for name in errors:
            if name not in self._names:
                raise ValueError(
                    f"`observe` must name groups. Got {name!r}. "
                    f"The groups are: {', '.join(self._names)}."
                )
        if len(errors) < 2:
            raise ValueError(
                "`observe` must get at least two groups in a call. "
                f"Got {', '.join(errors) or 'none'}. "
                "An error says something only beside another one: name all of them in one call."
            )
        checked = {name: _checked(name, error) for name, error in errors.items()}
        for name, error in checked.items():
            self.sums[name] = self.sums.get(name, 0.0) + error
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, device: torch.device) -> Tensor | None:
        """The mean of each group's errors since the last step, ``UNSEEN`` without one, ``[N]``.

        Args:
            device: Where ranks average them. Errors that are all on the host stay there otherwise.

        Returns:
            None if nothing was observed.
        """
        if not self.sums:
            return None
        means = []
        for name in self._names:
            is_seen = name in self.sums
            means.append(self.sums[name] / self._counts[name] if is_seen else UNSEEN)
        self.sums = {}
        self._counts = {}
        if not any(isinstance(mean, Tensor) for mean in means) and world_size() == 1:
            return torch.tensor(means, dtype=torch.float64, device="cpu")
        vector = []
        for mean in means:
            if isinstance(mean, Tensor):
                vector.append(mean.to(device, wide(device)))
            else:  # filled on the device: a copy from the host would wait
                vector.append(torch.full((), mean, dtype=wide(device), device=device))
        return torch.stack(vector)

    def save(self) -> dict[str, tuple[float, int]]:
        """Sum and number of the errors of each observed group since the last step."""
        saved = {}
        for name, total in self.sums.items():
            saved[name] = float(total), self._counts[name]
        return saved

    def parse(self, saved: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, int]]:
        """Read what :meth:`save` gave, and change nothing.

        Raises:
            TypeError, KeyError: If it is damaged.
        """
        parsed = {}
        for name, pair in saved.items():
            if name not in self._names or len(pair) != 2:
                raise TypeError(f"the errors {pair!r} of {name!r}")
            total, count = pair
            parsed[name] = number_in(total), count_in(count)
        return parsed

    def load(self, saved: Mapping[str, Sequence[float]]) -> None:
        """Take what :meth:`save` gave."""
        parsed = self.parse(saved)
        self.sums = {name: total for name, (total, _) in parsed.items()}
        self._counts = {name: count for name, (_, count) in parsed.items()}


def _checked(name: str, error: object) -> Tensor | float:
    """The error as a number if it is on the host, else as a tensor ``[]`` that is not read."""
    value = checked_scalar(name, error, "Pass the mean error.")
    if isinstance(value, Tensor):
        return torch.where(value < 0, torch.nan, value)
    if value < 0:
        raise ValueError(
            f"`{name}` must be >= 0, lower is better. Got {value}. Pass an error, not a score."
        )
    return value


def checked_scalar(name: str, scalar: object, advice: str) -> Tensor | float:
    """A real scalar as a float if it is on the host, else as a tensor ``[]`` that is not read.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it has several elements, or is too large for a float.
    """
    if isinstance(scalar, Tensor):
        value = scalar.detach()
        if value.is_complex() or value.is_quantized or value.dtype == torch.bool:
            raise TypeError(f"`{name}` must be real. Got {value.dtype}. {advice}")
        if value.layout is not torch.strided or value.device.type == "meta":
            raise TypeError(
                f"`{name}` must be a dense tensor with a value. Got {value.layout} on "
                f"{value.device}. {advice}"
            )
        if value.numel() != 1:
            raise ValueError(
                f"`{name}` must be a scalar. Got shape {tuple(value.shape)}. "
                "Reduce it, with `.mean()` say."
            )
        value = value.reshape(()).to(wide(value.device))
        return value.item() if on_host(value.device) else value
    if isinstance(scalar, np.ndarray) and scalar.size == 1 and not np.ma.is_masked(scalar):
        scalar = scalar.item()
    if isinstance(scalar, bool) or not isinstance(scalar, Real):
        raise TypeError(
            f"`{name}` must be a number or a tensor. Got {type(scalar).__name__}. {advice}"
        )
    try:
        return float(scalar)
    except OverflowError as error:
        raise ValueError(
            f"`{name}` must be a number that fits into a float. "
            f"Got a larger {type(scalar).__name__}. {advice}"
        ) from error
