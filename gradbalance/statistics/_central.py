"""Central moments in tensor operations: one set of formulas for every size and device."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a block on the CPU: what autograd keeps of it stays in the cache.
_BLOCK = 100_000


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
    if x.device.type == "cpu" and x.numel() > _BLOCK and not torch.compiler.is_compiling():
        size = (math.prod(x.shape[:kept]), math.prod(x.shape[kept:-1]))
        valid = None if mask is None else mask.reshape(size)
        found = _in_blocks(x.reshape(*size, x.shape[-1]), valid, order, covariance)
        return unflatten(found, x.shape[:kept], None if precise else dtype_of_sums(x))
    if kept:
        axes = [*range(kept, x.dim() - 1), *range(kept)]
        x = x.permute(*axes, -1)
        mask = None if mask is None else mask.permute(axes)
    return _formulas(x, mask, x.dim() - 1 - kept, order, covariance, precise)


def unflatten(central: Central, shape: torch.Size, dtype: torch.dtype | None) -> Central:
    """``shape`` for the first axis of every field, and the dtype, if any, for the mean."""
    if dtype is not None:
        central = Central(central.count, central.mean.to(dtype), *central[2:])
    return _join([central], lambda fields: fields[0].reshape((*shape, *fields[0].shape[1:])))


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
    powers: list[Tensor] = []
    for order in range(2, len(parts.powers) + 2):
        step = distance.to(parts.powers[0].dtype)
        moved = step
        for k in range(2, order + 1):
            moved = moved * step + math.comb(order, k) * parts.powers[k - 2]
        powers.append((weight.to(step.dtype) * moved).sum(0))
    covariance = None
    if parts.covariance is not None:
        between = distance.unsqueeze(-1) * distance.unsqueeze(-2)
        covariance = (weight.unsqueeze(-1) * (parts.covariance + between)).sum(0)
        covariance = covariance.to(parts.covariance.dtype)
    return Central(count, mean, powers, covariance)


def _join(parts: Sequence[Central], join: Callable[[tuple[Tensor, ...]], Tensor]) -> Central:
    """Each field of all parts, joined."""
    counts, means, powers, covariances = zip(*parts, strict=True)
    covariance = None if covariances[0] is None else join(covariances)
    return Central(
        join(counts), join(means), [join(power) for power in zip(*powers, strict=True)], covariance
    )


def dtype_of_sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in_blocks(x: Tensor, mask: Tensor | None, order: int, covariance: bool) -> Central:
    """Central moments of ``x [K, R, D]`` with a precise mean: of blocks of groups, or of rows.

    Each block is taken about its own mean, so that no far sample spoils the accuracy of others.
    """
    axis = 0 if len(x) > 1 else 1
    size = max(1, _BLOCK * x.shape[axis] // x.numel())
    blocks = torch.split(x, size, axis)
    masks = [None] * len(blocks) if mask is None else torch.split(mask, size, axis)
    parts = []
    for block, valid in zip(blocks, masks, strict=True):
        if axis == 0 and len(block) == 1 and block.numel() > _BLOCK and block.shape[1] > 1:
            parts.append(_in_blocks(block, valid, order, covariance))
            continue
        block = block.transpose(0, 1)
        valid = None if valid is None else valid.T
        if valid is not None and axis == 1 and has_values(valid):
            # Gathering the valid rows costs a fifth of blanking the others.
            block, valid = block.index_select(0, valid.squeeze(1).nonzero().squeeze(1)), None
        parts.append(_formulas(block, valid, 1, order, covariance, True))
    return _join(parts, torch.cat) if axis == 0 else merge(_join(parts, torch.stack))


def has_values(x: Tensor) -> bool:
    """Whether ``x`` has values in memory: not under `torch.func` transforms, nor a fake tensor."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def _formulas(
    x: Tensor, mask: Tensor | None, reduced: int, order: int, covariance: bool, precise: bool
) -> Central:
    """`central_moments` of ``x [*R, *S, D]``, where ``R`` has ``reduced`` axes.

    The mean of the deviations from the mean is what this one lost to rounding. It is a constant to
    autograd, since the gradient through the first mean is already the whole one.
    """
    axes = tuple(range(reduced))
    x = x.to(dtype_of_sums(x))
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
        deviation = torch.addcmul(deviation, weight, rest, value=-1)
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
