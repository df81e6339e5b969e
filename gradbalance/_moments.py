"""Mean, variance, skewness, kurtosis and covariance of masked samples, and the merging of batches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradbalance import _central_moments as kernel


class Moments(NamedTuple):
    """What `moments` returns; ``S`` is the shape of ``x`` without the reduced axes.

    Attributes:
        count: Number of valid samples, int64, shape ``S`` without the feature axis.
        mean: Shape ``S`` like all that follow; float32, or float64 for float64 data.
        variance: Population variance (divided by the count); None below order 2.
        skewness: 0 where the variance is 0; None below order 3.
        kurtosis: Not the excess: 3 for a normal distribution. 0 where the variance is 0; None below order 4.

    Example:
        >>> count, mean, variance, *_ = moments(torch.tensor([[1.0], [3.0]]))
        >>> count.item(), mean.item(), variance.item()
        (2, 2.0, 1.0)
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as the name says what it is
    mean: Tensor
    variance: Tensor | None
    skewness: Tensor | None
    kurtosis: Tensor | None


class Central(NamedTuple):
    """Moments about the mean, with the mean in two parts; ``S`` as in `Moments`.

    Attributes:
        count: Valid samples, shape ``S`` without the feature axis.
        shift: A constant near the mean, shape ``S``. Adding the rest to it would round away what is small beside it.
        powers: mean - shift, then the central moments of order 2, 3, ..., shape ``[order, *S]``.
        covariance: Population covariance of the features, shape ``[*S, D]``, or None.
    """

    count: Tensor  # type: ignore[assignment]
    shift: Tensor
    powers: Tensor
    covariance: Tensor | None = None


def moments(
    x: Tensor, mask: Tensor | None = None, *, dim: int | Sequence[int] | None = None, order: int = 2
) -> Moments:
    """Masked mean, variance :math:`m_2`, skewness :math:`m_3/m_2^{3/2}` and kurtosis :math:`m_4/m_2^2` of ``x``.

    Accurate far from the origin, since the sums are taken about a pilot mean, and cheap: on the CPU, and on CUDA with
    Triton, neither direction keeps a temporary of the size of ``x``, but for one copy where reduced axes lie between
    kept ones in memory. Works under `torch.compile` without a graph break, under `torch.func.vmap` and for second
    derivatives. Not for data whose fourth power leaves the range of float32.

    Args:
        x: Samples of any floating-point dtype. Half precision is accumulated in float32, and a gradient beyond the
            range of float16 becomes its largest number.
        mask: True where a sample counts; None counts all. What is masked may be NaN.
        dim: Axes to reduce. Default: all but the last one, which holds the features.
        order: The highest moment wanted, 1 to 4.

    Shape:
        ``x`` is ``[..., D]``, ``mask`` is ``[...]``, the moments are ``x`` without the axes in ``dim``. Where nothing
        is valid every moment is 0.

    Raises:
        TypeError: ``x`` is not floating point, or ``mask`` is not boolean.
        ValueError: A shape, an axis or the order is out of range.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [float("nan"), 7.0]])
        >>> result = moments(x, torch.tensor([True, True, False]), order=3)
        >>> result.mean.tolist(), result.variance.tolist(), result.skewness.tolist()
        ([2.0, 5.0], [1.0, 0.0], [0.0, 0.0])

    Reference:
        [R] Shifted sums and their merging: Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample
        variance"; higher orders by binomial expansion.
    """
    return standardise(central_moments(x, mask, dim=dim, order=order))


def central_moments(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int | Sequence[int] | None = None,
    order: int = 2,
    covariance: bool = False,
    name: str = "x",
) -> Central:
    """Central moments of ``x`` up to ``order``, the rest as in `moments`; ``name`` is what errors call ``x``."""
    _check(x, mask, order, name)
    reduced = _axes(x, dim)
    kept = [axis for axis in range(x.dim()) if axis not in reduced]
    scalars = not kept or kept[-1] < x.dim() - 1  # the features are reduced too: every number is a sample
    if scalars:
        if covariance:
            raise ValueError(f"`dim` must leave the last axis to the covariance. Got {dim!r}. Reduce samples alone.")
        mask = None if mask is None else mask[..., None].expand(x.shape)
        x = x[..., None]
    else:
        kept.pop()
    if kept:
        axes = kept + reduced
        x, mask = x.permute(*axes, -1), None if mask is None else mask.permute(axes)
    found = kernel.CentralMoments.apply(x.contiguous(), mask, len(kept), order, covariance)  # type: ignore[no-untyped-call]
    if scalars:
        found = found[0], found[1].squeeze(-1), found[2].squeeze(-1)
    return Central(*found)


def standardise(central: Central) -> Moments:
    """Skewness and kurtosis out of central moments, 0 with a gradient of 0 where the variance is 0.

    It counts as 0 below the rounding error of the mean, and where its square would leave the range of the dtype.
    """
    remainder, variance, skewness, kurtosis, *_ = [*central.powers.unbind(), None, None, None]
    mean = central.shift + remainder
    if skewness is not None:
        limits = torch.finfo(mean.dtype)
        varies = variance > (limits.eps * mean.detach()).square().clamp(min=math.sqrt(limits.tiny))
        scale = torch.where(varies, variance, 1).rsqrt()
        skewness = torch.where(varies, skewness * scale**3, 0)
        kurtosis = None if kurtosis is None else torch.where(varies, kurtosis * scale**4, 0)
    return Moments(central.count, mean, variance, skewness, kurtosis)


def merge(parts: Central) -> Central:
    """The moments of the union of disjoint batches, exactly; every field of ``parts`` has their axis in front."""
    count = parts.count.sum(0)
    weight = parts.count.to(parts.shift.dtype) / count.clamp(min=1)
    weight = weight.reshape(weight.shape + (1,) * (parts.shift.dim() - weight.dim()))
    shift = (weight * parts.shift).sum(0)
    means = parts.shift - shift + parts.powers[:, 0]
    remainder = (weight * means).sum(0)
    distance = means - remainder
    about = [distance * 0, *parts.powers[:, 1:].unbind(1)]
    powers = torch.stack([remainder, *((weight * power).sum(0) for power in kernel.recentre(about, distance))])
    covariance = None
    if parts.covariance is not None:
        between = distance[..., None] * distance[..., None, :]
        covariance = (weight[..., None] * (parts.covariance + between)).sum(0)
    return Central(count, shift, powers, covariance)


def _check(x: Tensor, mask: Tensor | None, order: int, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor. Got {kind}. Convert it, for example with .float().")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"`{name}` must have the shape [..., D], D >= 1. Got {list(x.shape)}. Add a feature axis.")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be boolean. Got {mask.dtype}. Write mask.bool(), or compare it with 0.")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(
            f"`mask` must have the shape of its samples without the last axis, {list(x.shape[:-1])} for samples of "
            f"shape {list(x.shape)}. Got {list(mask.shape)}. Give one flag per sample."
        )
    if order not in (1, 2, 3, 4):
        raise ValueError(f"`order` must be 1, 2, 3 or 4. Got {order!r}. Higher moments are not offered.")


def _axes(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """The reduced axes, sorted, none negative."""
    if dim is None:
        return list(range(x.dim() - 1))
    axes = [dim] if isinstance(dim, int) else list(dim)
    if any(not -x.dim() <= axis < x.dim() for axis in axes) or len({axis % x.dim() for axis in axes}) < len(axes):
        raise ValueError(
            f"`dim` must hold different axes from {-x.dim()} to {x.dim() - 1} for the shape {list(x.shape)}. "
            f"Got {dim!r}. Name each axis once."
        )
    return sorted(axis % x.dim() for axis in axes)
