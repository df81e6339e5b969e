"""The errors that the user observes between two steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradbalance._gradients.layout import on_host, wide


class Observed:
    """Sums the errors of each group until they are taken."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, errors: Mapping[str, Tensor | float]) -> None:
        """Take one call's errors; checked as :meth:`Penalty.observe` says."""
        for name in errors:
            if name not in self._names:
                raise ValueError(f"`observe` must name groups. Got {name!r}. The groups are: {', '.join(self._names)}.")
        if len(errors) < 2:
            raise ValueError(
                f"`observe` must get at least two groups in a call. Got {', '.join(errors) or 'none'}. "
                "An error says something only beside another one: name all of them in one call."
            )
        for name, value in {name: _checked(name, error) for name, error in errors.items()}.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = (total + value.to(total.device), count + 1)

    def take(self, home: torch.device) -> Tensor | None:
        """The mean of each group's errors since the last call, shape ``[N]``, -1 without one; None without any."""
        if not self._sums:
            return None
        means = {name: (total / count).to(home, wide(home)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        unseen = torch.full((), -1.0, dtype=wide(home), device=home)
        return torch.stack([means.get(name, unseen) for name in self._names])


def _checked(name: str, error: Any) -> Tensor:
    if not isinstance(error, Tensor | int | float):
        raise TypeError(f"`{name}` must be a number or a tensor. Got {type(error).__name__}. Pass the mean error.")
    value = torch.as_tensor(error).detach()
    if value.is_complex():
        raise TypeError(f"`{name}` must be real. Got {value.dtype}. Pass the mean error.")
    if value.numel() != 1:
        raise ValueError(f"`{name}` must be a scalar. Got shape {tuple(value.shape)}. Reduce it, with `.mean()` say.")
    value = value.reshape(()).to(wide(value.device))
    if not on_host(value.device):
        return torch.where(value < 0, torch.nan, value)  # without a host read
    if value < 0:
        raise ValueError(f"`{name}` must be >= 0, lower is better. Got {value.item()}. Pass an error, not a score.")
    return value
