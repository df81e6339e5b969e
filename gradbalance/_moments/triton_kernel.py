# Triton has no types, and its kernels take none.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
"""Central moments on CUDA: one read of the data forward, one read and one write backward; three launches in all.

Only with ``GRADBALANCE_TRITON=1``: see `gradbalance.moments`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, and the most columns it may have.
_TILE = 2048
_COLUMNS = 128
# Enough programs to fill a large device, and few enough shares of the rows for one program to merge.
_PROGRAMS = 1024
_PARTS = 256


def forward(x: Tensor, mask: Tensor | None, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count ``[K]``, shift ``[K, D]`` and powers ``[order, K, D]`` of ``x [K, R, D]``, as `CentralMoments` has them."""
    groups, rows, features = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    tile, columns = _tile(features)
    across = triton.cdiv(features, columns)
    tiles = max(1, triton.cdiv(rows, tile))
    parts = min(tiles, _PARTS, max(1, _PROGRAMS // max(1, groups * across)))
    counts = x.new_empty(groups, parts, dtype=torch.int64)
    partial = x.new_empty(order + 1, groups, parts, features, dtype=wide)
    count = x.new_empty(groups, dtype=torch.int64)
    shift = x.new_empty(groups, features, dtype=wide)
    powers = x.new_empty(order, groups, features, dtype=wide)
    if groups:
        _sum_parts[groups * parts, across](
            x, _flags(x, mask), counts, partial, rows, features, groups, parts, triton.cdiv(tiles, parts),
            mask is not None, order, tile, columns,
        )  # fmt: skip
        _merge_parts[groups, triton.cdiv(features, 16)](
            counts, partial, count, shift, powers, parts, features, groups, order, triton.next_power_of_2(parts), 16
        )
    return count, shift, powers


def backward(x: Tensor, mask: Tensor | None, count: Tensor, shift: Tensor, powers: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to ``x`` for the gradient of ``powers``."""
    groups, rows, features = x.shape
    tile, columns = _tile(features)
    tiles = triton.cdiv(rows, tile)
    gradient = torch.empty_like(x)
    if x.numel():
        _gradient[groups * tiles, triton.cdiv(features, columns)](
            x, _flags(x, mask), count, shift, powers, grad.contiguous(), gradient, rows, features, groups, tiles,
            torch.finfo(x.dtype).max if x.dtype == torch.float16 else 0.0, mask is not None, len(powers), tile, columns,
        )  # fmt: skip
    return gradient


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
    x, mask, counts, partial, rows, features, groups, parts, tiles,
    MASKED: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Power sums of one share of the rows about the mean of its first tile that holds a valid row."""
    group, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = column < features
    wide = partial.dtype.element_ty
    first = part * tiles
    row = first * ROWS + tl.arange(0, ROWS)
    found = tl.sum(_valid(mask, group, row, rows, MASKED).to(tl.int64), 0)
    while (found == 0) & (first < part * tiles + tiles - 1):
        first += 1
        row += ROWS
        found = tl.sum(_valid(mask, group, row, rows, MASKED).to(tl.int64), 0)
    where = _valid(mask, group, row, rows, MASKED)[:, None] & present[None, :]
    value = tl.load(x + (group * rows + row[:, None]) * features + column[None, :], where, 0).to(wide)
    shift = tl.sum(value, 0) / tl.maximum(found, 1).to(wide)

    # Sums per row of a tile: adding up its rows only once, at the end, spares the loop every exchange between threads.
    n = tl.zeros((ROWS,), tl.int64)
    s1 = tl.zeros((ROWS, COLUMNS), wide)
    s2 = tl.zeros((ROWS, COLUMNS), wide)
    s3 = tl.zeros((ROWS, COLUMNS), wide)
    s4 = tl.zeros((ROWS, COLUMNS), wide)
    for tile in range(first, part * tiles + tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        valid = _valid(mask, group, row, rows, MASKED)
        where = valid[:, None] & present[None, :]
        value = tl.load(x + (group * rows + row[:, None]) * features + column[None, :], where, 0).to(wide)
        deviation = tl.where(where, value - shift[None, :], 0)
        n += valid.to(tl.int64)
        s1 += deviation
        if ORDER >= 2:
            square = deviation * deviation
            s2 += square
            if ORDER >= 3:
                s3 += square * deviation
                if ORDER >= 4:
                    s4 += square * square
    tl.store(counts + group * parts + part, tl.sum(n, 0))
    out = partial + (group * parts + part) * features + column
    step = groups * parts * features
    tl.store(out, shift, present)
    tl.store(out + step, tl.sum(s1, 0), present)
    if ORDER >= 2:
        tl.store(out + 2 * step, tl.sum(s2, 0), present)
    if ORDER >= 3:
        tl.store(out + 3 * step, tl.sum(s3, 0), present)
    if ORDER >= 4:
        tl.store(out + 4 * step, tl.sum(s4, 0), present)


@triton.jit
def _merge_parts(
    counts, partial, count, shift, powers, parts, features, groups,
    ORDER: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments about the common mean out of the sums of all shares, by the binomial theorem."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = column < features
    part = tl.arange(0, PARTS)
    wide = partial.dtype.element_ty
    number = tl.load(counts + group * parts + part, part < parts, 0)
    total = tl.sum(number, 0)
    weight = (number.to(wide) / tl.maximum(total, 1).to(wide))[:, None]
    where = (part < parts)[:, None] & present[None, :]
    source = partial + (group * parts + part[:, None]) * features + column[None, :]
    step = groups * parts * features
    scale = 1 / tl.maximum(total, 1).to(wide)
    near = tl.load(source, where, 0)
    s1 = tl.load(source + step, where, 0) * scale
    common = tl.sum(weight * near, 0)
    remainder = tl.sum(weight * (near - common[None, :]) + s1, 0)
    t = near - common[None, :] - remainder[None, :]
    out = group * features + column
    tl.store(count + group, total)
    tl.store(shift + out, common, present)
    tl.store(powers + out, remainder, present)
    if ORDER >= 2:
        s2 = tl.load(source + 2 * step, where, 0) * scale
        m2 = tl.sum(s2 + t * (2 * s1 + t * weight), 0)
        tl.store(powers + groups * features + out, tl.maximum(m2, 0), present)
        if ORDER >= 3:
            s3 = tl.load(source + 3 * step, where, 0) * scale
            m3 = tl.sum(s3 + t * (3 * s2 + t * (3 * s1 + t * weight)), 0)
            tl.store(powers + 2 * groups * features + out, m3, present)
            if ORDER >= 4:
                s4 = tl.load(source + 4 * step, where, 0) * scale
                m4 = tl.sum(s4 + t * (4 * s3 + t * (6 * s2 + t * (4 * s1 + t * weight))), 0)
                tl.store(powers + 3 * groups * features + out, tl.maximum(m4, 0), present)


@triton.jit
def _gradient(
    x, mask, count, shift, powers, grad, gradient, rows, features, groups, tiles,
    LARGEST: tl.constexpr, MASKED: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
    near = tl.load(shift + here, present, 0)
    wide = near.dtype
    scale = 1 / tl.maximum(tl.load(count + group), 1).to(wide)
    deviation = tl.load(x + place, where, 0).to(wide) - near[None, :] - tl.load(powers + here, present, 0)[None, :]
    constant = tl.load(grad + here, present, 0)
    value = tl.zeros((ROWS, COLUMNS), wide)
    if ORDER >= 4:
        g4 = 4 * tl.load(grad + 3 * step + here, present, 0)
        value = deviation * g4[None, :]
        constant -= g4 * tl.load(powers + 2 * step + here, present, 0)
    if ORDER >= 3:
        g3 = 3 * tl.load(grad + 2 * step + here, present, 0)
        value = deviation * (value + g3[None, :])
        constant -= g3 * tl.load(powers + step + here, present, 0)
    if ORDER >= 2:
        value = deviation * (value + 2 * tl.load(grad + step + here, present, 0)[None, :])
    value = scale * (value + constant[None, :])
    if LARGEST > 0:  # the cast would make a large gradient an infinite one
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    tl.store(gradient + place, tl.where(where, value, 0).to(gradient.dtype.element_ty), inside)
