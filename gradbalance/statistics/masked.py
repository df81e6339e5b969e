"""Mean, variance, skewness and kurtosis of masked samples."""

import importlib
import math
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradbalance.statistics import _central
from gradbalance.statistics._central import Central


class Moments(NamedTuple):
    """What `moments` returns; ``S`` is the shape of ``x`` without the reduced axes.

    Attributes:
        count: Number of valid samples, int64, shape ``S`` without the feature axis.
        mean: Shape ``S`` like all that follow; float32, or float64 for float64 data.
        variance: Population variance (divided by the count); None below order 2.
        skewness: 0 where the variance is 0; None below order 3.
        kurtosis: Not the excess: 3 for a normal distribution. 0 where the variance is 0; None below
            order 4.

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
    x: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int | Sequence[int] | None = None,
    order: int = 2,
) -> Moments:
    """Masked mean, variance :math:`m_2`, skewness :math:`m_3/m_2^{3/2}` and kurtosis.

    The kurtosis is :math:`m_4/m_2^2`; :math:`m_k` is the mean of the k-th power of the deviation
    from the mean. All stay accurate far from the origin, but not where their fourth power leaves
    the range of float32. Works under `torch.compile` without a graph break, under `torch.func.vmap`
    and for second derivatives. On CUDA the environment variable ``GRADBALANCE_TRITON=1`` asks for
    fused kernels, which have been tested in Triton's interpreter alone.

    Args:
        x: Samples of any floating-point dtype. Half precision is accumulated in float32, and a
            gradient beyond the range of float16 is infinite, which `torch.amp.GradScaler` sees.
        mask: True where a sample counts; None counts all. What is masked may be NaN; a valid sample
            that is NaN or infinite makes all moments of its feature NaN.
        dim: Axes to reduce. Default: all but the last one, which holds the features.
        order: The highest moment wanted, 1 to 4.

    Shape:
        ``x`` is ``[..., D]``, ``mask`` is ``[...]``, the moments are ``x`` without the axes in
        ``dim``. ``[N]`` counts as ``[N, 1]``: N samples of one feature. Where nothing is valid
        every moment is 0.

    Raises:
        TypeError: ``x`` is not floating point or not dense, ``mask`` is not boolean, or ``dim`` or
            ``order`` is not made of integers.
        ValueError: A shape, an axis or the order is out of range, or ``mask`` is on another device.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [float("nan"), 7.0]])
        >>> result = moments(x, torch.tensor([True, True, False]), order=3)
        >>> result.mean.tolist(), result.variance.tolist(), result.skewness.tolist()
        ([2.0, 5.0], [1.0, 0.0], [0.0, 0.0])

    Reference:
        Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample variance": the second
        mean, and blocks that are merged; higher orders by binomial expansion.
    """
    highest = plain(order)
    if not isinstance(highest, int) or isinstance(highest, bool):
        raise TypeError(f"`order` must be an integer, 1 to 4. Got {order!r}. The default is 2.")
    if not 1 <= highest <= 4:
        raise ValueError(f"`order` must be 1, 2, 3 or 4. Got {order!r}. Nothing higher is offered.")
    return standardise(central_moments(x, mask, checked_dim(dim), highest))


def central_moments(
    x: Tensor,
    mask: Tensor | None,
    dim: int | tuple[int, ...] | None,
    order: int,
    covariance: bool = False,
    precise: bool = False,
    name: str = "x",
    mask_name: str = "mask",
) -> Central:
    """The central moments behind `moments`, checked; ``precise`` asks for the mean in float64."""
    _check(x, mask, name, mask_name)
    reduced = _reduced_axes(x, dim)
    last = x.dim() - 1
    scalars = last in reduced and last > 0
    if scalars and covariance:
        raise ValueError(
            f"`dim` must leave the last axis to the covariance. Got {dim!r}. Reduce samples alone."
        )
    if scalars and mask is not None:
        mask = mask.unsqueeze(-1).expand(x.shape)
    if scalars or last == 0:
        x = x.unsqueeze(-1)
    kept = [axis for axis in range(x.dim() - 1) if axis not in reduced]
    if kept:
        x = x.permute(*kept, *reduced, -1)
        mask = None if mask is None else mask.permute(*kept, *reduced)
    if not reduced:  # every number is the only sample of its feature
        x = x.unsqueeze(-2)
        mask = None if mask is None else mask.unsqueeze(-1)
    if x.device.type == "cuda" and not covariance and os.environ.get("GRADBALANCE_TRITON") == "1":
        central = _in_triton(x, mask, len(kept), order, precise)
    else:
        central = _central.central_moments(x, mask, len(kept), order, covariance, precise)
    if not scalars:
        return central
    powers = [power.squeeze(-1) for power in central.powers]
    return Central(central.count, central.mean.squeeze(-1), powers, None)


def _in_triton(x: Tensor, mask: Tensor | None, kept: int, order: int, precise: bool) -> Central:
    """`central_moments` by the kernels where they can, else by tensor operations."""
    groups, rows = math.prod(x.shape[:kept]), math.prod(x.shape[kept:-1])
    kernels = None
    if _central.has_values(x) and not torch.compiler.is_compiling():
        kernels = importlib.import_module("gradbalance.statistics._triton")
    if kernels is None or not kernels.can_index(groups, rows, x.shape[-1]):
        return _central.central_moments(x, mask, kept, order, False, precise)
    valid = None if mask is None else mask.reshape(groups, rows)
    found = kernels.central_moments(x.reshape(groups, rows, x.shape[-1]), valid, order)
    dtype = None if precise else _central.dtype_of_sums(x)
    return _central.unflatten(found, x.shape[:kept], dtype)


def standardise(central: Central) -> Moments:
    """Skewness and kurtosis out of central moments, 0 with a gradient of 0 without a spread."""
    mean = central.mean
    if not central.powers:
        return Moments(central.count, mean, None, None, None)
    variance = central.powers[0]
    mean = mean.to(variance.dtype)
    skewness = kurtosis = None
    if len(central.powers) > 1:
        # An infinite variance makes both 0, and lets NaN through, as a second `where` would not.
        spread = torch.where(without_spread(mean, variance), torch.inf, variance)
        skewness = central.powers[1] * spread.pow(-1.5)
        if len(central.powers) > 2:
            kurtosis = central.powers[2] * spread.pow(-2)
    return Moments(central.count, mean, variance, skewness, kurtosis)


def without_spread(mean: Tensor, variance: Tensor) -> Tensor:
    """Whether the variance counts as 0.

    It does below the rounding error of the mean, and where its square would leave the range of the
    dtype.
    """
    limits = torch.finfo(variance.dtype)
    rounding = (limits.eps * mean.detach()).square()
    return variance <= rounding.clamp(min=math.sqrt(limits.tiny))


def checked_dim(dim: object) -> int | tuple[int, ...] | None:
    """``dim`` in plain integers."""
    dim = plain(dim)
    if dim is None:
        return None
    axes = [plain(axis) for axis in dim] if isinstance(dim, Iterable) else [dim]
    found = []
    for axis in axes:
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise TypeError(
                f"`dim` must be an axis, a sequence of axes, or None. Got {dim!r}. "
                "Name each axis by an integer."
            )
        found.append(axis)
    return tuple(found) if isinstance(dim, Iterable) else found[0]


def plain(option: object) -> object:
    """The Python number in a numpy scalar, a 0-d array or a 0-d tensor; all else as it is."""
    if isinstance(option, (np.generic, np.ndarray, Tensor)) and option.ndim == 0:
        return option.item()
    return option


def _check(x: Tensor, mask: Tensor | None, name: str, mask_name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"`{name}` must be a floating-point tensor. Got {kind}. "
            "Convert it, for example with .float()."
        )
    if x.layout is not torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else x.layout
        raise TypeError(
            f"`{name}` must be a dense tensor. Got {found}. Pass x.values() for the moments of all "
            "samples, or pad it and give the mask."
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must have the shape [..., D], D >= 1. Got {list(x.shape)}. "
            "Add a feature axis."
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"`{mask_name}` must be a boolean tensor. Got {kind}. "
            "Write mask.bool(), or compare it with 0."
        )
    samples = x.shape[:-1] or x.shape
    if mask.shape != samples:
        raise ValueError(
            f"`{mask_name}` must hold one flag per sample, {list(samples)} for samples of shape "
            f"{list(x.shape)}. Got {list(mask.shape)}. "
            f"Leave out the axis of the features, and fit it to `{name}`."
        )
    check_device(mask_name, mask, x.device, name)


def check_device(name: str, x: Tensor, device: torch.device, other: str) -> None:
    """Check that a tensor is on the device of another one."""
    if x.device != device:
        raise ValueError(
            f"`{name}` must be on the device of `{other}`. Got {x.device} and {device}. "
            f"Move it there, with `.to({str(device)!r})`."
        )


def _reduced_axes(x: Tensor, dim: int | tuple[int, ...] | None) -> list[int]:
    """The reduced axes in order; for a tensor of one axis that one."""
    if dim is None:
        return list(range(x.dim() - 1)) or [0]
    axes = [dim] if isinstance(dim, int) else list(dim)
    size = x.dim()
    reduced = sorted({axis % size for axis in axes})
    if min(axes, default=0) < -size or max(axes, default=0) >= size or len(reduced) < len(axes):
        raise ValueError(
            f"`dim` must hold different axes from {-size} to {size - 1} for the shape "
            f"{list(x.shape)}. Got {dim!r}. Name each axis once."
        )
    return reduced
