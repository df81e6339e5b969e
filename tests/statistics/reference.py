"""Moments and the statistical loss straight from their definitions, in float64, one number at a time."""

import itertools
import math

import torch


def gamma(*shape, offset=0.0, seed=0):
    """Skewed float32 samples of variance 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator).square().sum(0) / 2**0.5 + offset


def moments(x, mask=None, dim=None):
    """Count, mean, variance, skewness and kurtosis as nested-loop float64 tensors."""
    x = x.detach().double()
    axes = range(x.dim() - 1) if dim is None else [dim] if isinstance(dim, int) else dim
    reduced = sorted(axis % x.dim() for axis in axes)
    valid = (
        torch.ones(x.shape, dtype=torch.bool) if mask is None else mask[..., None].expand(x.shape)
    )
    kept = [axis for axis in range(x.dim()) if axis not in reduced]
    shape = [x.shape[axis] for axis in kept]
    found = torch.zeros(5, *shape, dtype=torch.float64)
    for index in itertools.product(*map(range, shape)):
        where = [slice(None)] * x.dim()
        for axis, i in zip(kept, index, strict=True):
            where[axis] = i
        samples = [
            value
            for value, ok in zip(
                x[tuple(where)].flatten(), valid[tuple(where)].flatten(), strict=True
            )
            if ok
        ]
        found[(slice(None), *index)] = torch.tensor(
            _of_samples([value.item() for value in samples]), dtype=torch.float64
        )
    return found


def _of_samples(samples):
    if not samples:
        return [0.0] * 5
    n = len(samples)
    mean = math.fsum(samples) / n
    second, third, fourth = (
        math.fsum((value - mean) ** k for value in samples) / n for k in (2, 3, 4)
    )
    if second <= (torch.finfo(torch.float64).eps * mean) ** 2:
        return [n, mean, second, 0.0, 0.0]
    return [n, mean, second, third / second**1.5, fourth / second**2]


def covariance(x, mask=None):
    """Population covariance over all axes but the last."""
    rows = x.double()[mask] if mask is not None else x.double().flatten(0, -2)
    return sum(torch.outer(row - rows.mean(0), row - rows.mean(0)) for row in rows) / len(rows)


def scale(mean, variance, eps):
    """What the error of a mean is divided by: a feature without spread has an infinite scale."""
    rounding = torch.finfo(torch.float64).eps * mean.double()
    flat = variance.double() <= rounding.square()
    return torch.where(flat, torch.inf, variance.double() + eps)


def loss_of_pair(mean, variance, target, mask, *, mixture=False, normalise=False, eps=1e-6):
    """Half the squared error of the mean plus half that of the variance, averaged over the features."""
    total = 0.0
    for feature in range(mean.shape[-1]):
        m, v, t = (x.double()[..., feature][mask].tolist() for x in (mean, variance, target))
        if not m:
            continue
        actual_mean, actual_variance = _of_samples(t)[1:3]
        predicted_mean, spread = _of_samples(m)[1:3]
        predicted_variance = math.fsum(v) / len(v) + (spread if mixture else 0.0)
        unit = 1.0
        if normalise:
            unit = scale(
                *torch.tensor([actual_mean, actual_variance], dtype=torch.float64), eps
            ).item()
        total += 0.5 * (predicted_mean - actual_mean) ** 2 / unit
        total += 0.5 * (predicted_variance - actual_variance) ** 2 / unit**2
    return total / mean.shape[-1]
