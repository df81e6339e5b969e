"""Gradient coherence: the cosine between this gradient of a group and its last one, on a sketch of some entries."""

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._gradients.layout import copies, local, reduced, wide

ENTRIES = 1 << 13  # of all groups together: 32 KiB
TENSORS = 8  # of a group at most: each costs one small read
ALL_TENSORS = 128  # of all groups together, though at least one of each
TINY = 32  # times smaller than the largest: not worth a read, as the biases beside a matrix


class Pick(NamedTuple):
    """What is read of the gradient of one parameter."""

    parameter: Tensor
    slices: tuple[slice, ...]
    whole: bool  # whether they take in all of it
    copies: int  # how many ranks hold this shard; each adds it to the sum
    to: Tensor  # where it goes in the sketch of its mesh


class Sketch:
    """The same entries of each group's gradient at every step and on every rank, and those of the last step.

    Args:
        members: The parameters of each group.
        home: Where the sketch is kept.
    """

    def __init__(self, members: Sequence[Sequence[Tensor]], home: torch.device) -> None:
        n = len(members)
        most = max(1, min(TENSORS, ALL_TENSORS // n))
        grids: list[list[tuple[Tensor, int, _Grid]]] = []
        lengths = []
        for group in members:
            quota, length = ENTRIES // n, 0
            chosen = _chosen(group, most, quota // most)
            total = sum(p.numel() for p in chosen)
            grids.append([])
            for p in chosen:  # in equal parts of all: small tensors kept whole would outweigh the others
                grid = _thinned(p, quota * p.numel() // max(total, 1))
                grids[-1].append((p, length, grid))
                quota, total = quota - prod(grid.shape), total - p.numel()
                length += prod(grid.shape)
            lengths.append(length)
        # Rows of equal length, 0 where a group has fewer entries.
        self._now = torch.zeros(n, max(lengths), device=home)
        self._unit = torch.zeros_like(self._now)  # this one and the last one, each divided by its length
        self._last = torch.full_like(self._now, torch.nan)
        self._by_mesh: dict[Any, Tensor] = {}
        self._picks: list[Pick] = []
        for m, group_grids in enumerate(grids):
            for p, start, grid in group_grids:
                mesh = getattr(p, "device_mesh", None)
                if mesh not in self._by_mesh:
                    self._by_mesh[mesh] = self._now if mesh is None else torch.zeros_like(self._now)
                to = self._by_mesh[mesh][m, start : start + prod(grid.shape)].view(grid.shape)[grid.there]
                whole = mesh is None and tuple(grid.shape) == p.shape and not p.is_complex()
                self._picks.append(Pick(p, grid.here, whole, copies(p), to))
        self._signature = [[(id(p), start, grid) for p, start, grid in group] for group in grids]

    def take(self) -> dict[Any, Tensor]:
        """This rank's entries by mesh, each ``[N, Q]``, 0 elsewhere: over a mesh they add up to the sketch."""
        if self._picks:  # else all are frozen
            torch._foreach_copy_([pick.to for pick in self._picks], [_read(pick) for pick in self._picks])
        return self._by_mesh

    def cosines(self, entries: Tensor) -> Tensor:
        """The cosine of each group's entries with its last ones, shape ``[N]``; NaN where one of them is zero."""
        self._unit = entries / torch.linalg.vector_norm(entries, dim=1, keepdim=True)
        return (self._unit * self._last).sum(1, dtype=wide(entries.device))

    def keep(self, counts: Tensor | bool) -> None:
        """Remember the entries of this step, if it counts."""
        if isinstance(counts, Tensor):
            torch.where(counts, self._unit, self._last, out=self._last)
        elif counts:
            self._last = self._unit

    def continue_from(self, other: "Sketch") -> None:
        """Take over the last entries of each group that another sketch reads in the same places."""
        for mine, theirs, to, last in zip(self._signature, other._signature, self._last, other._last, strict=True):
            if mine == theirs:
                length = min(len(to), len(last))
                to.zero_()[:length] = last[:length]

    def numbers(self, names: Sequence[str]) -> dict[str, list[float]]:
        """The last entries of each group by name; a host read."""
        return dict(zip(names, self._last.tolist(), strict=True))

    def load(self, names: Sequence[str], numbers: Mapping[str, list[float]]) -> None:
        """Take the last entries of a checkpoint; of a group that has others there, or none, they are not known."""
        for name, last in zip(names, self._last, strict=True):
            kept = numbers.get(name, ())
            last.copy_(torch.tensor(kept if len(kept) == len(last) else torch.nan))


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
        return torch.zeros_like(to)
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
