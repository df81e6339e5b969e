# Triton has no types, and its kernels take none.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
"""Central moments on CUDA: one read of the data forward, one read and one write backward.

Only with ``GRADBALANCE_TRITON=1``: see `gradbalance.moments`. All four orders are computed, since
the time is that of reading the data.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradbalance.statistics import _central
from gradbalance.statistics._central import Central

# Elements of a tile, and the most columns it may have.
_TILE = 2048
_COLUMNS = 128
# Enough programs to fill a large device, and few enough shares of the rows for one to merge.
_PROGRAMS = 1024
_PARTS = 256
# Features of each program that merges; there are at most 65,535 along the second axis of a grid.
_MERGED = 16


def can_index(groups: int, rows: int, features: int) -> bool:
    """Whether the kernels can, with 32 bits; half of their range leaves room after the last row."""
    indices = max(groups * rows, 5 * groups * features)
    return features <= 65_535 * _MERGED and indices <= 2**30


def central_moments(x: Tensor, mask: Tensor | None, order: int) -> Central:
    """Central moments of ``x [K, R, D]`` over ``R``, with ``mask [K, R]`` and a precise mean."""
    fields = _CentralMoments.apply(x.contiguous(), mask, order)  # type: ignore[no-untyped-call]
    count, mean, *powers = fields
    return Central(count, mean, powers, None)


class _CentralMoments(torch.autograd.Function):
    """Count, mean and the central moments of order 2, 3 and 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, order: int) -> tuple[Tensor, ...]:
        groups, rows, features = x.shape
        tile, columns = _tile(features)
        across = triton.cdiv(features, columns)
        tiles = max(1, triton.cdiv(rows, tile))
        parts = min(tiles, _PARTS, max(1, _PROGRAMS // max(1, groups * across)))
        wide = _central.dtype_of_sums(x)
        counts = x.new_empty(groups, parts, dtype=torch.int64)
        sums = x.new_empty(5, groups, parts, features, dtype=wide)
        count = x.new_empty(groups, dtype=torch.int64)
        mean = x.new_empty(groups, features, dtype=torch.float64)
        powers = x.new_empty(3, groups, features, dtype=wide)
        if groups:
            with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
                _sum_parts[groups * parts, across](
                    x, _flags(x, mask), counts, sums, rows, features, groups, parts,
                    triton.cdiv(tiles, parts), mask is not None, tile, columns,
                )  # fmt: skip
                _merge_parts[groups, triton.cdiv(features, _MERGED)](
                    counts, sums, count, mean, powers, parts, features, groups,
                    triton.next_power_of_2(parts), _MERGED,
                )  # fmt: skip
        ctx.order = order
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, mask, count, mean, powers)
        return count, mean, *powers[: order - 1].clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, mask, count, mean, powers = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which the kernels have not
            found = _central.central_moments(x, mask, 1, ctx.order, False, True)
            outputs = (found.mean, *found.powers)
            return *torch.autograd.grad(outputs, x, grads, create_graph=True), None, None
        groups, rows, features = x.shape
        tile, columns = _tile(features)
        tiles = triton.cdiv(rows, tile)
        gradient = torch.empty_like(x)
        grad = torch.stack([grad.to(powers.dtype) for grad in grads])
        if x.numel():
            with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
                _gradient[groups * tiles, triton.cdiv(features, columns)](
                    x, _flags(x, mask), count, mean, powers, grad, gradient, rows, features,
                    groups, tiles, mask is not None, ctx.order, tile, columns,
                )  # fmt: skip
        return gradient, None, None


def _tile(features: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(_COLUMNS, triton.next_power_of_2(features))
    return _TILE // columns, columns


def _flags(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as bytes; without one, any pointer that is never read."""
    return x if mask is None else mask.contiguous().view(torch.uint8)


@triton.jit
def _valid(mask, group, row, rows, MASKED: tl.constexpr):
    valid = row < rows
    if MASKED:
        valid = valid & (tl.load(mask + group * rows + row, valid, 0) != 0)
    return valid


@triton.jit
def _sum_parts(
    x, mask, counts, sums, rows, features, groups, parts, tiles,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Power sums of one share of the rows, about the mean of its first tile with a valid row."""
    group, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = column < features
    wide = sums.dtype.element_ty
    first = part * tiles
    row = first * ROWS + tl.arange(0, ROWS)
    found = tl.sum(_valid(mask, group, row, rows, MASKED).to(tl.int64), 0)
    while (found == 0) & (first < part * tiles + tiles - 1):
        first += 1
        row += ROWS
        found = tl.sum(_valid(mask, group, row, rows, MASKED).to(tl.int64), 0)
    where = _valid(mask, group, row, rows, MASKED)[:, None] & present[None, :]
    place = x + (group * rows + row[:, None]) * features + column[None, :]
    shift = tl.sum(tl.load(place, where, 0).to(wide), 0) / tl.maximum(found, 1).to(wide)

    # Sums per row of a tile: adding up its rows only once, at the end, spares the loop every
    # exchange between threads.
    n = tl.zeros((ROWS,), tl.int64)
    s1 = tl.zeros((ROWS, COLUMNS), wide)
    s2 = tl.zeros((ROWS, COLUMNS), wide)
    s3 = tl.zeros((ROWS, COLUMNS), wide)
    s4 = tl.zeros((ROWS, COLUMNS), wide)
    for tile in range(first, part * tiles + tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        valid = _valid(mask, group, row, rows, MASKED)
        where = valid[:, None] & present[None, :]
        place = x + (group * rows + row[:, None]) * features + column[None, :]
        deviation = tl.where(where, tl.load(place, where, 0).to(wide) - shift[None, :], 0)
        n += valid.to(tl.int64)
        s1 += deviation
        square = deviation * deviation
        s2 += square
        s3 += square * deviation
        s4 += square * square
    tl.store(counts + group * parts + part, tl.sum(n, 0))
    out = sums + (group * parts + part) * features + column
    step = groups * parts * features
    tl.store(out, shift, present)
    tl.store(out + step, tl.sum(s1, 0), present)
    tl.store(out + 2 * step, tl.sum(s2, 0), present)
    tl.store(out + 3 * step, tl.sum(s3, 0), present)
    tl.store(out + 4 * step, tl.sum(s4, 0), present)


@triton.jit
def _merge_parts(
    counts, sums, count, mean, powers, parts, features, groups,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments about the common mean out of the sums of all shares, by the binomial theorem."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = column < features
    part = tl.arange(0, PARTS)
    wide = sums.dtype.element_ty
    number = tl.load(counts + group * parts + part, part < parts, 0)
    total = tl.sum(number, 0)
    scale = 1 / tl.maximum(total, 1).to(tl.float64)
    weight = (number.to(tl.float64) * scale)[:, None]
    where = (part < parts)[:, None] & present[None, :]
    source = sums + (group * parts + part[:, None]) * features + column[None, :]
    step = groups * parts * features
    near = tl.load(source, where, 0).to(tl.float64)
    s1 = tl.load(source + step, where, 0).to(tl.float64) * scale
    common = tl.sum(weight * near + s1, 0)
    common += common - common  # NaN where it is infinite, wherever in the data that comes from
    t = (near - common[None, :]).to(wide)
    s1, weight, scale = s1.to(wide), weight.to(wide), scale.to(wide)
    out = group * features + column
    tl.store(count + group, total)
    tl.store(mean + out, common, present)
    s2 = tl.load(source + 2 * step, where, 0) * scale
    s3 = tl.load(source + 3 * step, where, 0) * scale
    s4 = tl.load(source + 4 * step, where, 0) * scale
    m2 = tl.sum(s2 + t * (2 * s1 + t * weight), 0)
    m3 = tl.sum(s3 + t * (3 * s2 + t * (3 * s1 + t * weight)), 0)
    m4 = tl.sum(s4 + t * (4 * s3 + t * (6 * s2 + t * (4 * s1 + t * weight))), 0)
    m2 = tl.maximum(m2, 0, propagate_nan=tl.PropagateNan.ALL)
    m4 = tl.maximum(m4, 0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(powers + out, m2, present)
    tl.store(powers + groups * features + out, m3, present)
    tl.store(powers + 2 * groups * features + out, m4, present)


@triton.jit
def _gradient(
    x, mask, count, mean, powers, grad, gradient, rows, features, groups, tiles,
    MASKED: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The moment of order k contributes ``k/n (d^(k-1) - m_(k-1))``, by Horner's rule."""
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    present = column < features
    inside = (row < rows)[:, None] & present[None, :]
    where = _valid(mask, group, row, rows, MASKED)[:, None] & present[None, :]
    place = (group * rows + row[:, None]) * features + column[None, :]
    here, step = group * features + column, groups * features
    wide = powers.dtype.element_ty
    scale = 1 / tl.maximum(tl.load(count + group), 1).to(wide)
    centre = tl.load(mean + here, present, 0)
    near = centre.to(wide)
    rest = (centre - near.to(tl.float64)).to(wide)
    deviation = tl.load(x + place, where, 0).to(wide) - near[None, :] - rest[None, :]
    constant = tl.load(grad + here, present, 0)
    value = tl.zeros((ROWS, COLUMNS), wide)
    if ORDER >= 4:
        g4 = 4 * tl.load(grad + 3 * step + here, present, 0)
        value = deviation * g4[None, :]
        constant -= g4 * tl.load(powers + step + here, present, 0)
    if ORDER >= 3:
        g3 = 3 * tl.load(grad + 2 * step + here, present, 0)
        value = deviation * (value + g3[None, :])
        constant -= g3 * tl.load(powers + here, present, 0)
    if ORDER >= 2:
        value = deviation * (value + 2 * tl.load(grad + step + here, present, 0)[None, :])
    value = scale * (value + constant[None, :])
    tl.store(gradient + place, tl.where(where, value, 0).to(gradient.dtype.element_ty), inside)
