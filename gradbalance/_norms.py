"""Norms and scaling of groups of tensors over devices, dtypes and meshes: the only room with collectives."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# `vector_norm` in float32 on the CPU loses accuracy on large tensors: 2e-4 at 8 M elements, 1e-6 in parts of this size.
CPU_PART = 1 << 18
IS_SPARSE = attrgetter("is_sparse")


class Bucket:
    """Parameters of one device, dtype and sharding, sorted by group: what one fused kernel can take."""

    def __init__(self, like: Tensor, n_groups: int) -> None:
        self.device = like.device
        self.precision = torch.float64 if like.dtype in (torch.float64, torch.complex128) else torch.float32
        self.parameters: list[list[Tensor]] = [[] for _ in range(n_groups)]
        # A DTensor has these; importing DTensor to ask would make `import gradbalance` slow.
        mesh: Any = getattr(like, "device_mesh", None)
        self.mesh = mesh
        self.placements: tuple[Any, ...] = getattr(like, "placements", ())
        self.copies = copies(like)
        self.plain = mesh is None and not like.is_complex()
        self.large = False  # whether some tensor has to be taken in parts
        self._counts: list[int] = []
        self._offsets = torch.empty(0)

    def offsets(self, counts: list[int]) -> Tensor:
        """Where each group starts, on the device, kept from step to step: a CUDA graph cannot capture the copy."""
        if counts != self._counts:
            self._counts, self._offsets = counts, torch.tensor([0, *accumulate(counts)], device=self.device)
        return self._offsets


class Gathered(NamedTuple):
    """The tensors of a bucket that are there in this step, group after group, as plain strided real tensors."""

    bucket: Bucket
    counts: list[int]  # how many there are of each group
    read: list[Tensor]  # to take norms of
    write: list[Tensor]  # to scale: the same tensors, but for sparse and partially reduced ones


def buckets(parameters: Sequence[Sequence[Tensor]]) -> list[Bucket]:
    """The parameters of each group sorted into buckets; meta tensors are left out."""
    found: dict[Any, Bucket] = {}
    for group, members in enumerate(parameters):
        for p in members:
            if p.device.type != "meta":
                key = (p.device, p.dtype, getattr(p, "device_mesh", None), getattr(p, "placements", None))
                if key not in found:
                    found[key] = Bucket(p, len(parameters))
                found[key].parameters[group].append(p)
                found[key].large |= on_host(p.device) and p.numel() > CPU_PART
    return list(found.values())


def copies(p: Any) -> int:
    """The ranks that hold the same shard of ``p``: in a sum over its whole mesh the shard is counted that often."""
    placements = getattr(p, "placements", ())  # of a DTensor
    return math.prod(p.device_mesh.size(i) for i, at in enumerate(placements) if at.is_replicate())


def gather(found: Iterable[Bucket], source: Callable[[Tensor], Tensor | None]) -> list[Gathered]:
    """What ``source`` gives for each parameter (its gradient, say), where it gives anything."""
    gathered = []
    for bucket in found:
        counts = [len(group) for group in bucket.parameters]
        write = [t for t in map(source, chain.from_iterable(bucket.parameters)) if t is not None]
        if len(write) < sum(counts):
            counts = [sum(source(p) is not None for p in group) for group in bucket.parameters]
        read = write
        if not bucket.plain or any(map(IS_SPARSE, write)):
            read, write = [_entries(_reduced(t, bucket)) for t in write], [_entries(t) for t in write]
        gathered.append(Gathered(bucket, counts, read, write))
    return gathered


def _by_group(tensors: Iterable[Tensor], counts: Iterable[int]) -> list[list[Tensor]]:
    left = iter(tensors)
    return [list(islice(left, count)) for count in counts]


def _reduced(t: Tensor, bucket: Bucket) -> Tensor:
    """``t`` with what is still to be added up added up: entries of the same index, partial sums of ranks."""
    if t.is_sparse:
        return t.coalesce()
    if bucket.mesh is not None and t.placements != bucket.placements:  # type: ignore[attr-defined]
        return t.redistribute(placements=bucket.placements)  # type: ignore[attr-defined, no-any-return]
    return t


def _entries(t: Tensor) -> Tensor:
    """A plain real tensor with the local entries of ``t``; writing it writes ``t``."""
    t = getattr(t, "_local_tensor", t)
    t = t._values() if t.is_sparse else t
    return torch.view_as_real(t) if t.is_complex() else t


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
            parts = [list(_parts(group)) for group in _by_group(read, counts)]
            counts, read = [len(group) for group in parts], list(chain.from_iterable(parts))
        if read:
            low = read[0].dtype in (torch.float16, torch.bfloat16)
            norms = torch.stack(torch._foreach_norm(read, 2.0, dtype=torch.float32 if low else None))
            # Squared in float64: a norm of 1e-25 must not vanish, one of 1e25 must not overflow.
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
            yield from torch.split(t, max(1, len(t) * CPU_PART // t.numel()))
        else:
            yield t


def on_host(device: torch.device) -> bool:
    """Whether reading a tensor of the device waits for nothing."""
    return device.type == "cpu"


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.enable_grad()  # a gradient with a graph (create_graph=True) takes the factor into it
def scale_(gathered: Iterable[Gathered], factors: Tensor) -> None:
    """Multiply the tensors of each group by its factor, in place, without a host read of a device tensor.

    Args:
        gathered: The tensors, see :func:`gather`.
        factors: Shape ``[G]``, or ``[]`` for one that all share.
    """
    for bucket, counts, _, write in gathered:
        own = factors.to(bucket.device, bucket.precision)
        groups = [write] if own.dim() == 0 else _by_group(write, counts)
        pairs = list(zip(own.reshape(-1).unbind(), groups, strict=True))
        if on_host(bucket.device):
            # Here looking waits for nothing: what is multiplied by 1 need not be written. And one call serves all
            # groups; elsewhere this overload would launch once a tensor.
            pairs = [pair for pair, factor in zip(pairs, own.reshape(-1).tolist(), strict=True) if factor != 1]
            tensors, each = [t for _, group in pairs for t in group], [f for f, group in pairs for _ in group]
            if tensors:
                torch._foreach_mul_(tensors, each)
            continue
        for factor, group in pairs:
            if group:
                torch._foreach_mul_(group, factor)


def spreads(gathered: Iterable[Gathered], n_groups: int) -> list[Tensor | None]:
    """The standard deviation of each tensor of the first groups in turn, None for a single element: it has none."""
    return [t.std() if t.numel() > 1 else None for t in _of(gathered, n_groups)]


def add_noise_(
    gathered: Iterable[Gathered],
    n_groups: int,
    stds: Iterable[Tensor | None],
    amount: Tensor,
    generator: torch.Generator | None,
) -> None:
    """Add ``amount`` times Gaussian noise of the given standard deviations to the same tensors, in place."""
    for t, std in zip(_of(gathered, n_groups), stds, strict=True):
        if std is not None:
            noise = torch.empty_like(t).normal_(generator=generator).mul_(std)
            # Selected, not multiplied by zero: the spread of a gradient with an inf in it is NaN.
            t.add_(torch.where(amount.to(t.device) > 0, noise.mul_(amount.to(t)), 0.0))


def _of(gathered: Iterable[Gathered], n_groups: int) -> Iterator[Tensor]:
    return chain.from_iterable(islice(g.write, sum(g.counts[:n_groups])) for g in gathered)
