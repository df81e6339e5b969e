"""Which gradients there are at a step, sorted by device, dtype and sharding.

This is the only room that knows DTensor.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from numbers import Real
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._optimizer.scaling import local
from gradbalance.groups import ParamGroups

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

Placements = tuple["Placement", ...]
Kind = tuple[torch.dtype, bool] | None

UNGROUPED = -1

# Norms of larger tensors are taken in parts of this size on the CPU, where `vector_norm` in float32
# loses accuracy: its relative error is 2e-4 at 8 M elements, and 1e-6 at this size.
CPU_PART = 1 << 18

# Plans that a layout keeps, one for each set of gradients that came: branches that are absent from
# steps in a pattern need a few.
PLANS = 16

_DESCRIPTION = attrgetter("requires_grad", "dtype", "device", "shape")


class Bucket(NamedTuple):
    """Gradients of one device, dtype and sharding, row after row: what one fused kernel can take.

    Attributes:
        positions: Place of each gradient among the parameters of the layout.
        rows: Row of each gradient, in ascending order.
        device: Where they are.
        dtype: Of the gradients.
        mesh: Device mesh of DTensors, else None.
        placements: Of the parameters, empty without a mesh.
        copies: Number of ranks that hold the same shard.
        is_plain: Whether a gradient can be read and written as it is.
        table: Zeros ``[rows, largest count]`` for the norms of the single gradients.
        cells: The cells of the table, one for each gradient, row after row.
    """

    positions: list[int]
    rows: list[int]
    device: torch.device
    dtype: torch.dtype
    mesh: "DeviceMesh | None"
    placements: Placements
    copies: int
    is_plain: bool
    table: Tensor
    cells: list[Tensor]


class Plan(NamedTuple):
    """The buckets of one set of gradients, and which of the N groups have any gradient."""

    buckets: list[Bucket]
    present: list[bool]


class BucketGradients(NamedTuple):
    """The gradients of a bucket at one step, as plain strided real tensors.

    Attributes:
        bucket: How they are sorted.
        read: What norms are taken of: sparse gradients coalesced, partial sums reduced.
        write: What is scaled; the same tensors, but for sparse and partially reduced ones.
    """

    bucket: Bucket
    read: list[Tensor]
    write: list[Tensor]


class Gradients(NamedTuple):
    """The gradients of one step.

    Attributes:
        plan: How they are sorted; the same object for the same set of gradients.
        by_bucket: The gradients, bucket by bucket.
    """

    plan: Plan
    by_bucket: list[BucketGradients]


class Layout:
    """The trainable parameters of an optimizer by group, kept while it holds the same ones.

    Args:
        param_groups: Of the optimizer.
        group_of: Index of the group of each grouped parameter, by ``id``.
        n_groups: N.
        with_rest: Whether the parameters of no group make one more row after the groups.

    Attributes:
        members: Trainable parameters of each group that are not on the device "meta".
        device: The first accelerator of them, else the host, where measurements come together.
        rows: N, or N + 1 with the rest.
    """

    def __init__(
        self,
        param_groups: ParamGroups,
        group_of: Mapping[int, int],
        n_groups: int,
        with_rest: bool,
    ) -> None:
        self._known = [list(group["params"]) for group in param_groups]
        self._described = [list(map(_DESCRIPTION, parameters)) for parameters in self._known]
        rows: list[list[Tensor]] = [[] for _ in range(n_groups + 1)]
        holders: list[set[int]] = [set() for _ in rows]  # param_groups that hold some of a row
        for i, parameters in enumerate(self._known):
            for p in parameters:
                if p.requires_grad and p.device.type != "meta":
                    row = group_of.get(id(p), UNGROUPED)  # UNGROUPED is the last row
                    rows[row].append(p)
                    holders[row].add(i)
        self.members = rows[:n_groups]
        self._holders = holders[:n_groups]
        self.rows = n_groups + with_rest
        self.device = torch.device("cpu")
        for members in reversed(self.members):
            for p in reversed(members):
                if not on_host(p.device):
                    self.device = p.device
        self._parameters: list[Tensor] = []
        self._row_of: list[int] = []
        for row in range(self.rows):
            self._parameters += rows[row]
            self._row_of += [row] * len(rows[row])
        self._plans: dict[tuple[Kind, ...], Plan] = {}

    def fits(self, param_groups: ParamGroups) -> bool:
        """Whether the optimizer holds the same parameters, and none was frozen, cast or moved."""
        if len(self._known) != len(param_groups):
            return False
        for known, described, group in zip(self._known, self._described, param_groups, strict=True):
            parameters = group["params"]
            if len(known) != len(parameters) or not all(map(is_, known, parameters)):
                return False
            if described != list(map(_DESCRIPTION, parameters)):
                return False
        return True

    def rates(self, param_groups: ParamGroups) -> list[float]:
        """The largest learning rate of each group, NaN where the host does not know one."""
        rates = [_rate(group.get("lr")) for group in param_groups]
        largest = []
        for holders in self._holders:
            own = [rates[i] for i in holders]
            largest.append(max(own) if own and not any(map(math.isnan, own)) else math.nan)
        return largest

    @property
    def is_sharded(self) -> bool:
        """Whether some parameter is a DTensor."""
        return any(hasattr(p, "device_mesh") for p in self._parameters)

    def gather(self, to_write: bool = False) -> Gradients:
        """The gradients as they are now; ``to_write``: each in memory of its own."""
        if to_write:
            _unshare(chain.from_iterable(self._known))
        gradients = [p.grad for p in self._parameters]
        kinds = tuple(map(_kind, gradients))
        plan = self._plans.get(kinds)
        if plan is None:
            if len(self._plans) == PLANS:
                self._plans.clear()
            plan = self._plans[kinds] = self._plan(kinds)
        by_bucket = []
        for bucket in plan.buckets:
            write: list[Any] = [gradients[i] for i in bucket.positions]
            read = write
            if not bucket.is_plain:
                read = [_entries(reduced(g, bucket.placements)) for g in write]
                write = [_entries(g) for g in write]
            by_bucket.append(BucketGradients(bucket, read, write))
        return Gradients(plan, by_bucket)

    def _plan(self, kinds: Iterable[Kind]) -> Plan:
        present = [False] * len(self.members)
        positions: dict[Any, list[list[int]]] = {}
        for i, kind in enumerate(kinds):
            p = self._parameters[i]
            mesh = getattr(p, "device_mesh", None)
            row = self._row_of[i]
            if kind is None and mesh is None:
                continue
            # A rank without a gradient of a sharded parameter joins the collective, with zeros.
            if row < len(present):
                present[row] = True
            dtype = p.dtype if kind is None else kind[0]
            is_sparse = kind is not None and kind[1]
            key = (p.device, dtype, is_sparse, mesh, getattr(p, "placements", ()))
            in_rows = positions.setdefault(key, [[] for _ in range(self.rows)])
            if kind is not None:
                in_rows[row].append(i)
        return Plan([self._bucket(key, in_rows) for key, in_rows in positions.items()], present)

    def _bucket(self, key: Any, in_rows: list[list[int]]) -> Bucket:
        device, dtype, is_sparse, mesh, placements = key
        counts = list(map(len, in_rows))
        precision = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        table = torch.zeros(self.rows, max(1, *counts), dtype=precision, device=device)
        cells: list[Tensor] = []
        for row, count in enumerate(counts):
            cells += table[row, :count].unbind()
        is_plain = mesh is None and not dtype.is_complex and not is_sparse
        copies = 1 if mesh is None else _copies(mesh, placements)
        flat: list[int] = []
        rows: list[int] = []
        for row, of_row in enumerate(in_rows):
            flat += of_row
            rows += [row] * len(of_row)
        return Bucket(flat, rows, device, dtype, mesh, placements, copies, is_plain, table, cells)


def _rate(lr: object) -> float:
    """A learning rate, NaN if there is none or to read it is to wait for a device."""
    if isinstance(lr, Tensor):
        return float(lr) if on_host(lr.device) and lr.numel() == 1 else math.nan
    return float(lr) if isinstance(lr, Real) else math.nan


def _unshare(parameters: Iterable[Tensor]) -> None:
    """Copy gradients that are expanded, or that another parameter has too.

    Written in place they would raise, or be scaled once for each parameter.
    """
    taken = set()
    for p in parameters:
        g = p.grad
        # Sparse gradients and subclasses of tensors have no address.
        if type(g) is not Tensor or g.layout is not torch.strided:
            continue
        address = g.data_ptr()
        is_expanded = 0 in g.stride() and g.numel() > 1
        if is_expanded or (address and address in taken):
            p.grad = g.clone(memory_format=torch.contiguous_format)
        taken.add(address)


def _kind(gradient: Tensor | None) -> Kind:
    if gradient is None:
        return None
    return gradient.dtype, gradient.is_sparse


def has_gradient(p: Tensor) -> bool:
    """Whether the parameter has a gradient, on some rank if it is sharded."""
    return p.grad is not None or hasattr(p, "device_mesh")


def copies_of(p: Any) -> int:
    """Number of ranks that hold the same shard of ``p``; a sum over its mesh counts it so often."""
    mesh = getattr(p, "device_mesh", None)
    return 1 if mesh is None else _copies(mesh, p.placements)


def _copies(mesh: "DeviceMesh", placements: Placements) -> int:
    return math.prod(mesh.size(i) for i, at in enumerate(placements) if at.is_replicate())


def reduced(t: Any, placements: Placements) -> Any:
    """``t`` with repeated indices summed, and partial sums of a DTensor added up over ranks."""
    if t.is_sparse:
        return t.coalesce()
    if getattr(t, "placements", ()) == placements:
        return t
    return t.redistribute(placements=placements)


def local_slices(p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's shard of ``p``, and the place of its first entry in the whole."""
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return tuple(p.shape), (0,) * p.dim()
    # Imported here, since DTensor makes `import gradbalance` slow.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, p.placements)
    return tuple(shape), tuple(offset)


def _entries(t: Tensor) -> Tensor:
    """A plain real tensor with the local entries of ``t``; to write it is to write ``t``."""
    t = local(t)
    if t.is_sparse:
        t = t._values()
    return torch.view_as_real(t) if t.is_complex() else t


def on_host(device: torch.device) -> bool:
    """Whether a tensor of the device can be read without a wait."""
    return device.type == "cpu"


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
