"""A sketch of each group's gradient: some of its entries, the same ones at every step and on every rank."""

from collections.abc import Sequence
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._buckets import copies, local, reduced

ENTRIES = 1 << 15  # of all groups together: 128 KiB
TENSORS = 8  # of a group at most: each costs one small read
ALL_TENSORS = 128  # of all groups together, though at least one of each


class Pick(NamedTuple):
    """What is read of the gradient of one parameter."""

    parameter: Tensor
    slices: tuple[slice, ...]
    whole: bool  # whether they take in all of it
    copies: int  # ranks with the same shard each bring it


class Sketch:
    """Which entries of which parameters' gradients are read."""

    def __init__(self, members: Sequence[Sequence[Tensor]], home: torch.device) -> None:
        self._home = home
        self._picks: dict[Any, list[Pick]] = {}  # by mesh, if any, and device
        positions: dict[Any, list[Tensor]] = {}
        lengths: list[int] = []
        most = max(1, min(TENSORS, ALL_TENSORS // len(members)))
        for group in members:
            quota, size = ENTRIES // len(members), sum(lengths)
            chosen = _chosen(group, most, quota // most)
            total = sum(p.numel() for p in chosen)
            for p in chosen:  # in equal parts of all: small tensors kept whole would outweigh the others
                shape, slices, grid = _thinned(p, quota * p.numel() // max(total, 1))
                quota, total = quota - prod(shape), total - p.numel()
                place = getattr(p, "device_mesh", None), p.device
                whole = place[0] is None and tuple(shape) == p.shape
                self._picks.setdefault(place, []).append(Pick(p, slices, whole, copies(p)))
                own = torch.arange(prod(shape)).view(shape)[grid].flatten()
                positions.setdefault(place, []).append(size + own)
                size += prod(shape)
            lengths.append(size - sum(lengths))
        self.size = sum(lengths)
        self._positions = {place: torch.cat(parts).to(home) for place, parts in positions.items()}
        self._lengths = torch.tensor(lengths, device=home)

    def take(self) -> dict[Any, Tensor]:
        """This rank's entries by mesh, each of shape ``[size]``, 0 elsewhere: over a mesh they add up to the sketch."""
        taken: dict[Any, Tensor] = {}
        for place, picks in self._picks.items():
            entries = torch.cat(list(map(_read, picks))).to(self._home, torch.float32)
            if len(entries) < self.size:  # the others are elsewhere
                blank = taken.get(place[0], torch.zeros(self.size, device=self._home))
                entries = blank.index_copy_(0, self._positions[place], entries)
            taken[place[0]] = entries
        return taken

    def cosines(self, old: Tensor, new: Tensor) -> Tensor:
        """The cosine between two sketches of each group, shape ``[N]``; NaN where one of them is zero."""
        dot, old_square, new_square = (
            torch.segment_reduce(product, "sum", lengths=self._lengths, unsafe=True)  # the check would read on the host
            for product in (old * new, old.square(), new.square())
        )
        return dot / (old_square.sqrt() * new_square.sqrt())


def _chosen(group: Sequence[Tensor], most: int, enough: int) -> list[Tensor]:
    """At most so many tensors, the smallest first: spread over those that are large enough, or the largest."""
    large = [p for p in group if p.numel() >= enough]
    largest = sorted(group, key=lambda p: -p.numel())[:most]
    return sorted(large[:: ceil(len(large) / most)] if len(large) >= most else largest, key=lambda p: p.numel())


def _thinned(p: Any, entries: int) -> tuple[list[int], tuple[slice, ...], tuple[slice, ...]]:
    """A regular grid of about ``entries`` positions in ``p``: its shape, this rank's part of ``p`` and of the grid."""
    strides, shape = [1] * p.dim(), list(p.shape)
    # All axes alike: whole rows would be few, and differ more from each other than the entries of one.
    for axes, d in zip(range(p.dim(), 0, -1), sorted(range(p.dim()), key=lambda d: p.shape[d]), strict=True):
        strides[d] = max(1, min(p.shape[d], ceil((prod(shape) / max(entries, 1)) ** (1 / axes))))
        shape[d] = ceil(p.shape[d] / strides[d])
    sizes, offsets = tuple(p.shape), (0,) * p.dim()
    if getattr(p, "device_mesh", None) is not None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    local, grid = [], []
    for size, offset, stride in zip(sizes, offsets, strides, strict=True):
        start = -offset % stride
        first = (offset + start) // stride
        local.append(slice(start, None, stride))
        grid.append(slice(first, first + len(range(start, size, stride))))
    return shape, tuple(local), tuple(grid)


def _read(pick: Pick) -> Tensor:
    p, slices, whole, times = pick
    if (gradient := p.grad) is None:
        entries = torch.zeros_like(local(p)[slices])
    else:
        gradient = reduced(gradient, getattr(p, "placements", ()))
        entries = _read_sparse(gradient, slices) if gradient.is_sparse else local(gradient)
        entries = entries if whole or gradient.is_sparse else entries[slices]
    entries = (entries.real if entries.is_complex() else entries).flatten()
    return entries if times == 1 else entries / times


def _read_sparse(gradient: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The entries of a coalesced gradient, never made dense if it is sparse in its rows alone, as an embedding's."""
    if gradient.sparse_dim() > 1:
        return gradient.to_dense()[slices]
    rows, values, stride = gradient.indices()[0], gradient.values()[:, *slices[1:]], slices[0].step
    chosen = (rows % stride == 0).view(-1, *[1] * (values.dim() - 1))
    entries = values.new_zeros(ceil(len(gradient) / stride), *values.shape[1:])
    return entries.index_add_(0, rows // stride, torch.where(chosen, values, 0))
