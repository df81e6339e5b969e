"""Mean, variance, skewness, kurtosis and covariance of masked samples: the checks, the axes, the way for each size."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradbalance._moments import plain
from gradbalance._moments.one_pass import CentralMoments


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
    """Moments about the mean; ``S`` as in `Moments`.

    Attributes:
        count: Valid samples, shape ``S`` without the feature axis.
        shift: The mean, shape ``S``; or, with a remainder, a constant near it.
        remainder: mean - shift, shape ``S``: adding it to the shift would round away what is small beside that.
        powers: The central moments of order 2, 3, ..., each of shape ``S``.
        covariance: Population covariance of the features, shape ``[*S, D]``, or None.
    """

    count: Tensor  # type: ignore[assignment]
    shift: Tensor
    remainder: Tensor | None
    powers: Sequence[Tensor]
    covariance: Tensor | None


def moments(
    x: Tensor, mask: Tensor | None = None, *, dim: int | Sequence[int] | None = None, order: int = 2
) -> Moments:
    """Masked mean, variance :math:`m_2`, skewness :math:`m_3/m_2^{3/2}` and kurtosis :math:`m_4/m_2^2` of ``x``.

    Accurate far from the origin, since the sums are taken about a mean, and cheap: few operations where ``x`` is small;
    where it is large, on the CPU, neither direction keeps a temporary of its size, but for one copy where reduced axes
    lie between kept ones in memory. Works under `torch.compile` without a graph break, under `torch.func.vmap` and for
    second derivatives. Not for data whose fourth power leaves the range of float32. On CUDA the environment variable
    ``GRADBALANCE_TRITON=1`` asks for kernels that save the memory there too, tested in Triton's interpreter alone.

    Args:
        x: Samples of any floating-point dtype. Half precision is accumulated in float32, and a gradient beyond the
            range of float16 becomes its largest number.
        mask: True where a sample counts; None counts all. What is masked may be NaN.
        dim: Axes to reduce. Default: all but the last one, which holds the features.
        order: The highest moment wanted, 1 to 4.

    Shape:
        ``x`` is ``[..., D]``, ``mask`` is ``[...]``, the moments are ``x`` without the axes in ``dim``. ``[N]`` counts
        as ``[N, 1]``: N samples of one feature. Where nothing is valid every moment is 0.

    Raises:
        TypeError: ``x`` is not floating point or not dense, or ``mask`` is not boolean.
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
    in_two_parts: bool = False,
    name: str = "x",
) -> Central:
    """Central moments of ``x`` up to ``order``, the rest as in `moments`.

    ``in_two_parts`` asks for the mean as shift and remainder; ``name`` is what errors call ``x``.
    """
    _check(x, mask, order, name)
    reduced, kept, scalars = _axes(x, dim)
    if x.dim() == 1:
        x = x[:, None]
    elif scalars:
        if covariance:
            raise ValueError(f"`dim` must leave the last axis to the covariance. Got {dim!r}. Reduce samples alone.")
        mask = None if mask is None else mask[..., None].expand(x.shape)
        x = x[..., None]
    small = bool(reduced) and not in_two_parts and plain.suits(x)
    if kept:
        axes = reduced + kept if small else kept + reduced
        x, mask = x.permute(*axes, -1), None if mask is None else mask.permute(axes)
    if small:
        found = Central(*plain.central_moments(x, mask, len(reduced), order, covariance))
    else:
        fields = CentralMoments.apply(x.contiguous(), mask, len(kept), order, covariance)  # type: ignore[no-untyped-call]
        count, shift, (remainder, *powers), *products = fields
        found = Central(count, shift, remainder, powers, products[0] if products else None)
    if scalars:
        count, shift, remainder, powers, _ = found
        remainder = None if remainder is None else remainder.squeeze(-1)
        found = Central(count, shift.squeeze(-1), remainder, [power.squeeze(-1) for power in powers], None)
    return found


def standardise(central: Central) -> Moments:
    """Skewness and kurtosis out of central moments, 0 with a gradient of 0 where the variance is 0.

    It counts as 0 below the rounding error of the mean, and where its square would leave the range of the dtype.
    """
    variance, skewness, kurtosis, *_ = (*central.powers, None, None, None)
    mean = central.shift if central.remainder is None else central.shift + central.remainder
    if skewness is not None:
        limits = torch.finfo(mean.dtype)
        varies = variance > (limits.eps * mean.detach()).square().clamp(min=math.sqrt(limits.tiny))
        scale = torch.where(varies, variance, 1).rsqrt()
        skewness = torch.where(varies, skewness * scale**3, 0)
        kurtosis = None if kurtosis is None else torch.where(varies, kurtosis * scale**4, 0)
    return Moments(central.count, mean, variance, skewness, kurtosis)


def _check(x: Tensor, mask: Tensor | None, order: int, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor. Got {kind}. Convert it, for example with .float().")
    if x.layout is not torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else x.layout
        raise TypeError(
            f"`{name}` must be a dense tensor. Got {found}. Pass x.values() for the moments of all samples, or pad it "
            "and give the mask."
        )
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"`{name}` must have the shape [..., D], D >= 1. Got {list(x.shape)}. Add a feature axis.")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"`mask` must be a boolean tensor. Got {kind}. Write mask.bool(), or compare it with 0.")
        samples = shape[:-1] or shape
        if mask.shape != samples:
            raise ValueError(
                f"`mask` must hold one flag per sample, {list(samples)} for samples of shape {list(x.shape)}. "
                f"Got {list(mask.shape)}. Leave out the axis of the features."
            )
    if order not in (1, 2, 3, 4):
        raise ValueError(f"`order` must be 1, 2, 3 or 4. Got {order!r}. Higher moments are not offered.")


def _axes(x: Tensor, dim: int | Sequence[int] | None) -> tuple[list[int], list[int], bool]:
    """The reduced axes; the kept ones but for that of the features; whether even that is reduced.

    Then every number is a sample. A tensor of one axis has another one for its feature, which is kept.
    """
    last = x.dim() - 1
    if dim is None:
        return list(range(last)) or [0], [], False
    axes = [dim] if isinstance(dim, int) else list(dim)
    if any(not -x.dim() <= axis < x.dim() for axis in axes) or len({axis % x.dim() for axis in axes}) < len(axes):
        raise ValueError(
            f"`dim` must hold different axes from {-x.dim()} to {x.dim() - 1} for the shape {list(x.shape)}. "
            f"Got {dim!r}. Name each axis once."
        )
    reduced = sorted(axis % x.dim() for axis in axes)
    kept = [axis for axis in range(last + 1) if axis not in reduced and (axis < last or last == 0)]
    return reduced, kept, last in reduced and last > 0
