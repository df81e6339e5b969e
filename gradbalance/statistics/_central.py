"""Central moments in tensor operations, one implementation for every size and device.

They are taken in two passes, about the mean of the samples. A large input on the CPU is cut into
blocks that stay in the cache, each about its own mean, and the moments of the blocks are merged.
"""

import importlib
import inspect
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a block: its temporaries stay in a cache of 1 MiB.
_BLOCK = 100_000
# The kernel that merges takes 16 features a program, and a CUDA grid has at most 65,535 programs
# along its second axis.
_MOST_FEATURES = 16 * 65_535
# An index within a kernel has 32 bits; half of its range leaves room for what follows the last row.
_MOST_INDICES = 2**30


class Central(NamedTuple):
    """Moments about the mean; ``S`` is the shape of the kept axes.

    Attributes:
        count: Number of valid samples, int64, shape ``S``.
        mean: Shape ``[*S, D]``, in float64 where the device has it: at 1e4 standard deviations from
            the origin, rounding it to float32 would move it by a thousandth of one.
        powers: The central moments of order 2, 3, ..., each of shape ``[*S, D]``.
        covariance: Population covariance of the features, shape ``[*S, D, D]``, or None.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as the name says what it is
    mean: Tensor
    powers: Sequence[Tensor]
    covariance: Tensor | None


def central_moments(
    x: Tensor, mask: Tensor | None, kept: int, order: int, covariance: bool
) -> Central:
    """Central moments of ``x [*S, *R, D]`` over ``R``, where ``S`` has ``kept`` axes.

    ``mask`` has the shape ``[*S, *R]``. Half precision is accumulated in float32.
    """
    fields = CentralMoments.apply(x.contiguous(), mask, kept, order, covariance)  # type: ignore[no-untyped-call]
    return from_fields(fields, order)


def from_fields(fields: Sequence[Tensor], order: int) -> Central:
    """The flat sequence of the fields, as an autograd function has to return them, by name."""
    covariance = fields[order + 1] if len(fields) > order + 1 else None
    return Central(fields[0], fields[1], fields[2 : order + 1], covariance)


def merge(parts: Central) -> Central:
    """The moments of the union of disjoint batches, whose axis comes first in every field.

    The central moments of each batch are moved to the common mean by the binomial theorem.
    """
    count = parts.count.sum(0)
    weight = (parts.count.to(parts.mean.dtype) / count.clamp(min=1))[..., None]
    mean = (weight * parts.mean).sum(0)
    distance = parts.mean - mean
    powers = []
    for order in range(2, len(parts.powers) + 2):
        dtype = parts.powers[0].dtype
        step = distance.to(dtype)
        moved = step
        for k in range(2, order + 1):
            moved = moved * step + math.comb(order, k) * parts.powers[k - 2]
        powers.append((weight.to(dtype) * moved).sum(0))
    covariance = None
    if parts.covariance is not None:
        between = distance[..., None] * distance[..., None, :]
        covariance = (weight[..., None] * (parts.covariance + between)).sum(0)
        covariance = covariance.to(parts.covariance.dtype)
    return Central(count, mean, powers, covariance)


class CentralMoments(torch.autograd.Function):
    """`central_moments` with a backward pass that needs the samples, and no temporary, once more.

    About the mean, the moment of order k has the gradient ``k/n (d^(k-1) - m_(k-1))``, and the
    covariance ``d (G + G^T)/n``, where d is the deviation of a sample.
    """

    @staticmethod
    def forward(
        x: Tensor, mask: Tensor | None, kept: int, order: int, covariance: bool
    ) -> tuple[Tensor, ...]:
        shape, features = x.shape[:kept], x.shape[-1]
        rows, valid = _flat(x, mask, kept)
        kernels = None if covariance else _kernels(rows, order)
        if kernels is None:
            count, *fields = _reduce(rows, valid, order, covariance)
        else:
            count, *fields = kernels.forward(rows, valid, order)
        shaped = [count.view(shape)]
        for field in fields:
            shaped.append(field.view(*shape, *field.shape[1:]))
        return tuple(shaped)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, ctx.kept, ctx.order, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(x, mask, *output[: ctx.order + 1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        x, mask, count, mean, *powers = ctx.saved_tensors
        rows, valid = _flat(x, mask, ctx.kept)
        groups, _, features = rows.shape
        size = (groups, 1, features)
        dtype = _dtype(x)
        slopes = []
        for grad in grads[1 : ctx.order + 1]:
            if grad is None:
                grad = torch.zeros_like(mean, dtype=dtype)
            slopes.append(grad.to(dtype).reshape(size))
        central = Central(count.view(groups, 1, 1), mean.view(size), [p.view(size) for p in powers], None)
        mixing = grads[-1] if len(grads) > ctx.order + 1 else None
        if mixing is not None:
            mixing = mixing.reshape(groups, features, features)
        kernels = None
        if mixing is None and not torch.is_grad_enabled():
            kernels = _kernels(rows, ctx.order)
        if kernels is None:
            gradient = _gradient(rows, valid, central, slopes, mixing)
        else:
            gradient = kernels.backward(rows, valid, central, slopes)
        return gradient.view(x.shape), None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        mask: Tensor | None,
        kept: int,
        *options: int,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def batched(tensor: Tensor, axis: int | None) -> Tensor:
            if axis is None:
                return tensor.expand(info.batch_size, *tensor.shape)
            return tensor.movedim(axis, 0)

        samples = batched(x, in_dims[0]).contiguous()
        valid = None if mask is None else batched(mask, in_dims[1])
        fields = CentralMoments.apply(samples, valid, kept + 1, *options)  # type: ignore[no-untyped-call]
        return fields, (0,) * len(fields)


# `apply` asks for it at every call, and working it out takes as long as several operations on a
# small tensor.
CentralMoments.forward.__signature__ = inspect.signature(CentralMoments.forward)  # type: ignore[attr-defined]


def _flat(x: Tensor, mask: Tensor | None, kept: int) -> tuple[Tensor, Tensor | None]:
    """``x`` as ``[K, R, D]`` and ``mask`` as ``[K, R]``."""
    *axes, features = x.shape
    size = (math.prod(axes[:kept]), math.prod(axes[kept:]))
    return x.view(*size, features), None if mask is None else mask.reshape(size)


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype of the sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernels(x: Tensor, order: int) -> ModuleType | None:
    """The Triton kernels, for a CUDA tensor within their range, and where they are asked for."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    groups, rows, features = x.shape
    indices = max(groups * rows, (order + 1) * groups * features)
    if features > _MOST_FEATURES or indices > _MOST_INDICES:
        return None
    if os.environ.get("GRADBALANCE_TRITON") != "1":
        return None
    return importlib.import_module("gradbalance.statistics._triton")


def _eager_on_cpu(x: Tensor) -> bool:
    """Whether each operation walks through memory by itself."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _blocks(x: Tensor) -> list[list[tuple[slice, slice]]]:
    """Slices of groups and rows of ``x [K, R, D]``: a list for each block of groups."""
    groups, rows, features = x.shape
    rows_at_once = max(1, _BLOCK // features)
    groups_at_once = max(1, rows_at_once // rows)
    blocks = []
    for group in range(0, groups, groups_at_once):
        block = []
        for row in range(0, rows, rows_at_once):
            block.append((slice(group, group + groups_at_once), slice(row, row + rows_at_once)))
        blocks.append(block)
    return blocks


def _reduce(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> list[Tensor]:
    """The fields of `Central`, for ``x [K, R, D]``."""
    if x.numel() <= _BLOCK or not _eager_on_cpu(x):
        return _reduce_block(x, mask, order, covariance)
    found = []
    for block in _blocks(x):
        parts = []
        for cut in block:
            valid = None if mask is None else mask[cut]
            parts.append(_reduce_block(x[cut], valid, order, covariance))
        if len(parts) > 1:
            stacked = [torch.stack(field) for field in zip(*parts, strict=True)]
            count, mean, powers, products = merge(from_fields(stacked, order))
            parts = [[count, mean, *powers]]
            if products is not None:
                parts[0].append(products)
        found += parts
    return [torch.cat(field) for field in zip(*found, strict=True)]


def _reduce_block(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> list[Tensor]:
    """`_reduce`, with temporaries of the size of ``x``."""
    if mask is not None and len(x) == 1 and _eager_on_cpu(x):
        # Gathering the valid rows is cheaper than blanking the others.
        x = x.index_select(1, mask[0].nonzero()[:, 0])
        mask = None
    x = x.to(_dtype(x))
    if mask is None:
        samples = x.shape[1]
        count = torch.full(x.shape[:1], samples, device=x.device)
        n = max(1, samples)
        mean = x.sum(1) / n
        deviation = x - mean[:, None]
        rest = deviation.sum(1) / n
        deviation -= rest[:, None]
    else:
        valid = mask[..., None]
        weight = valid.to(x.dtype)
        count = mask.sum(1)
        n = count.clamp(min=1)[:, None]
        x = torch.where(valid, x, 0)  # not a product, which would let NaN padding through
        mean = x.sum(1) / n
        deviation = torch.addcmul(x, weight, mean[:, None], value=-1)
        rest = deviation.sum(1) / n
        deviation.addcmul_(weight, rest[:, None], value=-1)
    fine = torch.float32 if x.device.type == "mps" else torch.float64
    fields = [count, mean.to(fine) + rest]
    products = []
    if covariance:
        with torch.autocast(x.device.type, enabled=False):  # it would round to half precision
            products.append(deviation.mT @ (deviation / (n if mask is None else n[..., None])))
    power = deviation
    for k in range(2, order + 1):
        # The last product in place: a block has to fit the cache.
        power = power * deviation if k < order else deviation.mul_(power)
        fields.append(power.sum(1) / n)
    return fields + products


def _gradient(
    x: Tensor, mask: Tensor | None, central: Central, grads: list[Tensor], mixing: Tensor | None
) -> Tensor:
    """The gradient for ``x [K, R, D]``.

    ``grads`` are the gradients of the mean and the powers, ``mixing`` that of the covariance.
    """
    count, mean, powers, _ = central
    n = count.clamp(min=1)
    slopes = [grad / n for grad in grads]
    for k in range(2, len(slopes)):
        slopes[0] = torch.addcmul(slopes[0], slopes[k], powers[k - 2], value=-(k + 1))
    vectors = [slopes]
    if mixing is not None:
        mixing = (mixing + mixing.mT) / n
    centre = mean.detach().to(_dtype(x))
    rest = (mean - centre).to(_dtype(x))
    if x.numel() <= _BLOCK or not _eager_on_cpu(x) or torch.is_grad_enabled():
        return _gradient_block(x, mask, centre, rest, slopes, mixing).to(x.dtype)
    gradient = torch.empty_like(x)
    for block in _blocks(x):
        for cut in block:
            valid = None if mask is None else mask[cut]
            mixed = None if mixing is None else mixing[cut[0]]
            curve = [slope[cut[0]] for slope in slopes]
            gradient[cut] = _gradient_block(x[cut], valid, centre[cut[0]], rest[cut[0]], curve, mixed)
    return gradient


def _gradient_block(x, mask, centre, rest, slopes, mixing):
    """``slopes_1 + 2 d slopes_2 + 3 d^2 slopes_3 + ... + d @ mixing`` by Horner's rule."""
    index = None
    samples = x
    if mask is not None and len(x) == 1 and _eager_on_cpu(x):
        index = mask[0].nonzero()[:, 0]
        samples = x.index_select(1, index)
    deviation = samples - centre - rest
    value = slopes[-1]
    for k in reversed(range(1, len(slopes))):
        value = torch.addcmul(slopes[k - 1], deviation, value, value=(k + 1) / k)
    if mixing is not None:
        value = value + deviation @ mixing
    value = value.expand_as(samples)
    if index is not None:
        return torch.zeros_like(x, dtype=value.dtype).index_copy_(1, index, value)
    if mask is not None:
        return torch.where(mask[..., None], value, 0)
    return value
