"""Central moments of ``[K, R, D]`` over ``R``: one pass over the data forward, one backward."""

import functools
import importlib.util
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Elements of a block on the CPU: its temporaries stay in a cache of 1 MiB and are small beside a large input.
_BLOCK = 100_000
# Rows of the pilot sample: its mean lies within a fraction of a standard deviation of the true one.
_PILOT = 32


class CentralMoments(torch.autograd.Function):
    """``(x [K, R, D], mask [K, R], order, covariance)`` -> ``(count [K], shift [K, D], powers [order, K, D])``.

    With ``covariance`` also ``[K, D, D]``. The fields are those of `gradbalance._moments.Central`.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> tuple[Tensor, ...]:
        if not covariance and (fused := _fused(x)):
            return tuple(fused.forward(x, mask, order))
        if not _in_blocks(x):
            return _reduced(x, mask, order, covariance)
        groups = max(1, _BLOCK // max(1, x[:1].numel()))
        starts = range(0, max(1, len(x)), groups)
        masks = [None if mask is None else mask[k : k + groups] for k in starts]
        parts = [_reduced(x[k : k + groups], valid, order, covariance) for k, valid in zip(starts, masks, strict=True)]
        if len(parts) == 1:
            return parts[0]
        count, shift, powers, *rest = zip(*parts, strict=True)
        return torch.cat(count), torch.cat(shift), torch.cat(powers, 1), *map(torch.cat, rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[:2])
        ctx.save_for_backward(*inputs[:2], *output[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, mask, count, shift, powers = ctx.saved_tensors
        if len(grads) == 3 and not torch.is_grad_enabled() and (fused := _fused(x)):
            return fused.backward(x, mask, count, shift, powers, grads[2]), None, None, None
        slopes, mixing = _slopes(grads[2:], count, powers)
        if torch.is_grad_enabled() or not _in_blocks(x):
            gradient = _polynomial(x, shift, slopes, mixing)
            return gradient if mask is None else torch.where(mask[..., None], gradient, 0), None, None, None
        gradient = torch.empty_like(x)
        rows = max(1, _BLOCK // x.shape[-1])
        groups = max(1, rows // max(1, x.shape[1]))
        for k in range(0, len(x), groups):
            part = slice(k, k + groups)
            curve, mixed = [slope[part] for slope in slopes], None if mixing is None else mixing[part]
            for r in range(0, x.shape[1], rows):
                place = gradient[part, r : r + rows]
                value = _polynomial(x[part, r : r + rows], shift[part], curve, mixed, out=place)
                if value is not place:
                    place.copy_(value)
        if mask is not None:
            padding = (~mask).flatten().nonzero()[:, 0]
            gradient.view(-1, x.shape[-1]).index_fill_(0, padding, 0)
        return gradient, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, mask: Tensor | None, *options: Any) -> Any:
        def folded(tensor: Tensor, axis: int | None) -> Tensor:
            batched = tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            return batched.flatten(0, 1).contiguous()

        valid = None if mask is None else folded(mask, in_dims[1])
        found = CentralMoments.apply(folded(x, in_dims[0]), valid, *options)  # type: ignore[no-untyped-call]
        axes = (0, 0, 1, 0)[: len(found)]
        size = (info.batch_size, -1)
        return tuple(field.unflatten(axis, size) for field, axis in zip(found, axes, strict=True)), axes


def _fused(x: Tensor) -> ModuleType | None:
    """The Triton kernels, for a CUDA tensor; a compiler had better fuse the plain operations itself."""
    return _triton() if x.is_cuda and not torch.compiler.is_compiling() else None


@functools.cache
def _triton() -> ModuleType | None:
    return importlib.import_module("gradbalance._triton_moments") if importlib.util.find_spec("triton") else None


def _in_blocks(x: Tensor) -> bool:
    """Whether each operation walks through memory by itself, so that it had better walk through a cache."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _reduced(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> tuple[Tensor, ...]:
    """`CentralMoments` of one block of groups; a single group may be long, and is then cut into blocks of rows."""
    pilot = x, mask
    blocks: Iterable[tuple[Tensor, Tensor | None]] = [(x, mask)]
    if len(x) == 1 and _in_blocks(x):
        rows = max(1, _BLOCK // x.shape[-1])
        if mask is None:
            blocks = ((part, None) for part in torch.split(x, rows, 1))
        else:  # gathering the valid rows costs a quarter of blanking the others
            valid = mask[0].nonzero()[:, 0]
            pilot = x.index_select(1, valid[:: max(1, len(valid) // _PILOT)]), None
            blocks = ((x.index_select(1, part), None) for part in torch.split(valid, rows))
    shift = _pilot_mean(*pilot)
    sums: list[Any] = [0, 0]
    for block in blocks:
        sums = [total + part for total, part in zip(sums, _power_sums(*block, shift, order, covariance), strict=False)]
    count = torch.full(x.shape[:1], x.shape[1], device=x.device) if mask is None else mask.sum(1)
    n = count.clamp(min=1)[:, None]
    raw = (sums[0] / n).unbind()
    powers = torch.stack([raw[0], *recentre(raw, -raw[0])])
    powers[1::2].clamp_(min=0)  # rounding can leave an even moment of equal samples below 0
    if not covariance:
        return count, shift, powers
    return count, shift, powers, sums[1] / n[..., None] - raw[0][..., None] * raw[0][..., None, :]


def _pilot_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of a few dozen valid rows, ``[K, D]``, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        rows = x[:, :: max(1, x.shape[1] // _PILOT)]
        return rows.sum(1, dtype=dtype) / max(1, rows.shape[1])
    valid, index = mask.byte().topk(min(_PILOT, x.shape[1]), dim=1)
    rows = torch.where(valid[..., None] > 0, x.take_along_dim(index[..., None], dim=1), 0)
    return rows.sum(1, dtype=dtype) / valid.sum(1).clamp(min=1)[:, None]


def _power_sums(x: Tensor, mask: Tensor | None, shift: Tensor, order: int, covariance: bool) -> list[Tensor]:
    """Over the rows of ``x - shift``: sums of powers, ``[order, K, D]``, and those of products, ``[K, D, D]``."""
    deviation = x - shift[:, None]
    if mask is not None:  # not a product, which would let NaN padding through
        deviation = torch.where(mask[..., None], deviation, 0)
    products = []
    if covariance:
        with torch.autocast(x.device.type, enabled=False):  # it would round the product to half precision
            products = [deviation.mT @ deviation]
    power, sums = deviation, [deviation.sum(1)]
    for k in range(2, order + 1):
        power = power * deviation if k < order else deviation.mul_(power)  # in place, to fit the cache
        sums.append(power.sum(1))
    return [torch.stack(sums), *products]


def recentre(raw: Sequence[Tensor], distance: Tensor) -> list[Tensor]:
    """Moments of order 2, 3, ... of ``d + distance`` out of those of ``d`` of order 1, 2, 3, ...: binomial theorem."""
    moved = []
    for k in range(2, len(raw) + 1):
        value = torch.add(distance, raw[0], alpha=k)
        for j in range(2, k + 1):
            value = torch.addcmul(raw[j - 1] if j == k else math.comb(k, j) * raw[j - 1], value, distance)
        moved.append(value)
    return moved


def _slopes(grads: Sequence[Tensor], count: Tensor, powers: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The gradient as a polynomial in ``x - shift``: coefficients ``[K, D]``, and a matrix ``[K, D, D]`` or None.

    About the mean, the moment of order k contributes ``k/n (d^(k-1) - m_(k-1))`` and the covariance
    ``d (G + G^T)/n``; a Taylor shift leads from there to ``shift``.
    """
    remainder, n = powers[0], count.clamp(min=1)[:, None]
    slopes = [k * slope for k, slope in enumerate((grads[0] / n).unbind(), 1)]
    for k in range(2, len(slopes)):
        slopes[0] = slopes[0] - slopes[k] * powers[k - 1]
    for i in range(len(slopes) - 1):
        for j in reversed(range(i, len(slopes) - 1)):
            slopes[j] = slopes[j] - remainder * slopes[j + 1]
    if len(grads) == 1:
        return slopes, None
    mixing = (grads[1] + grads[1].mT) / n[..., None]
    slopes[0] = slopes[0] - (remainder[:, None] @ mixing)[:, 0]
    return slopes, mixing


def _polynomial(
    x: Tensor, shift: Tensor, slopes: Sequence[Tensor], mixing: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``sum_j slopes_j (x - shift)^j + (x - shift) @ mixing`` by Horner's rule, in the dtype of ``x``.

    Spares a copy by writing to ``out`` where it can: then the result is ``out``.
    """
    saturates = x.dtype == torch.float16  # as its cast would make a large gradient an infinite one
    direct = out if mixing is None and not saturates else None
    deviation = x - shift[:, None]
    value = slopes[-1][:, None].expand_as(x)
    for j in reversed(range(len(slopes) - 1)):
        value = torch.addcmul(slopes[j][:, None], deviation, value, out=None if j else direct)
    if mixing is not None:
        value = value + deviation @ mixing
    if saturates:
        value = value.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
    return value.to(x.dtype)
