"""Mean, variance, skewness, kurtosis and covariance of masked samples: the checks, the axes, the way for each size."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradbalance.statistics._central import Central, central_moments


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
    return standardise(_central(x, mask, dim=dim, order=order))



def _central(x, mask=None, *, dim=None, order=2, covariance=False, name="x"):
    _check(x, mask, order, name)
    reduced, kept, scalars = _axes(x, dim)
    if x.dim() == 1:
        x = x[:, None]
    elif scalars:
        mask = None if mask is None else mask[..., None].expand(x.shape)
        x = x[..., None]
    if kept:
        axes = kept + reduced
        x, mask = x.permute(*axes, -1), None if mask is None else mask.permute(axes)
    found = central_moments(x, mask, len(kept), order, covariance)
    if scalars:
        count, mean, powers, _ = found
        found = Central(count, mean.squeeze(-1), [power.squeeze(-1) for power in powers], None)
    return found


def standardise(central):
    count, mean, powers, _ = central
    if not powers:
        return Moments(count, mean.float(), None, None, None)
    variance = powers[0]
    mean = mean.to(variance.dtype)
    skewness = kurtosis = None
    if len(powers) > 1:
        spread = torch.where(without_spread(mean, variance), torch.inf, variance)
        skewness = powers[1] * spread.pow(-1.5)
        if len(powers) > 2:
            kurtosis = powers[2] * spread.pow(-2)
    return Moments(count, mean, variance, skewness, kurtosis)

def without_spread(mean, variance):
    limits = torch.finfo(mean.dtype)
    return variance <= (limits.eps * mean.detach()).square().clamp(min=math.sqrt(limits.tiny))

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
