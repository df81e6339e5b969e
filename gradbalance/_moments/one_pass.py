"""Central moments of ``[K, R, D]`` over ``R``: one pass over the data forward, one backward."""

import functools
import importlib
import inspect
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradbalance._moments.plain import recentre

# Elements of a block on the CPU: its temporaries stay in a cache of 1 MiB and are small beside a large input.
_BLOCK = 100_000
# Rows of the pilot sample: its mean lies within a fraction of a standard deviation of the true one.
_PILOT = 32


class CentralMoments(torch.autograd.Function):
    """``(x, mask, kept, order, covariance)`` -> ``(count [*S], shift [*S, D], powers [order, *S, D])``.

    ``x [*S, *R, D]`` is contiguous, ``mask`` is ``[*S, *R]`` or None, and ``S`` has ``kept`` axes. With ``covariance``
    also ``[*S, D, D]``. The fields are those of `gradbalance._moments.statistics.Central`.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, kept: int, order: int, covariance: bool) -> tuple[Tensor, ...]:
        rows, valid = _flat(x, mask, kept)
        fused = None if covariance else _fused(x)
        found = fused.forward(rows, valid, order) if fused else _by_groups(rows, valid, order, covariance)
        count, shift, powers, *products = found
        shape, features = x.shape[:kept], x.shape[-1]
        fields = count.view(shape), shift.view(*shape, features), powers.view(order, *shape, features)
        return *fields, *(product.view(*shape, features, features) for product in products)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kept = inputs[2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[:2])
        ctx.save_for_backward(*inputs[:2], *output[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        x, mask, count, shift, powers = ctx.saved_tensors
        rows, valid = _flat(x, mask, ctx.kept)
        size = len(rows), 1, x.shape[-1]
        grad = torch.zeros_like(powers) if grads[2] is None else grads[2]
        products = [product.reshape(len(rows), *x.shape[-1:] * 2) for product in grads[3:] if product is not None]
        count, shift = count.view(size[0]), shift.view(size)
        powers, grad = (tensor.reshape(len(powers), *size) for tensor in (powers, grad))
        again = torch.is_grad_enabled()
        if not products and not again and (fused := _fused(x)):
            gradient = fused.backward(rows, valid, count, shift, powers, grad)
        else:
            gradient = _gradient(rows, valid, shift, *_slopes(grad, products, count, powers), again)
        return gradient.view(x.shape), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, mask: Tensor | None, kept: int, *rest: Any) -> Any:
        def batched(tensor: Tensor, axis: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)

        samples, valid = batched(x, in_dims[0]).contiguous(), None if mask is None else batched(mask, in_dims[1])
        found = CentralMoments.apply(samples, valid, kept + 1, *rest)  # type: ignore[no-untyped-call]
        return found, (0, 0, 1, 0)[: len(found)]


# `apply` asks for it at every call, and working it out takes as long as several operations on a small tensor.
CentralMoments.forward.__signature__ = inspect.signature(CentralMoments.forward)  # type: ignore[attr-defined]


def _flat(x: Tensor, mask: Tensor | None, kept: int) -> tuple[Tensor, Tensor | None]:
    """``x`` as ``[K, R, D]``, ``mask`` as ``[K, R]``."""
    *axes, features = x.shape
    size = math.prod(axes[:kept]), math.prod(axes[kept:])
    return x.view(*size, features), None if mask is None else mask.reshape(size)


def _fused(x: Tensor) -> ModuleType | None:
    """The Triton kernels, for a CUDA tensor and whoever asks for them: they have never run on a GPU."""
    if not x.is_cuda or torch.compiler.is_compiling() or os.environ.get("GRADBALANCE_TRITON") != "1":
        return None
    return importlib.import_module("gradbalance._moments.triton_kernel")


def _in_blocks(x: Tensor) -> bool:
    """Whether each operation walks through memory by itself, so that it had better walk through a cache."""
    return x.is_cpu and not torch.compiler.is_compiling()


def _by_groups(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> tuple[Tensor, ...]:
    """Count ``[K]``, shift ``[K, 1, D]`` and powers ``[order, K, 1, D]``; with ``covariance`` also ``[K, D, D]``."""
    if not _in_blocks(x) or x.numel() <= _BLOCK or len(x) == 1:
        return _reduced(x, mask, order, covariance)
    groups = max(1, _BLOCK // x[0].numel())
    masks = itertools.repeat(None) if mask is None else torch.split(mask, groups)
    parts = (_reduced(*part, order, covariance) for part in zip(torch.split(x, groups), masks, strict=False))
    count, shift, powers, *products = zip(*parts, strict=True)
    return torch.cat(count), torch.cat(shift), torch.cat(powers, 1), *map(torch.cat, products)


def _reduced(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> tuple[Tensor, ...]:
    """`_by_groups` of one block of groups; a single group may be long, and is then cut into blocks of rows."""
    blocks: Iterable[Tensor] = (x,)
    pilot, samples = x, x.shape[1]
    if _in_blocks(x) and len(x) == 1:
        if mask is None:
            blocks = x.chunk(1 + x.numel() // _BLOCK, 1)
        else:  # gathering the valid rows costs a quarter of blanking the others
            valid = mask.view(-1).nonzero().view(-1)
            mask, samples = None, valid.shape[0]
            pilot = x.index_select(1, valid[:: max(1, samples // _PILOT)])
            blocks = (x.index_select(1, part) for part in valid.chunk(1 + samples * x.shape[-1] // _BLOCK))
    shift = _pilot_mean(pilot, mask)
    parts = (_power_sums(block, mask, shift, order, covariance) for block in blocks)
    sums = functools.reduce(lambda totals, part: [a.add_(b) for a, b in zip(totals, part, strict=True)], parts)
    count = torch.full(x.shape[:1], samples, device=x.device) if mask is None else mask.sum(1)
    n = max(1, samples) if mask is None else count.clamp(min=1).view(-1, 1, 1)
    raw = [total / n for total in sums]
    products = [raw.pop() - raw[0].mT * raw[0]] if covariance else []
    centred = recentre(raw, -raw[0])
    for even in centred[::2]:
        even.clamp_(min=0)  # rounding can leave it below 0 for equal samples
    return count, shift, torch.stack([raw[0], *centred]), *products


def _pilot_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of a few dozen valid rows, ``[K, 1, D]``, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        rows = x[:, :: max(1, x.shape[1] // _PILOT)]
        return rows.sum(1, keepdim=True, dtype=dtype) / max(1, rows.shape[1])
    valid, index = mask.byte().topk(min(_PILOT, x.shape[1]), dim=1)
    rows = torch.where(valid[..., None] > 0, x.take_along_dim(index[..., None], dim=1), 0)
    return rows.sum(1, keepdim=True, dtype=dtype) / valid.sum(1).clamp(min=1).view(-1, 1, 1)


def _power_sums(x: Tensor, mask: Tensor | None, shift: Tensor, order: int, covariance: bool) -> list[Tensor]:
    """Over the rows of ``x - shift``: the sum of each power, ``[K, 1, D]``, and that of the products, ``[K, D, D]``."""
    deviation = x - shift
    if mask is not None:  # not a product, which would let NaN padding through
        deviation = torch.where(mask[..., None], deviation, 0)
    products = []
    if covariance:
        with torch.autocast(x.device.type, enabled=False):  # it would round the product to half precision
            products = [deviation.mT @ deviation]
    power, sums = deviation, [deviation.sum(1, keepdim=True)]
    for k in range(2, order + 1):
        power = power * deviation if k < order else deviation.mul_(power)  # in place, to fit the cache
        sums.append(power.sum(1, keepdim=True))
    return sums + products


def _slopes(
    grad: Tensor, products: Sequence[Tensor], count: Tensor, powers: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """The gradient as a polynomial in ``x - shift``: coefficients ``[K, 1, D]``, and a matrix ``[K, D, D]`` or None.

    About the mean, the moment of order k contributes ``k/n (d^(k-1) - m_(k-1))`` and the covariance
    ``d (G + G^T)/n``; a Taylor shift leads from there to ``shift``.
    """
    remainder, n = powers[0], count.clamp(min=1).view(-1, 1, 1)
    slopes = [slope if k == 1 else k * slope for k, slope in enumerate((grad / n).unbind(), 1)]
    for k in range(2, len(slopes)):
        slopes[0] = slopes[0] - slopes[k] * powers[k - 1]
    for i in range(len(slopes) - 1):
        for j in reversed(range(i, len(slopes) - 1)):
            slopes[j] = torch.addcmul(slopes[j], remainder, slopes[j + 1], value=-1)
    if not products:
        return slopes, None
    mixing = (products[0] + products[0].mT) / n
    slopes[0] = slopes[0] - remainder @ mixing
    return slopes, mixing


def _gradient(
    x: Tensor, mask: Tensor | None, shift: Tensor, slopes: list[Tensor], mixing: Tensor | None, again: bool
) -> Tensor:
    """`_polynomial` of all of ``x``, 0 where masked; ``again`` if it is to be differentiated in turn."""
    if again or not _in_blocks(x) or x.numel() <= _BLOCK:
        gradient = _polynomial(x, shift, slopes, mixing)
        return gradient if mask is None else torch.where(mask[..., None], gradient, 0)
    gradient = torch.empty_like(x)
    rows = max(1, _BLOCK // x.shape[-1])
    groups = max(1, rows // x.shape[1])
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
    return gradient


def _polynomial(
    x: Tensor, shift: Tensor, slopes: Sequence[Tensor], mixing: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``sum_j slopes_j (x - shift)^j + (x - shift) @ mixing`` by Horner's rule, in the dtype of ``x``.

    Spares a copy by writing to ``out`` where it can: then the result is ``out``.
    """
    saturates = x.dtype == torch.float16  # as its cast would make a large gradient an infinite one
    direct = out if mixing is None and not saturates else None
    deviation = x - shift
    value = slopes[-1] if len(slopes) > 1 else slopes[0].expand_as(x)
    for j in reversed(range(len(slopes) - 1)):
        value = torch.addcmul(slopes[j], deviation, value, out=None if j else direct)
    if mixing is not None:
        value = value + deviation @ mixing
    if saturates:
        value = value.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
    return value.to(x.dtype)
