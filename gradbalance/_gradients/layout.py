"""How the parameters of the groups lie in memory: sorted by device, dtype and sharding, for one fused kernel each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

REQUIRES_GRAD = attrgetter("requires_grad")
# `vector_norm` in float32 on the CPU loses accuracy on large tensors: 2e-4 at 8 M elements, 1e-6 in parts of this size.
CPU_PART = 1 << 18
IS_SPARSE = attrgetter("is_sparse")

Vector = Tensor | list[float]  # of N numbers, shape ``[N]``: a list on the host where one is at hand


class Bucket:
    """Parameters of one device, dtype and sharding, sorted by group: what one fused kernel can take."""

    def __init__(self, like: Tensor, n_groups: int) -> None:
        self.device = like.device
        self.on_host = on_host(like.device)
        self.low = like.dtype in (torch.float16, torch.bfloat16)
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
        self._table, self._cells = torch.empty(0), [torch.empty(0)]

    def table(self, counts: list[int]) -> tuple[Tensor, list[Tensor]]:
        """A row for each group with a cell for each of its tensors, 0 in the rest, and its cells one by one.

        Kept from step to step, so that many norms are brought into the rows of their groups by one operator.
        """
        if counts != self._counts:
            self._counts = counts
            self._table = torch.zeros(len(counts), max(1, *counts), dtype=self.precision, device=self.device)
            self._cells = [cell for row, n in zip(self._table, counts, strict=True) for cell in row[:n].unbind()]
        return self._table, self._cells


class Gathered(NamedTuple):
    """The gradients of a bucket that are there in this step, group after group, as plain strided real tensors."""

    bucket: Bucket
    counts: list[int]  # how many there are of each group
    read: list[Tensor]  # to take norms of
    write: list[Tensor]  # to scale: the same tensors, but for sparse and partially reduced ones


class Layout:
    """The trainable parameters of an optimizer by group: worked out once, kept while it holds the same ones.

    Args:
        param_groups: Of the optimizer.
        group_of: The group of each position of each of the ``param_groups``; -1 for none.
        n_groups: N.
        with_rest: Whether the parameters of no group are laid out too, after the groups.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        group_of: Sequence[Sequence[int]],
        n_groups: int,
        with_rest: bool,
    ) -> None:
        self._params = [list(group["params"]) for group in param_groups]
        self._trainable = [list(map(REQUIRES_GRAD, params)) for params in self._params]
        members: list[list[Tensor]] = [[] for _ in range(n_groups + 1)]
        for params, of in zip(self._params, group_of, strict=True):
            for p, m in zip(params, of, strict=True):
                if p.requires_grad and p.device.type != "meta":
                    members[m].append(p)  # -1 is the last row
        self.members = members[:n_groups]
        self.home = next((p.device for p in chain.from_iterable(self.members)), torch.device("cpu"))
        self.rows = n_groups + with_rest
        self.buckets = in_buckets(members[: self.rows])

    def fits(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the optimizer still holds the same parameters, the same ones of them trainable."""
        if len(self._params) != len(param_groups):
            return False
        for known, trainable, group in zip(self._params, self._trainable, param_groups, strict=True):
            params = group["params"]
            if len(known) != len(params) or not all(map(is_, known, params)):
                return False
            if trainable != list(map(REQUIRES_GRAD, params)):
                return False
        return True

    @property
    def is_sharded(self) -> bool:
        """Whether some parameter is a DTensor."""
        return any(bucket.mesh is not None for bucket in self.buckets)

    @property
    def has_gradients(self) -> bool:
        """Whether some parameter has a gradient."""
        return any(p.grad is not None for bucket in self.buckets for p in chain.from_iterable(bucket.parameters))

    def gather(self) -> list[Gathered]:
        """The gradients that are there, bucket by bucket."""
        return [_gathered(bucket) for bucket in self.buckets]


def in_buckets(parameters: Sequence[Sequence[Tensor]]) -> list[Bucket]:
    """The parameters of each group sorted into buckets."""
    found: dict[Any, Bucket] = {}
    for group, members in enumerate(parameters):
        for p in members:
            key = (p.device, p.dtype, getattr(p, "device_mesh", None), getattr(p, "placements", None))
            if key not in found:
                found[key] = Bucket(p, len(parameters))
            found[key].parameters[group].append(p)
            found[key].large |= found[key].on_host and p.numel() > CPU_PART
    return list(found.values())


def _gathered(bucket: Bucket) -> Gathered:
    counts = [len(group) for group in bucket.parameters]
    write = [g for p in chain.from_iterable(bucket.parameters) if (g := p.grad) is not None]
    if len(write) < sum(counts):
        counts = [sum(p.grad is not None for p in group) for group in bucket.parameters]
    read = write
    if not bucket.plain or any(map(IS_SPARSE, write)):
        read = [_entries(reduced(t, bucket.placements)) for t in write]
        write = [_entries(t) for t in write]
    return Gathered(bucket, counts, read, write)


def copies(p: Any) -> int:
    """The ranks that hold the same shard of ``p``: in a sum over its whole mesh the shard is counted that often."""
    placements = getattr(p, "placements", ())  # of a DTensor
    return math.prod(p.device_mesh.size(i) for i, at in enumerate(placements) if at.is_replicate())


def by_group(tensors: Iterable[Tensor], counts: Iterable[int]) -> list[list[Tensor]]:
    """The tensors of each group, given how many there are of each."""
    left = iter(tensors)
    return [list(islice(left, count)) for count in counts]


def reduced(t: Any, placements: tuple[Any, ...]) -> Any:
    """``t`` with its repeated indices summed if it is sparse, and its partial sums over ranks if it is a DTensor."""
    if t.is_sparse:
        return t.coalesce()
    return t if getattr(t, "placements", ()) == placements else t.redistribute(placements=placements)


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    part: Tensor = getattr(t, "_local_tensor", t)
    return part


def _entries(t: Tensor) -> Tensor:
    """A plain real tensor with the local entries of ``t``; writing it writes ``t``."""
    t = local(t)
    t = t._values() if t.is_sparse else t
    return torch.view_as_real(t) if t.is_complex() else t


def on_host(device: torch.device) -> bool:
    """Whether reading a tensor of the device waits for nothing."""
    return device.type == "cpu"


def numbers(vector: Vector) -> list[float]:
    """The numbers of a vector as a list; a host read if it is on an accelerator."""
    if isinstance(vector, list):
        return vector
    found: list[float] = vector.tolist()
    return found


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
