"""Central moments of few samples: the definition, with few operations, differentiated by autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements up to which this is faster than `one_pass`, whose calls then cost more than the memory traffic it spares:
# on the CPU the two meet at this size for four moments, and at twice the size for two.
LARGEST = 65_536


def suits(x: Tensor) -> bool:
    """Whether this is the better way for ``x``.

    Not where a compiler fuses the operations, and not in float16, where autograd's cast would let gradients overflow.
    """
    return x.numel() <= LARGEST and x.dtype != torch.float16 and not torch.compiler.is_compiling()


def central_moments(
    x: Tensor, mask: Tensor | None, reduced: int, order: int, covariance: bool
) -> tuple[Tensor, Tensor, None, list[Tensor], Tensor | None]:
    """The fields of `gradbalance._moments.statistics.Central` of ``x [*R, *S, D]`` over ``R``, its first axes.

    ``mask`` is ``[*R, *S]``. The mean is rounded, which adds the square of its rounding error to the variance: less
    than a millionth of it ten thousand standard deviations from the origin. Everything else is moved by that error, as
    by a constant: a gradient through the mean already holds the rest.
    """
    axes = tuple(range(reduced))
    if x.dtype != torch.float64:
        x = x.float()
    n: Tensor | int
    if mask is None:
        samples = math.prod(x.shape[:reduced])
        count, n = torch.full(x.shape[reduced:-1], samples, device=x.device), max(1, samples)
        mean = x.sum(axes) / n
        deviation = x - mean
    else:
        valid = mask[..., None]
        weight = valid.to(x.dtype)
        total = weight.sum(axes)
        count, n = total.squeeze(-1).long(), total.clamp_min_(1)
        x = torch.where(valid, x, 0)  # not a product, which would let NaN padding through
        mean = x.sum(axes) / n
        deviation = x - weight * mean
    raw: list[Tensor] = []
    power = deviation
    for _ in range(2, order + 1):
        power = power * deviation
        raw.append(power.sum(axes) / n)
    if order <= 2 and not covariance:
        return count, mean, None, raw, None
    rest = deviation.detach().sum(axes) / n
    powers = recentre([rest, *raw], -rest)
    for even in powers[::2]:
        even.detach().clamp_min_(0)  # rounding can leave it below 0 for equal samples
    if not covariance:
        return count, mean, None, powers, None
    rows = deviation.flatten(0, reduced - 1).movedim(0, -2)
    with torch.autocast(x.device.type, enabled=False):  # it would round the product to half precision
        products = rows.mT @ rows / (n[..., None] if isinstance(n, Tensor) else n)
    return count, mean, None, powers, products - rest[..., None] * rest[..., None, :]


def recentre(raw: Sequence[Tensor], distance: Tensor) -> list[Tensor]:
    """Moments of order 2, 3, ... of ``d + distance`` out of those of ``d`` of order 1, 2, 3, ...: binomial theorem."""
    moved = []
    for k in range(2, len(raw) + 1):
        value = torch.add(distance, raw[0], alpha=k)
        for j in range(2, k + 1):
            value = torch.addcmul(raw[j - 1] if j == k else math.comb(k, j) * raw[j - 1], value, distance)
        moved.append(value)
    return moved
