"""Moments of the global batch: those of every rank, gathered in one message and merged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradbalance._moments.plain import recentre
from gradbalance._moments.statistics import Central


def gathered(central: Central, group: dist.ProcessGroup) -> Central:
    """``central``, its mean in two parts, of every rank: each field stacked along a new first axis."""
    fields = [field for field in (*central[:3], *central.powers, central.covariance) if field is not None]
    message = torch.cat([field.to(central.shift.dtype).flatten() for field in fields])
    replies = _AllGather.apply(message, group).split([field.numel() for field in fields], dim=1)  # type: ignore[no-untyped-call]
    count, shift, remainder, *powers = (
        reply.reshape(-1, *field.shape) for reply, field in zip(replies, fields, strict=True)
    )
    covariance = None if central.covariance is None else powers.pop()
    return Central(count, shift, remainder, powers, covariance)


def merge(parts: Central) -> Central:
    """The moments of the union of disjoint batches, exactly; every field of ``parts`` has their axis in front."""
    count = parts.count.sum(0)
    weight = parts.count.to(parts.shift.dtype) / count.clamp(min=1)
    weight = weight.reshape(weight.shape + (1,) * (parts.shift.dim() - weight.dim()))
    shift = (weight * parts.shift).sum(0)
    means = parts.shift - shift
    if parts.remainder is not None:
        means = means + parts.remainder
    remainder = (weight * means).sum(0)
    distance = means - remainder
    moved = recentre([distance * 0, *parts.powers], distance)
    covariance = None
    if parts.covariance is not None:
        between = distance[..., None] * distance[..., None, :]
        covariance = (weight[..., None] * (parts.covariance + between)).sum(0)
    return Central(count, shift, remainder, [(weight * power).sum(0) for power in moved], covariance)


class _AllGather(torch.autograd.Function):
    """A vector of each rank -> ``[ranks, n]``; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        replies = message.new_empty(group.size(), len(message))
        dist.all_gather(list(replies.unbind()), message, group=group)
        return replies

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None
