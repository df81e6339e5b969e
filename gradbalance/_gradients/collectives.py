"""Sums and means over ranks: several small tensors in one message."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(process_group: Any = None) -> int:
    """The number of ranks; 1 in a single process."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def sum_together(tensors: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    """Each tensor summed over the ranks of all process groups, in one all_reduce for each of these.

    Args:
        tensors: One-dimensional; they travel in the dtype and on the device of the first.
        groups: Process groups, None for the default one.
    """
    message = torch.cat([t.to(tensors[0]) for t in tensors])
    for group in groups:
        dist.all_reduce(message, group=group)
    parts = torch.split(message, [len(t) for t in tensors])
    return [part.to(t) for part, t in zip(parts, tensors, strict=True)]


def summable(errors: Tensor) -> Tensor:
    """The errors and whether there is one, ``[2N]``: ranks can add it up although each may have seen other groups.

    Args:
        errors: Shape ``[N]``, negative where there is none.
    """
    there = ~(errors < 0)  # NaN is there
    return torch.cat([torch.where(there, errors, 0.0), there.to(errors)])


def mean_of(sums: Tensor) -> Tensor:
    """The mean errors out of added up :func:`summable` ones, negative where there is none, shape ``[N]``."""
    total, count = sums.chunk(2)
    return torch.where(count > 0, total / count, -1.0)


def average(errors: Tensor | None, process_group: Any) -> Tensor | None:
    """The errors averaged over the ranks that have them; negative where none has."""
    if errors is None or world_size(process_group) == 1:
        return errors
    return mean_of(sum_together([summable(errors)], [process_group])[0])
