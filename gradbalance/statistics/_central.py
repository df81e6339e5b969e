"""Central moments in tensor operations: one set of formulas for every size and device.

A small input is left to autograd, and so is what a compiler fuses. A large one goes through
`CentralMoments`, which applies the same formulas to blocks that stay in the cache, and keeps no
temporary of the size of the input.
"""

import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a block, so that its temporaries stay in a cache of 1 MiB. Below this size an autograd
# function costs more than the memory traffic that it spares.
_BLOCK = 65_536
# The kernel that merges takes 16 features a program, and a CUDA grid has at most 65,535 programs
# along its second axis.
_MOST_FEATURES = 16 * 65_535
# An index within a kernel has 32 bits; half of its range leaves room for what follows the last row.
_MOST_INDICES = 2**30


class Central(NamedTuple):
    """Moments about the mean; ``S`` is the shape of the kept axes.

    Attributes:
        count: Number of valid samples, int64, shape ``S``.
        mean: Shape ``[*S, D]``.
        powers: The central moments of order 2, 3, ..., each of shape ``[*S, D]``.
        covariance: Population covariance of the features, shape ``[*S, D, D]``, or None.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as the name says what it is
    mean: Tensor
    powers: Sequence[Tensor]
    covariance: Tensor | None


def central_moments(
    x: Tensor, mask: Tensor | None, kept: int, order: int, covariance: bool, precise: bool
) -> Central:
    """Central moments of ``x [*S, *R, D]`` over ``R``, where ``S`` has ``kept`` axes.

    ``mask`` is ``[*S, *R]``. Half precision is accumulated in float32. ``precise`` asks for the
    mean in float64, which `merge` needs.
    """
    if x.numel() <= _BLOCK or torch.compiler.is_compiling():
        reduced = x.dim() - 1 - kept
        if kept:
            axes = [*range(kept, x.dim() - 1), *range(kept)]
            x = x.permute(*axes, -1)
            mask = None if mask is None else mask.permute(axes)
        return _formulas(x, mask, reduced, order, covariance, precise)
    size = (*x.shape[:kept], math.prod(x.shape[kept:-1]))
    x = x.reshape(*size, x.shape[-1]).contiguous()
    mask = None if mask is None else mask.reshape(size)
    fields = CentralMoments.apply(x, mask, order, covariance)  # type: ignore[no-untyped-call]
    central = _named(fields, order)
    return central if precise else central._replace(mean=central.mean.to(_dtype_of_sums(x)))


def merge(parts: Central) -> Central:
    """The moments of the union of disjoint batches, whose axis comes first in every field.

    The binomial theorem moves the moments of each batch to the common mean. Means rounded to
    float32 would not do: where the data lie 1e4 standard deviations from the origin, they are a
    thousandth of one off.
    """
    count = parts.count.sum(0)
    weight = (parts.count.to(parts.mean.dtype) / count.clamp(min=1)).unsqueeze(-1)
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
        between = distance.unsqueeze(-1) * distance.unsqueeze(-2)
        covariance = (weight.unsqueeze(-1) * (parts.covariance + between)).sum(0)
        covariance = covariance.to(parts.covariance.dtype)
    return Central(count, mean, powers, covariance)


class CentralMoments(torch.autograd.Function):
    """Central moments of ``x [*S, R, D]`` over ``R``, as a flat tuple with a precise mean.

    About the mean, the moment of order k has the gradient ``k/n (d^(k-1) - m_(k-1))`` and the
    covariance ``d (G + G^T)/n``, where d is the deviation of a sample.
    """

    @staticmethod
    def forward(
        x: Tensor, mask: Tensor | None, order: int, covariance: bool
    ) -> tuple[Tensor, ...]:
        *shape, rows, features = x.shape
        samples = x.view(-1, rows, features)
        valid = None if mask is None else mask.reshape(-1, rows)
        kernels = None if covariance else _kernels(samples, order)
        if kernels is None:
            fields = _in_blocks(samples, valid, order, covariance)
        else:
            fields = kernels.forward(samples, valid, order)
        shaped = []
        for field in fields:
            shaped.append(field.reshape((*shape, *field.shape[1:])))
        return tuple(shaped)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, ctx.order, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(x, mask, *output[: ctx.order + 1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        x, mask, count, mean, *powers = ctx.saved_tensors
        rows, features = x.shape[-2:]
        samples = x.view(-1, rows, features)
        valid = None if mask is None else mask.reshape(-1, rows)
        n = count.clamp(min=1).reshape(-1, 1, 1)
        slopes = []
        for grad in grads[1 : ctx.order + 1]:
            slope = torch.zeros_like(mean) if grad is None else grad
            slopes.append(slope.to(_dtype_of_sums(x)).reshape(-1, 1, features) / n)
        for k in range(3, ctx.order + 1):
            slopes[0] = slopes[0] - k * slopes[k - 1] * powers[k - 3].reshape(-1, 1, features)
        mixing = None
        if len(grads) > ctx.order + 1 and grads[-1] is not None:
            mixing = grads[-1].reshape(-1, features, features)
            mixing = (mixing + mixing.mT) / n
        kernels = None
        if mixing is None and not torch.is_grad_enabled():
            kernels = _kernels(samples, ctx.order)
        mean = mean.reshape(-1, 1, features)
        if kernels is None:
            gradient = _gradient(samples, valid, mean, slopes, mixing)
        else:
            gradient = kernels.backward(samples, valid, mean, slopes)
        return gradient.reshape(x.shape), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, mask: Tensor | None, *options: int
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = []
        for tensor, axis in zip((x, mask), in_dims, strict=False):
            if tensor is None or axis is not None:
                batched.append(tensor if tensor is None else tensor.movedim(axis, 0))
            else:
                batched.append(tensor.expand(info.batch_size, *tensor.shape))
        samples, valid = batched
        fields = CentralMoments.apply(samples.contiguous(), valid, *options)  # type: ignore[no-untyped-call]
        return fields, (0,) * len(fields)


def _named(fields: Sequence[Tensor], order: int) -> Central:
    covariance = fields[order + 1] if len(fields) > order + 1 else None
    return Central(fields[0], fields[1], fields[2 : order + 1], covariance)


def _flat(central: Central) -> tuple[Tensor, ...]:
    count, mean, powers, covariance = central
    return (count, mean, *powers) if covariance is None else (count, mean, *powers, covariance)


def _dtype_of_sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernels(x: Tensor, order: int) -> ModuleType | None:
    """The Triton kernels, for a CUDA tensor within their range, where they are asked for."""
    if x.device.type != "cuda" or os.environ.get("GRADBALANCE_TRITON") != "1":
        return None
    groups, rows, features = x.shape
    indices = max(groups * rows, (order + 1) * groups * features)
    if features > _MOST_FEATURES or indices > _MOST_INDICES:
        return None
    return importlib.import_module("gradbalance.statistics._triton")


def _blocks(x: Tensor) -> list[list[tuple[slice, slice]]]:
    """Where to cut the groups and rows of ``x [K, R, D]``: a list for each run of groups."""
    groups, rows, features = x.shape
    if x.device.type != "cpu":
        return [[(slice(groups), slice(rows))]]
    row_step = max(1, _BLOCK // features)
    group_step = max(1, row_step // rows)
    runs = []
    for group in range(0, groups, group_step):
        run = []
        for row in range(0, rows, row_step):
            run.append((slice(group, group + group_step), slice(row, row + row_step)))
        runs.append(run)
    return runs


def _in_blocks(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> tuple[Tensor, ...]:
    """The fields of `Central` for ``x [K, R, D]`` and ``mask [K, R]``."""
    runs = []
    for run in _blocks(x):
        parts = []
        for cut in run:
            samples = x[cut].transpose(0, 1)
            valid = None if mask is None else mask[cut].T
            if valid is not None and valid.shape[1] == 1 and x.device.type == "cpu":
                # Gathering the valid rows costs a fifth of blanking the others.
                samples = samples.index_select(0, valid[:, 0].nonzero()[:, 0])
                valid = None
            parts.append(_flat(_formulas(samples, valid, 1, order, covariance, True)))
        whole = parts[0]
        if len(parts) > 1:
            stacked = [torch.stack(field) for field in zip(*parts, strict=True)]
            whole = _flat(merge(_named(stacked, order)))
        runs.append(whole)
    return tuple(torch.cat(field) for field in zip(*runs, strict=True))


def _formulas(
    x: Tensor, mask: Tensor | None, reduced: int, order: int, covariance: bool, precise: bool
) -> Central:
    """`central_moments` of ``x [*R, *S, D]``, where ``R`` has ``reduced`` axes.

    The mean of the deviations from the mean is what this one lost to rounding. It is a constant to
    autograd, since the gradient through the first mean is already the whole one.
    """
    axes = tuple(range(reduced))
    x = x.to(_dtype_of_sums(x))
    count: Tensor
    n: Tensor | int
    if mask is None:
        samples = math.prod(x.shape[:reduced])
        count = torch.full(x.shape[reduced:-1], samples, device=x.device)
        n = max(1, samples)
        mean = x.sum(axes) / n
        deviation = x - mean
        rest = deviation.detach().sum(axes) / n
        deviation.sub_(rest)
    else:
        valid = mask.unsqueeze(-1)
        weight = valid.to(x.dtype)
        count = mask.sum(axes)
        n = count.clamp(min=1).unsqueeze(-1).to(x.dtype)
        x = torch.where(valid, x, 0)  # a product would let NaN padding through
        mean = x.sum(axes) / n
        deviation = torch.addcmul(x, weight, mean, value=-1)
        rest = deviation.detach().sum(axes) / n
        deviation.addcmul_(weight, rest, value=-1)
    powers = []
    power = deviation
    for _ in range(2, order + 1):
        power = power * deviation
        powers.append(power.sum(axes) / n)
    products = None
    if covariance:
        rows = deviation.flatten(0, reduced - 1).movedim(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # it would round to half precision
            products = rows.mT @ rows / (n.unsqueeze(-1) if isinstance(n, Tensor) else n)
    if precise and x.device.type != "mps":  # which has no float64
        mean = mean.double()
    return Central(count, mean + rest, powers, products)


def _gradient(
    x: Tensor, mask: Tensor | None, mean: Tensor, slopes: list[Tensor], mixing: Tensor | None
) -> Tensor:
    """`_polynomial` of ``x [K, R, D]`` about the mean, in blocks, in the dtype of ``x``."""
    centre = mean.detach().to(slopes[0].dtype)
    rest = (mean - centre).to(centre.dtype)
    if torch.is_grad_enabled():
        return _polynomial(x, mask, centre, rest, slopes, mixing).to(x.dtype)
    gradient = None
    for run in _blocks(x):
        for groups, rows in run:
            value = _polynomial(
                x[groups, rows],
                None if mask is None else mask[groups, rows],
                centre[groups],
                rest[groups],
                [slope[groups] for slope in slopes],
                None if mixing is None else mixing[groups],
            )
            if gradient is None:
                gradient = value.new_empty(x.shape, dtype=x.dtype)  # under vmap, batched like it
            gradient[groups, rows] = value
    return torch.zeros_like(x) if gradient is None else gradient


def _polynomial(
    x: Tensor,
    mask: Tensor | None,
    centre: Tensor,
    rest: Tensor,
    slopes: list[Tensor],
    mixing: Tensor | None,
) -> Tensor:
    """``slopes_1 + 2 slopes_2 d + 3 slopes_3 d^2 + ... + d @ mixing`` by Horner's rule, masked."""
    deviation = (x - centre).sub_(rest)
    value = slopes[-1].expand_as(deviation)
    for k in reversed(range(1, len(slopes))):
        value = torch.addcmul(slopes[k - 1], deviation, value, value=(k + 1) / k)
    if mixing is not None:
        value = value + deviation @ mixing
    return value if mask is None else torch.where(mask.unsqueeze(-1), value, 0)
