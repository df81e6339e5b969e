"""What one step shows, over shards and ranks, and its way to the host.

This is the only room with collectives.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradbalance._step.gradients import CPU_PART, BucketGradients, Gradients, Layout, on_host, wide
from gradbalance._step.sketch import Sketch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Mesh = DeviceMesh | None

# The error of a group that was not observed; NaN is an error that was.
UNSEEN = -1.0


class Reading:
    """What one step showed: on the host at once, from an accelerator by an asynchronous copy.

    Args:
        parts: The measurements by name; those that are not on the host are on one device.
        present: Which groups had a gradient, N flags.
        is_measured: Whether the step is one of those that are decided on.
        rates: Learning rates of the step, one of each group; None if they are not known.
    """

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        present: list[bool],
        is_measured: bool,
        rates: list[float] | None = None,
    ) -> None:
        self.present = present
        self.is_measured = is_measured
        self.rates = rates
        self._transfer: Transfer | None = None
        self._numbers: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}  # of those that are on their way
        flat = []
        for name, part in parts.items():
            if on_host(part.device):
                self._numbers[name] = part.tolist()
            else:
                self._shapes[name] = part.shape
                flat.append(part.flatten().to(wide(part.device)))
        if flat:
            self._transfer = Transfer(torch.cat(flat))

    def numbers(self) -> dict[str, Any]:
        """The measurements as nested lists of floats, once their copy has arrived."""
        if self._transfer is None:
            return self._numbers
        numbers = dict(self._numbers)
        vector = self._transfer.vector()
        sizes = [shape.numel() for shape in self._shapes.values()]
        for (name, shape), part in zip(
            self._shapes.items(), torch.split(vector, sizes), strict=True
        ):
            numbers[name] = part.view(shape).tolist()
        return numbers


class Transfer:
    """An asynchronous copy of a vector to the host, for which :meth:`vector` alone waits."""

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector
        self._arrived: torch.cuda.Event | None = None
        if vector.device.type == "cuda":
            # The device is named, as the default one may be another.
            self._vector = torch.empty(
                vector.shape, dtype=vector.dtype, device="cpu", pin_memory=True
            )
            self._vector.copy_(vector, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(vector.device))

    def vector(self) -> Tensor:
        """The vector on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._vector.cpu()


def measure(
    gradients: Gradients,
    layout: Layout,
    sketch: Sketch | None,
    moved: Mapping["Mesh", Tensor],
    errors: Tensor | None,
    *,
    with_norms: bool,
    process_group: "dist.ProcessGroup | None",
) -> dict[str, Tensor]:
    """Norms, products and errors of one step.

    Args:
        gradients: Of this rank.
        layout: Of the parameters.
        sketch: To compare the gradients with the last ones; None if that is not needed.
        moved: By mesh, how far the groups moved at the step before, see :meth:`Movement.take`.
        errors: Observed on this rank, ``UNSEEN`` where there is none, shape ``[N]``; or None.
        with_norms: Whether norms are needed.
        process_group: Ranks over which errors are averaged; the default group if None.

    Returns:
        ``norms`` of each row, shape ``[G]``; ``products``, see :meth:`Sketch.products`; ``moved``,
        its sum over meshes and their ranks; ``errors``, averaged over the ranks that have them.
        Each only if it was asked for.
    """
    parts: dict[str, Tensor] = {}
    entries = {} if sketch is None else sketch.take(gradients)
    summed: dict[Mesh, Tensor] = {}
    if with_norms or entries:
        parts["norms"], errors, summed, moved = _reduce(
            gradients, layout, errors, entries, moved, process_group
        )
    else:
        errors = average(errors, process_group)
    if sketch is not None:
        parts["products"] = sketch.products(summed)
    if moved:
        parts["moved"] = torch.stack(list(moved.values())).sum(0)
    if errors is not None:
        parts["errors"] = errors
    return parts


def world_size(process_group: "dist.ProcessGroup | None" = None) -> int:
    """Number of ranks; 1 in a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(process_group)
    return 1


def is_process_group(value: object) -> bool:
    """Whether it is a group of ranks that this process belongs to."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def _reduce(
    gradients: Gradients,
    layout: Layout,
    errors: Tensor | None,
    entries: Mapping["Mesh", Tensor],
    moved: Mapping["Mesh", Tensor],
    process_group: "dist.ProcessGroup | None",
) -> tuple[Tensor, Tensor | None, dict["Mesh", Tensor], dict["Mesh", Tensor]]:
    """Norms over all shards, averaged errors; entries and movements summed over ranks by mesh.

    One all_reduce per mesh dimension carries all of it. Where no mesh spans all ranks, the errors
    take one more.
    """
    device = layout.device
    summed: dict[Mesh, Tensor] = {}
    all_moved = dict(moved)
    norms: list[Tensor] = []
    is_averaged = False
    for mesh, local_norms in _norms_by_mesh(gradients).items():
        if mesh is None:
            norms.append(local_norms.to(device, wide(device), non_blocking=not on_host(device)))
            continue
        message = [local_norms.square()]
        if mesh in entries:
            message.append(entries[mesh].flatten())
        if mesh in moved:
            message.append(moved[mesh])
        spans_all = process_group is None and mesh.size() == world_size()
        carries_errors = errors is not None and spans_all and not is_averaged
        if errors is not None and carries_errors:
            message.append(_summable(errors))
        squares, *others = _sum_over_mesh(message, mesh)
        norms.append(squares.sqrt().to(device, wide(device)))
        if mesh in entries:
            summed[mesh] = others.pop(0).view_as(entries[mesh])
        if mesh in moved:
            all_moved[mesh] = others.pop(0)
        if carries_errors:
            errors = _mean(others.pop(0)).to(device)
            is_averaged = True
    if not norms:
        norms.append(torch.zeros(layout.rows, dtype=wide(device), device=device))
    if not is_averaged:
        errors = average(errors, process_group)
    return _joint(norms), errors, summed, all_moved


def average(errors: Tensor | None, process_group: "dist.ProcessGroup | None") -> Tensor | None:
    """The errors averaged over the ranks that have them, ``UNSEEN`` where none has, ``[N]``."""
    if errors is None or world_size(process_group) == 1:
        return errors
    message = _summable(errors)
    dist.all_reduce(message, group=process_group)
    return _mean(message)


def _sum_over_mesh(tensors: Sequence[Tensor], mesh: "DeviceMesh") -> list[Tensor]:
    """Each one-dimensional tensor summed over all ranks of a mesh, one message per dimension."""
    message = torch.cat([t.to(tensors[0]) for t in tensors])
    for dim in range(mesh.ndim):
        dist.all_reduce(message, group=mesh.get_group(dim))
    parts = torch.split(message, [len(t) for t in tensors])
    return [part.to(t) for part, t in zip(parts, tensors, strict=True)]


def _summable(errors: Tensor) -> Tensor:
    """Errors and whether there is one, ``[2N]``, since each rank may have observed other groups."""
    is_seen = ~(errors < 0)  # NaN is seen
    return torch.cat([torch.where(is_seen, errors, 0.0), is_seen.to(errors)])


def _mean(sums: Tensor) -> Tensor:
    total, count = sums.chunk(2)
    return torch.where(count > 0, total / count, UNSEEN)


def _joint(norms: Sequence[Tensor]) -> Tensor:
    """The norm of each row over its parts in several places."""
    if len(norms) == 1:
        return norms[0]
    dtype = wide(norms[0].device)
    joint: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), dim=0, dtype=dtype)
    return joint


def _norms_by_mesh(gradients: Gradients) -> dict["Mesh", Tensor]:
    """Norms of the local shards of each row, over the buckets of each mesh."""
    parts: dict[Mesh, list[Tensor]] = {}
    for of_bucket in gradients.by_bucket:
        bucket = of_bucket.bucket
        if of_bucket.read:  # an uneven shard may leave this rank nothing
            torch._foreach_copy_(bucket.cells, _norms(of_bucket))
        # Squared in float64: the sum must not overflow or vanish where the norms do not.
        norms = torch.linalg.vector_norm(bucket.table, dim=1, dtype=wide(bucket.device))
        if bucket.copies > 1:
            norms = norms / bucket.copies**0.5
        parts.setdefault(bucket.mesh, []).append(norms)
    joint = {}
    for mesh, of_buckets in parts.items():
        joint[mesh] = _joint(_on_one_device(of_buckets))
    return joint


def _on_one_device(norms: list[Tensor]) -> list[Tensor]:
    """All on the first accelerator, if there is one, without a wait."""
    device = norms[0].device
    for part in reversed(norms):
        if not on_host(part.device):
            device = part.device
    return [part.to(device, wide(device), non_blocking=not on_host(device)) for part in norms]


def _norms(gradients: BucketGradients) -> list[Tensor]:
    """The norm of each gradient."""
    dtype = gradients.bucket.table.dtype
    if not on_host(gradients.bucket.device):
        return list(torch._foreach_norm(gradients.read, 2.0, dtype=dtype))
    parts: list[Tensor] = []
    counts: list[int] = []
    for gradient in gradients.read:
        pieces: Sequence[Tensor] = [gradient]
        if gradient.numel() > CPU_PART:
            pieces = torch.split(gradient.reshape(-1), CPU_PART)
        parts += pieces
        counts.append(len(pieces))
    of_parts = torch._foreach_norm(parts, 2.0, dtype=dtype)
    norms = []
    start = 0
    for count in counts:
        norms.append(_joint(of_parts[start : start + count]))
        start += count
    return norms
