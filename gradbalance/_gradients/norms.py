"""Norms of the gradients of groups, over devices and meshes."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor

from gradbalance._gradients.collectives import average, mean_of, sum_together, summable, world_size
from gradbalance._gradients.layout import CPU_PART, Gathered, by_group, wide


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
        gathered: The gradients, see :meth:`Layout.gather`.
        n_groups: How many groups they are sorted into.
        home: Where the N-vectors live.
        errors: Shape ``[N]``, negative where there is none, or None.
        sketches: By mesh this rank's entries of the sketch, or None.
        process_group: The ranks over which errors are averaged; the default process group if None.

    Returns:
        The norms, shape ``[n_groups]``, and the errors, both in float64 where the device has it, and the sketch.
    """
    sketches = sketches or {}
    sketch = sketches.get(None)
    rode = False
    found: list[Tensor] = []
    for mesh, norms in _norms_by_mesh(gathered).items():
        if mesh is not None:
            own = sketches.get(mesh)
            rides = errors is not None and not rode and process_group is None and mesh.size() == world_size()
            message = [norms.square()]
            if own is not None:
                message.append(own.flatten())
            if rides and errors is not None:
                message.append(summable(errors))
            squares, *rest = sum_together(message, [mesh.get_group(dim) for dim in range(mesh.ndim)])
            norms = squares.sqrt()
            if rides:
                errors, rode = mean_of(rest.pop()).to(home), True
            if own is not None:
                entries = rest.pop().view_as(own)
                sketch = entries if sketch is None else sketch + entries
        found.append(norms.to(home, wide(home)))
    if not found:
        found.append(torch.zeros(n_groups, dtype=wide(home), device=home))
    return _joint(found), errors if rode else average(errors, process_group), sketch


def _joint(norms: list[Tensor]) -> Tensor:
    """The norm of each group over its parts in several places."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _norms_by_mesh(gathered: Iterable[Gathered]) -> dict[Any, Tensor]:
    """The norm of each group's local shards, over the buckets of each mesh."""
    found: dict[Any, list[Tensor]] = {}
    for bucket, counts, read, _ in gathered:
        if not read and bucket.mesh is None:
            continue
        if bucket.large:
            parts = [list(_parts(group)) for group in by_group(read, counts)]
            counts, read = [len(group) for group in parts], list(chain.from_iterable(parts))
        table, cells = bucket.table(counts)
        if read:  # an uneven shard may leave this rank nothing, yet it must join the collective
            torch._foreach_copy_(cells, torch._foreach_norm(read, 2.0, dtype=bucket.precision if bucket.low else None))
        # Squared in float64: their sum must not overflow or vanish where the norms themselves do not.
        norms = torch.linalg.vector_norm(table, dim=1, dtype=wide(bucket.device))
        norms = norms / bucket.copies**0.5 if bucket.copies > 1 else norms
        found.setdefault(bucket.mesh, []).append(norms)
    return {mesh: _joint([n.to(norms[0]) for n in norms]) for mesh, norms in found.items()}


def _parts(group: list[Tensor]) -> Iterator[Tensor]:
    for t in group:
        if t.numel() > CPU_PART:
            flat = t.view(-1) if t.is_contiguous() else t
            yield from flat.chunk(ceil(t.numel() / CPU_PART))
        else:
            yield t
