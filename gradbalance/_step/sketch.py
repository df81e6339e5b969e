"""The cosine between a group's gradient and the last one that it had, on some of its entries."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from itertools import chain
from math import ceil, inf, nan, prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradbalance._optimizer.checkpoint import Saved, count_in
from gradbalance._optimizer.scaling import local
from gradbalance._step.gradients import (
    Gradients,
    Plan,
    copies_of,
    has_gradient,
    local_slices,
    on_host,
    reduced,
    wide,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ENTRIES = 1 << 13  # of all groups together
SMALL = 1 << 15  # entries of all groups together up to which all are kept
TENSORS = 8  # of a group at most: each costs one small read
ALL_TENSORS = 128  # of all groups together, though at least one of each
TINY = 32  # times smaller than the largest: not worth a read, as a bias beside a matrix
ALIGNED = 8  # entries: equal rows that begin alike in memory have bitwise equal products

Vector = NDArray[np.float64]


class Pick(NamedTuple):
    """The entries that are read of the gradient of one parameter.

    Attributes:
        parameter: Whose gradient.
        slices: Of this rank's shard of it.
        is_plain: Whether the gradient is a real tensor on this rank alone, unless it is sparse.
        copies: Number of ranks that hold the same shard, each of which adds its entries.
        mesh: Of a DTensor, else None.
        slots: Where the entries go: two for a plain tensor, one in the sum over the mesh for a
            DTensor.
        size: Number of entries on all ranks.
    """

    parameter: Tensor
    slices: tuple[slice, ...]
    is_plain: bool
    copies: int
    mesh: "DeviceMesh | None"
    slots: list[Tensor]
    size: int


class Quota(NamedTuple):
    """How much is read of each group.

    Attributes:
        takes_all: Whether all entries are.
        entries: Number of entries.
        tensors: Number of tensors at most, unless all are read.
    """

    takes_all: bool
    entries: int
    tensors: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[Tensor]]) -> "Quota":
        """That of each of several groups."""
        n = len(groups)
        largest = max(sum(p.numel() for p in group) for group in groups)
        # Decided alike on whatever ranks and devices, as a checkpoint may go to others.
        takes_all = n * largest <= SMALL
        entries = largest if takes_all else ENTRIES // n
        return cls(takes_all, entries, max(1, min(TENSORS, ALL_TENSORS // n)))

    def choose(self, group: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a group that are read."""
        if self.takes_all:
            return list(group)
        return _chosen(group, self.tensors, self.entries // self.tensors)


class Sketch:
    """The same entries of each group's gradient at every step and on every rank.

    Each group has two slots: one for the entries of the last gradient that it had, and one for
    those of this step. :meth:`keep` swaps them for the groups whose gradient counts.

    Args:
        members: Trainable parameters of each group.
        device: Where the entries are kept.

    Attributes:
        is_whole: Whether the sketch has all entries, so that its lengths are the norms.
    """

    def __init__(self, members: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        n = len(members)
        everything = list(chain.from_iterable(members))
        self._quota = Quota.of(members)
        is_plain = all(_is_plain(p, device) for p in everything)
        self.is_whole = self._quota.takes_all and is_plain and on_host(device)
        self._members = members
        # Each tensor has one entry at least, even beyond the quota.
        width = ALIGNED * ceil((self._quota.entries + self._quota.tensors) / ALIGNED)
        # float64, in which no square of a float32 overflows or vanishes.
        self._entries = torch.zeros(n, 2, width, dtype=wide(device), device=device)
        self._transposed = self._entries.mT
        self._sums: dict[DeviceMesh | None, Tensor] = {}
        for p in everything:
            mesh = getattr(p, "device_mesh", None)
            if mesh is not None and mesh not in self._sums:
                self._sums[mesh] = torch.zeros(n, width, device=device)
        self._picks: list[list[Pick]] = [[] for _ in members]
        self._lengths = [0] * n
        # Indices of the parameters that had a gradient at some step: only these are sampled.
        self._seen: list[set[int]] = [set() for _ in members]
        self._plan: Plan | None = None
        self._present: list[bool] = [False] * n  # whether the group has a gradient at this step
        self._now = [0] * n  # the slot of this step
        self._is_known = [False] * n  # whether the other slot holds entries

    def take(self, gradients: Gradients) -> dict["DeviceMesh | None", Tensor]:
        """Read this rank's entries of the groups that have a gradient.

        Returns:
            By mesh, those that have to be summed over its ranks, shape ``[N, Q]``.
        """
        if gradients.plan is not self._plan:
            self._plan = gradients.plan
            self._present = gradients.plan.present
            self._pick_new()
        slots: list[Tensor] = []
        entries: list[Tensor] = []
        if self._sums:
            torch._foreach_zero_([*self._sums.values(), *self._slots()])
        for m, picks in enumerate(self._picks):
            if not self._present[m]:
                continue
            for pick in picks:
                slot = pick.slots[self._now[m] if pick.mesh is None else 0]
                slots.append(slot)
                entries.append(_read(pick, slot))
        if slots:
            # From the host to an accelerator without a wait; the other way does not occur.
            torch._foreach_copy_(slots, entries, non_blocking=not on_host(self._entries.device))
        return self._sums

    def products(self, summed: Mapping["DeviceMesh | None", Tensor]) -> Tensor:
        """Products of each group's two slots with themselves and each other, shape ``[N, 2, 2]``.

        Args:
            summed: What :meth:`take` returned, summed over ranks.
        """
        if summed:
            total = torch.stack([part.to(self._entries) for part in summed.values()]).sum(0)
            rows = [total[m] for m, is_present in enumerate(self._present) if is_present]
            torch._foreach_add_(self._slots(), rows)
        return torch.bmm(self._entries, self._transposed)

    def compare(self, products: list[list[list[float]]]) -> tuple[list[float], list[float]]:
        """Lengths of the entries of this step, and their cosines with the last ones, of each group.

        Args:
            products: Those of the step.

        Returns:
            The lengths, 0 for a group without a gradient; the cosines, NaN where not defined.
        """
        lengths = [0.0] * len(products)
        cosines = [nan] * len(products)
        for m, ((first, cross), (_, second)) in enumerate(products):
            if not self._present[m]:
                continue
            lengths[m] = sqrt(second if self._now[m] else first)
            scale = sqrt(first) * sqrt(second)
            if self._is_known[m] and 0 < scale < inf:
                cosines[m] = cross / scale
        return lengths, cosines

    def keep(self, lengths: list[float]) -> None:
        """Remember the entries of this step as the last ones, of each group that has any.

        Args:
            lengths: Of the entries of this step.
        """
        for m, length in enumerate(lengths):
            if 0 < length < inf:
                self._now[m] = 1 - self._now[m]
                self._is_known[m] = True

    def continue_from(self, other: "Sketch") -> None:
        """Take over what another sketch knows of the groups that have the same parameters."""
        for m, (mine, theirs) in enumerate(zip(self._members, other._members, strict=True)):
            place = {id(p): i for i, p in enumerate(mine)}
            if place.keys() == set(map(id, theirs)):
                seen = {place[id(theirs[i])] for i in other._seen[m]}
                self._load_group(m, seen, None)
                entries = other._last_by_parameter(m)
                picked = [id(pick.parameter) for pick in self._picks[m]]
                if picked and entries.keys() >= set(picked):
                    self._load_row(m, np.concatenate([entries[p] for p in picked]))

    def save(self, names: Sequence[str]) -> Saved:
        """The last entries of each group by name, as bytes in base64, in builtin types."""
        saved = {}
        for m, name in enumerate(names):
            row = self._last(m)
            packed = None if row is None else _packed(row)
            saved[name] = {"seen": sorted(self._seen[m]), "entries": packed}
        return saved

    def load(self, names: Sequence[str], saved: Saved) -> None:
        """Take what :meth:`save` gave."""
        for m, (seen, row) in enumerate(parse(names, saved)):
            self._load_group(m, seen, row)

    def _slots(self) -> list[Tensor]:
        """The slots of this step of the groups that have a gradient."""
        return [self._entries[m, self._now[m]] for m in range(len(self._now)) if self._present[m]]

    def _last(self, m: int) -> Vector | None:
        if not self._is_known[m]:
            return None
        row: Vector = self._entries[m, 1 - self._now[m], : self._lengths[m]].cpu().numpy()
        return row.copy()

    def _last_by_parameter(self, m: int) -> dict[int, Vector]:
        """The last entries of each parameter that is read, by ``id``, if they are known."""
        row = self._last(m)
        entries: dict[int, Vector] = {}
        start = 0
        for pick in self._picks[m]:
            if row is not None:
                entries[id(pick.parameter)] = row[start : start + pick.size]
            start += pick.size
        return entries

    def _load_group(self, m: int, seen: set[int], row: Vector | None) -> None:
        self._seen[m] = {i for i in seen if i < len(self._members[m])}
        self._is_known[m] = False
        self._pick(m)
        if row is not None:
            self._load_row(m, row)

    def _load_row(self, m: int, row: Vector) -> None:
        if len(row) == self._lengths[m]:
            slot = self._entries[m, 1 - self._now[m], : len(row)]
            slot.copy_(torch.from_numpy(row))
            self._is_known[m] = True

    def _pick_new(self) -> None:
        """Choose the entries of each group anew in which a parameter has its first gradient."""
        for m, group in enumerate(self._members):
            with_gradient = {i for i, p in enumerate(group) if has_gradient(p)}
            if not with_gradient <= self._seen[m]:
                self._seen[m] |= with_gradient
                if not (self._quota.takes_all and self._picks[m]):
                    self._pick(m)
                    self._is_known[m] = False

    def _pick(self, m: int) -> None:
        quota = self._quota.entries
        candidates = self._members[m]
        if not self._quota.takes_all:
            candidates = [candidates[i] for i in sorted(self._seen[m])]
        chosen = self._quota.choose(candidates)
        total = sum(p.numel() for p in chosen)
        self._entries[m].zero_()
        self._picks[m] = []
        start = 0
        # Equal parts of all: small tensors kept whole would outweigh the others.
        for p in chosen:
            grid = _grid(p, quota * p.numel() // max(total, 1))
            size = prod(grid.shape)
            self._picks[m].append(self._pick_of(m, p, grid, start))
            quota -= size
            total -= p.numel()
            start += size
        self._lengths[m] = start

    def _pick_of(self, m: int, p: Tensor, grid: "Grid", start: int) -> Pick:
        mesh = getattr(p, "device_mesh", None)
        rows = self._entries[m] if mesh is None else self._sums[mesh][m : m + 1]
        place = slice(start, start + prod(grid.shape))
        slots = [row[place].view(grid.shape)[grid.there] for row in rows]
        is_plain = mesh is None and not p.is_complex()
        return Pick(p, grid.here, is_plain, copies_of(p), mesh, slots, prod(grid.shape))


class Grid(NamedTuple):
    """A regular grid of positions in a parameter.

    Attributes:
        shape: Number of positions along each axis.
        here: The part of the grid in this rank's shard, as slices of the shard.
        there: The same part, as slices of the grid.
    """

    shape: tuple[int, ...]
    here: tuple[slice, ...]
    there: tuple[slice, ...]


def _is_plain(p: Tensor, device: torch.device) -> bool:
    return p.device == device and not p.is_complex() and not hasattr(p, "device_mesh")


def _chosen(group: Sequence[Tensor], most: int, enough: int) -> list[Tensor]:
    """At most ``most`` tensors, smallest first.

    Evenly spaced among those with ``enough`` entries, else the largest ones.
    """
    large = [p for p in group if p.numel() >= enough]
    if len(large) >= most:
        chosen = large[:: ceil(len(large) / most)]
    else:
        largest = sorted(group, key=lambda p: -p.numel())[:most]
        chosen = [p for p in largest if TINY * p.numel() >= largest[0].numel()]
    return sorted(chosen, key=lambda p: p.numel())


def _grid(p: Tensor, entries: int) -> Grid:
    """A grid of at most ``entries`` positions in ``p``, and one at least."""
    strides = [1] * p.dim()
    shape = list(p.shape)
    # All axes alike: a few whole rows would say less, as rows differ more than entries within one.
    by_size = sorted(range(p.dim()), key=lambda d: p.shape[d])
    for i, d in enumerate(by_size):
        excess = prod(shape) / max(entries, 1)
        stride = ceil(excess ** (1 / (p.dim() - i)))
        strides[d] = max(1, min(p.shape[d], stride))
        shape[d] = ceil(p.shape[d] / strides[d])
    while prod(shape) > max(entries, 1):  # rounded up along several axes
        d = max(range(p.dim()), key=lambda d: shape[d])
        strides[d] += 1
        shape[d] = ceil(p.shape[d] / strides[d])
    sizes, offsets = local_slices(p)
    here = []
    there = []
    for size, offset, stride in zip(sizes, offsets, strides, strict=True):
        start = -offset % stride
        first = (offset + start) // stride
        here.append(slice(start, None, stride))
        there.append(slice(first, first + len(range(start, size, stride))))
    return Grid(tuple(shape), tuple(here), tuple(there))


def _read(pick: Pick, slot: Tensor) -> Tensor:
    """The picked entries of a gradient, 0 where there is none."""
    gradient = pick.parameter.grad
    if gradient is None:
        return torch.zeros_like(slot)
    if pick.is_plain and not gradient.is_sparse:
        return gradient if slot.shape == gradient.shape else gradient[pick.slices]
    gradient = reduced(gradient, getattr(pick.parameter, "placements", ()))
    if gradient.is_sparse:
        entries = _read_sparse(gradient, pick.slices)
    else:
        entries = local(gradient)[pick.slices]
    if entries.is_complex():
        entries = entries.real
    return entries if pick.copies == 1 else entries / pick.copies


def _read_sparse(gradient: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """Entries of a coalesced gradient, which is not made dense if only its rows are sparse."""
    if gradient.sparse_dim() > 1:
        return gradient.to_dense()[slices]
    rows = gradient.indices()[0]
    values = gradient.values()[:, *slices[1:]]
    stride = slices[0].step
    is_picked = (rows % stride == 0).view(-1, *[1] * (values.dim() - 1))
    entries = values.new_zeros(ceil(len(gradient) / stride), *values.shape[1:])
    return entries.index_add_(0, rows // stride, torch.where(is_picked, values, 0))


def parse(names: Sequence[str], saved: Saved) -> list[tuple[set[int], Vector | None]]:
    """What :meth:`Sketch.save` gave of each group: which parameters were sampled, and the entries.

    Raises:
        KeyError, TypeError: If it is damaged.
    """
    groups = []
    for name in names:
        group = saved.get(name, {"seen": [], "entries": None})
        packed = group["entries"]
        row = None
        if packed is not None:
            row = _unpacked(packed)
        groups.append((set(map(count_in, group["seen"])), row))
    return groups


def _packed(row: Vector) -> str:
    """The numbers of a row as bytes in base64, in float32 where that holds them exactly."""
    narrow = row.astype(np.float32)
    kind = "f4" if np.array_equal(narrow, row) else "f8"
    return f"{kind}:{b64encode(row.astype(kind).tobytes()).decode()}"


def _unpacked(packed: str) -> Vector:
    kind, _, entries = packed.partition(":")
    if kind not in ("f4", "f8"):
        raise TypeError(f"entries of the kind {kind!r}")
    try:
        return np.frombuffer(b64decode(entries), kind).astype(np.float64)
    except ValueError as error:
        raise TypeError("entries that cannot be decoded") from error
