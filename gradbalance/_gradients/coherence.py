"""Gradient coherence: the cosine between this gradient of a group and its last one, on a sketch of some entries."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from math import ceil, nan, prod, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradbalance._gradients.layout import Vector, copies, local, on_host, reduced, wide

ENTRIES = 1 << 13  # of all groups together
SMALL = 1 << 15  # entries of all groups together up to which all are kept: 512 KiB with those of the last step
TENSORS = 8  # of a group at most: each costs one small read
ALL_TENSORS = 128  # of all groups together, though at least one of each
TINY = 32  # times smaller than the largest: not worth a read, as the biases beside a matrix
ALIGNED = 8  # entries: products of rows that begin alike in memory are the same bit for bit


class Pick(NamedTuple):
    """What is read of the gradient of one parameter."""

    parameter: Tensor
    slices: tuple[slice, ...]
    whole: bool  # whether they take in all of it
    copies: int  # how many ranks hold this shard; each adds it to the sum
    to: tuple[Tensor, Tensor]  # where it goes in the sketch of its mesh, at even and at odd steps


class Sketch:
    """The same entries of each group's gradient at every step and on every rank, and those of the last step.

    Args:
        members: The parameters of each group.
        home: Where the sketch is kept.

    Attributes:
        is_whole: Whether it has all entries, so that the lengths of its rows are the norms.
    """

    def __init__(self, members: Sequence[Sequence[Tensor]], home: torch.device) -> None:
        n, everything = len(members), [p for group in members for p in group]
        most = max(1, min(TENSORS, ALL_TENSORS // n))
        plain = all(p.device == home and not p.is_complex() and not hasattr(p, "device_mesh") for p in everything)
        largest = max(sum(p.numel() for p in group) for group in members)
        small = n * largest <= SMALL  # on whatever ranks and devices: a checkpoint may go to others
        self.is_whole = small and plain and on_host(home)
        grids: list[list[tuple[Tensor, int, _Grid]]] = []
        lengths = []
        for group in members:
            quota, length = largest if small else ENTRIES // n, 0
            chosen = group if small else _chosen(group, most, quota // most)
            total = sum(p.numel() for p in chosen)
            grids.append([])
            for p in chosen:  # in equal parts of all: small tensors kept whole would outweigh the others
                grid = _thinned(p, quota * p.numel() // max(total, 1))
                grids[-1].append((p, length, grid))
                quota, total = quota - prod(grid.shape), total - p.numel()
                length += prod(grid.shape)
            lengths.append(length)
        # Rows of equal length, 0 where a group has fewer entries: those of this step and of the last one, in turn. In
        # float64, where no square of a float32 is too large or too small.
        self._sizes, width = lengths, ALIGNED * ceil(max(lengths) / ALIGNED)
        self._pairs = torch.zeros(n, 2, width, dtype=wide(home), device=home)
        self._transposed, self._rows = self._pairs.mT, self._pairs.unbind(1)
        self._now = 0
        self._remember([None] * n)  # nothing yet
        self._packed = np.float64 if any(p.dtype == torch.float64 for p in everything) else np.float32
        meshes = {getattr(p, "device_mesh", None) for p in everything}
        self._by_mesh: dict[Any, Sequence[Tensor]] = {
            mesh: self._rows if meshes == {None} else [torch.zeros(n, width, device=home)] * 2 for mesh in meshes
        }
        self._picks: list[Pick] = []
        for m, group_grids in enumerate(grids):
            for p, start, grid in group_grids:
                mesh = getattr(p, "device_mesh", None)
                first, second = (
                    rows[m, start : start + prod(grid.shape)].view(grid.shape)[grid.there]
                    for rows in self._by_mesh[mesh]
                )
                whole = mesh is None and tuple(grid.shape) == p.shape and not p.is_complex()
                self._picks.append(Pick(p, grid.here, whole, copies(p), (first, second)))
        self._to = [[pick.to[turn] for pick in self._picks] for turn in range(2)]
        self._signature = [[(id(p), start, grid) for p, start, grid in group] for group in grids]

    def take(self) -> dict[Any, Tensor]:
        """This rank's entries by mesh, each ``[N, Q]``, 0 elsewhere: over a mesh they add up to the sketch."""
        if self._picks:  # else all are frozen
            torch._foreach_copy_(self._to[self._now], [_read(pick) for pick in self._picks])
        return {mesh: rows[self._now] for mesh, rows in self._by_mesh.items()}

    def compare(self, entries: Tensor | None = None) -> tuple[Vector, Vector]:
        """The length of each group's entries, and their cosine with the last ones.

        Args:
            entries: Those of this step if they were added up over ranks, ``[N, Q]``.

        Returns:
            The lengths and the cosines, NaN where one of the two lengths is zero.
        """
        now = self._now
        if entries is not None and entries is not self._rows[now]:
            self._rows[now].copy_(entries)
        if not on_host(self._pairs.device):
            lengths = torch.linalg.vector_norm(self._pairs, dim=2)
            products = (self._rows[0] * self._rows[1]).sum(1)
            return lengths[:, now], products / lengths.prod(1)
        products_of = torch.bmm(self._pairs, self._transposed).tolist()  # of each group with itself and the last, 2 x 2
        return [sqrt(p[now][now]) for p in products_of], [
            p[0][1] / sqrt(p[0][0] * p[1][1]) if p[0][0] * p[1][1] else nan for p in products_of
        ]

    def keep(self, counts: Tensor | bool) -> None:
        """Remember the entries of this step, if it counts."""
        if isinstance(counts, Tensor):
            torch.where(counts, *self._rows, out=self._rows[1])
        elif counts:
            self._now = 1 - self._now

    def continue_from(self, other: "Sketch") -> None:
        """Take over the last entries of each group that another sketch reads in the same places."""
        same = [mine == theirs for mine, theirs in zip(self._signature, other._signature, strict=True)]
        self._remember([row if there else None for row, there in zip(other._last(), same, strict=True)])

    def _last(self) -> list[Tensor]:
        return [row[:size] for row, size in zip(self._rows[1 - self._now], self._sizes, strict=True)]

    def _remember(self, rows: Sequence[Tensor | None]) -> None:
        """Have these as the last entries of each group; None or those of another length are not known."""
        for to, size, row in zip(self._rows[1 - self._now], self._sizes, rows, strict=True):
            to.zero_()[:size] = row if row is not None and len(row) == size else nan

    def packed(self, names: Sequence[str]) -> dict[str, Any]:
        """The last entries of each group by name, as their bytes in base64, and whose turn it is; a host read."""
        rows = [row.cpu().numpy().astype(self._packed) for row in self._last()]
        entries = {name: b64encode(row.tobytes()).decode() for name, row in zip(names, rows, strict=True)}
        return {"turn": self._now, "entries": entries}

    def unpack(self, names: Sequence[str], packed: Mapping[str, Any]) -> None:
        """Take the last entries of a checkpoint; of a group that has others there, or none, they are not known."""
        self._now, entries = packed.get("turn", 0), packed.get("entries", {})
        rows = (np.frombuffer(b64decode(entries.get(name, "")), self._packed) for name in names)
        self._remember([torch.tensor(row) for row in rows])


class _Grid(NamedTuple):
    """A regular grid of positions in a parameter."""

    shape: tuple[int, ...]
    here: tuple[slice, ...]  # its part in this rank's shard
    there: tuple[slice, ...]  # that part's place in the grid


def _chosen(group: Sequence[Tensor], most: int, enough: int) -> list[Tensor]:
    """At most so many tensors, the smallest first: spread over those that are large enough, or the largest."""
    large = [p for p in group if p.numel() >= enough]
    largest = sorted(group, key=lambda p: -p.numel())[:most]
    largest = [p for p in largest if TINY * p.numel() >= largest[0].numel()]
    return sorted(large[:: ceil(len(large) / most)] if len(large) >= most else largest, key=lambda p: p.numel())


def _thinned(p: Any, entries: int) -> _Grid:
    """A grid of about ``entries`` positions in ``p``."""
    strides, shape = [1] * p.dim(), list(p.shape)
    # All axes alike: a few whole rows would say less, since rows differ more than the entries within one.
    for axes, d in zip(range(p.dim(), 0, -1), sorted(range(p.dim()), key=lambda d: p.shape[d]), strict=True):
        strides[d] = max(1, min(p.shape[d], ceil((prod(shape) / max(entries, 1)) ** (1 / axes))))
        shape[d] = ceil(p.shape[d] / strides[d])
    sizes, offsets = tuple(p.shape), (0,) * p.dim()
    if getattr(p, "device_mesh", None) is not None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    here, there = [], []
    for size, offset, stride in zip(sizes, offsets, strides, strict=True):
        start = -offset % stride
        first = (offset + start) // stride
        here.append(slice(start, None, stride))
        there.append(slice(first, first + len(range(start, size, stride))))
    return _Grid(tuple(shape), tuple(here), tuple(there))


def _read(pick: Pick) -> Tensor:
    p, slices, whole, times, to = pick
    if (gradient := p.grad) is None:
        return torch.zeros_like(to[0])
    if whole and not gradient.is_sparse:
        return gradient
    gradient = reduced(gradient, getattr(p, "placements", ()))
    entries = _read_sparse(gradient, slices) if gradient.is_sparse else local(gradient)[slices]
    entries = entries.real if entries.is_complex() else entries
    return entries if times == 1 else entries / times


def _read_sparse(gradient: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The entries of a coalesced gradient, never made dense if it is sparse in its rows alone, as an embedding's."""
    if gradient.sparse_dim() > 1:
        return gradient.to_dense()[slices]
    rows, values, stride = gradient.indices()[0], gradient.values()[:, *slices[1:]], slices[0].step
    chosen = (rows % stride == 0).view(-1, *[1] * (values.dim() - 1))
    entries = values.new_zeros(ceil(len(gradient) / stride), *values.shape[1:])
    return entries.index_add_(0, rows // stride, torch.where(chosen, values, 0))
