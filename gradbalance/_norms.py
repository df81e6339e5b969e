"""Norms of groups of tensors over devices and meshes, and means over ranks: the only room with collectives."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradbalance._buckets import CPU_PART, Gathered, by_group, wide


def reduce_norms(
    gathered: Iterable[Gathered],
    n_groups: int,
    home: torch.device,
    errors: Tensor | None = None,
    sketches: Mapping[Any, Tensor] | None = None,
    process_group: Any = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm of each group over all its shards, the errors averaged over the ranks that have them, and the sketch.

    One all_reduce per mesh dimension, in which the sketch travels, and the errors if the mesh spans all ranks; without
    a mesh, one all_reduce of the errors alone if there are ranks.

    Args:
        gathered: The tensors, see :func:`gather`.
        n_groups: How many groups they are sorted into.
        home: Where the N-vectors live.
        errors: Shape ``[N]``, negative where there is none, or None.
        sketches: By mesh this rank's entries of the sketch, shape ``[S]``, or None.
        process_group: The ranks over which errors are averaged; the default process group if None.

    Returns:
        The norms, shape ``[n_groups]``, and the errors, both in float64 where the device has it, and the sketch.
    """
    total: Tensor | None = None
    sketches = sketches or {}
    sketch = sketches.get(None)
    ranks = world_size(process_group)
    rode = False
    for mesh, squares in _squares_by_mesh(gathered).items():
        if mesh is not None:
            own = sketches.get(mesh, squares[:0])
            rides = errors is not None and not rode and process_group is None and mesh.size() == ranks
            passengers = _summable(errors) if rides and errors is not None else squares[:0]
            message = torch.cat([squares, own.to(squares), passengers.to(squares)])
            for dim in range(mesh.ndim):
                dist.all_reduce(message, group=mesh.get_group(dim))
            squares, entries, passengers = torch.split(message, [n_groups, len(own), len(passengers)])
            if len(own):
                sketch = entries.to(own) if sketch is None else sketch + entries.to(own)
            if rides:
                errors, rode = _mean(passengers.to(home)), True
        squares = squares.to(home, wide(home))
        total = squares if total is None else total + squares
    if total is None:
        total = torch.zeros(n_groups, dtype=wide(home), device=home)
    return total.sqrt(), errors if rode else average(errors, process_group), sketch


def average(errors: Tensor | None, process_group: Any) -> Tensor | None:
    """The errors averaged over the ranks that have them; negative where none has."""
    if errors is not None and world_size(process_group) > 1:
        message = _summable(errors)
        dist.all_reduce(message, group=process_group)
        errors = _mean(message)
    return errors


def _summable(errors: Tensor) -> Tensor:
    """The errors and whether there is one, ``[2N]``: ranks can add it up although each may have seen other groups."""
    there = ~(errors < 0)  # NaN is there
    return torch.cat([torch.where(there, errors, 0.0), there.to(errors)])


def _mean(sums: Tensor) -> Tensor:
    total, count = sums.chunk(2)
    return torch.where(count > 0, total / count, -1.0)


def world_size(process_group: Any) -> int:
    """The number of ranks; 1 in a single process."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def _squares_by_mesh(gathered: Iterable[Gathered]) -> dict[Any, Tensor]:
    """The squared norm of each group's local shards, summed over the buckets of each mesh."""
    found: dict[Any, Tensor] = {}
    for bucket, counts, read, _ in gathered:
        if not read and bucket.mesh is None:
            continue
        if bucket.large:
            parts = [list(_parts(group)) for group in by_group(read, counts)]
            counts, read = [len(group) for group in parts], list(chain.from_iterable(parts))
        if read:
            low = read[0].dtype in (torch.float16, torch.bfloat16)
            norms = torch.stack(torch._foreach_norm(read, 2.0, dtype=torch.float32 if low else None))
            # Squared in float64: their sum must not overflow or vanish where the norms themselves do not.
            squares = norms.to(wide(bucket.device)).square_()
            # By offsets: lengths would be checked, with a host read inside the operator.
            sums = torch.segment_reduce(squares, "sum", offsets=bucket.offsets(counts))
        else:  # an uneven shard may leave this rank nothing, yet it must join the collective
            sums = torch.zeros(len(counts), dtype=wide(bucket.device), device=bucket.device)
        sums = sums / bucket.copies if bucket.copies > 1 else sums
        found[bucket.mesh] = found[bucket.mesh] + sums.to(found[bucket.mesh]) if bucket.mesh in found else sums
    return found


def _parts(group: list[Tensor]) -> Iterator[Tensor]:
    for t in group:
        if t.numel() > CPU_PART:
            yield from t.chunk(ceil(t.numel() / CPU_PART))
        else:
            yield t
