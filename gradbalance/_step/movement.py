"""How far the parameters of each group move at a step, on some of their entries."""

from collections.abc import Sequence
from itertools import chain
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradbalance._optimizer.scaling import local
from gradbalance._step.gradients import copies_of, local_slices, wide
from gradbalance._step.sketch import Quota

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Mesh = DeviceMesh | None

ENTRIES = 1 << 13  # of all groups together, unless all are read
FIRST = 32  # steps of a record that are all read
EVERY = 7  # about one of so many is read after them
# By multiples of it the steps are chosen: it is irrational, so that none of several groups that
# take turns is missed, whatever their period.
GOLDEN = (5**0.5 - 1) / 2


class Entries:
    """Entries of the parameters on one mesh, before and after a step.

    Args:
        n: Number of groups.
        copies: Number of ranks that hold the same shards.
        device: Where they are compared.
    """

    def __init__(self, n: int, copies: int, device: torch.device) -> None:
        self._copies = copies
        self._device = device
        self._picks: list[tuple[Tensor, slice | Tensor]] = []  # parameters and positions
        self._sizes = [0] * n
        self._before = self._step = torch.empty(0)
        self._now: Tensor | None = None

    def add(self, m: int, p: Tensor, positions: slice | Tensor) -> None:
        """Read more entries of group m, which must not be lower than that of the last ones.

        Args:
            m: Index of the group.
            p: The parameter.
            positions: In this rank's shard of it, flattened.
        """
        self._picks.append((p, positions))
        if isinstance(positions, slice):
            self._sizes[m] += len(range(*positions.indices(local(p).numel())))
        else:
            self._sizes[m] += len(positions)

    def begin(self) -> None:
        """Read the entries before the step, unless they have just been read after the last one."""
        self._before = self._read() if self._now is None else self._now
        self._now = None

    def end(self, is_open: bool) -> None:
        """Read them after the step, if they were before it."""
        self._now = None
        if is_open:
            self._now = self._read()
            self._step = self._now - self._before

    def squares(self) -> Tensor:
        """0, and squared lengths of the parameters and of the step on this rank, ``[1 + 2 N]``."""
        parts = [self._before[:0]]
        for entries in (self._before, self._step):
            parts += torch.split(entries, self._sizes)
        squares = torch.stack(torch._foreach_norm(parts)).to(wide(self._device)).square()
        return squares if self._copies == 1 else squares / self._copies

    def _read(self) -> Tensor:
        entries = []
        for p, positions in self._picks:
            # Looked up now, as some steps put another tensor into `p.data`.
            shard = local(p)
            if shard.is_complex():
                shard = shard.real
            if isinstance(positions, slice):
                own = shard.reshape(-1)[positions]
            else:
                own = shard.take(positions)
            entries.append(own.to(self._device, non_blocking=True))
        read = torch.cat(entries)
        return read.to(torch.promote_types(read.dtype, torch.float32))


class Movement:
    """How far the parameters of each group move at a step.

    It reads some of their entries before the step and after it, which is the same for every
    optimizer. After it is before the next one, as some optimizers write parameters when their step
    is over (ZeroRedundancyOptimizer, from other ranks). Of a long record about one step of
    ``EVERY`` is read, as reading costs as much as measuring.

    Args:
        members: Trainable parameters of each group.
        device: Where their entries are compared.

    Attributes:
        meshes: Over which parameters are sharded.
    """

    def __init__(self, members: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        self._members = members
        self._device = device
        self._entries: dict[tuple[Mesh, int], Entries] = {}  # chosen at the first reading
        self._watch = 0  # see `begin`
        self._watched = 0  # measured steps of this watch
        self._is_open = False  # between the two readings of a step
        self._is_known = False
        meshes = [getattr(p, "device_mesh", None) for p in chain.from_iterable(members)]
        self.meshes = {mesh: None for mesh in meshes if mesh is not None}

    def begin(self, watch: int) -> None:
        """Before a measured step, which is read if somebody watches and its turn has come.

        Args:
            watch: 0 if nobody watches, and another number whenever somebody begins to.
        """
        if watch != self._watch:
            self._watch = watch
            self._watched = 0
        if watch == 0:
            return
        self._watched += 1
        if self._watched > FIRST and self._watched * GOLDEN % 1 > 1 / EVERY:
            return
        if not self._entries:
            self._choose()
        for entries in self._entries.values():
            entries.begin()
        self._is_open = True

    def end(self) -> None:
        """After the step, whether or not it was read."""
        for entries in self._entries.values():
            entries.end(self._is_open)
        self._is_known |= self._is_open
        self._is_open = False

    def take(self, watch: int) -> dict["Mesh", Tensor]:
        """What was read on this rank since the last call, by mesh, each of shape ``[1 + 2 N]``.

        Who watches, as on another rank nobody may; squared lengths of the parameters and of their
        step. What is on a mesh has to be summed over its ranks. That is there even if nothing was
        read, so that all ranks send messages of the same length.

        Args:
            watch: As for :meth:`begin`, on this rank.
        """
        taken: dict[Mesh, Tensor] = {}
        size = 1 + 2 * len(self._members)
        for mesh in self.meshes:
            taken[mesh] = torch.zeros(size, dtype=wide(self._device), device=self._device)
            taken[mesh][0] = watch
        if self._is_known:
            for (mesh, _), entries in self._entries.items():
                squares = entries.squares()
                taken[mesh] = taken[mesh] + squares if mesh in taken else squares
        self._is_known = False
        return taken

    def _choose(self) -> None:
        n = len(self._members)
        quota = Quota.of(self._members)
        for m, group in enumerate(self._members):
            chosen = quota.choose(group)
            total = sum(p.numel() for p in chosen)
            for p in chosen:
                key = getattr(p, "device_mesh", None), copies_of(p)
                if key not in self._entries:
                    self._entries[key] = Entries(n, key[1], self._device)
                number = p.numel()
                if not quota.takes_all:
                    number = ENTRIES // n * p.numel() // max(total, 1)
                self._entries[key].add(m, p, _positions(p, number))


def _positions(p: Tensor, number: int) -> slice | Tensor:
    """Positions of entries of ``p`` in this rank's shard of it, flattened.

    Evenly spaced in the whole, at a distance that takes them through all columns: a gradient of few
    samples is large in whole rows and columns, of which a grid would see some alone.
    """
    distance = max(1, p.numel() // max(number, 1))
    while gcd(distance, p.numel()) > 1:
        distance -= 1
    is_sharded = hasattr(p, "device_mesh")
    if distance == 1 or (not is_sharded and p.is_contiguous()):
        return slice(None, None, distance)  # which needs no list of positions
    if not is_sharded:
        return torch.arange(0, p.numel(), distance, device=p.device)
    sizes, offsets = local_slices(p)
    every = np.arange(0, p.numel(), distance)
    whole = np.unravel_index(every, tuple(p.shape)) if p.dim() else ()
    here = [axis - offset for axis, offset in zip(whole, offsets, strict=True)]
    is_inside = np.ones(len(every), dtype=bool)
    for axis, size in zip(here, sizes, strict=True):
        is_inside &= (axis >= 0) & (axis < size)
    own = np.zeros(is_inside.sum(), dtype=np.int64)
    for axis, size in zip(here, sizes, strict=True):
        own = own * size + axis[is_inside]
    return torch.from_numpy(own).to(p.device, non_blocking=True)
