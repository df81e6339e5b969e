"""Moments of the global batch: those of every rank, gathered in one message and merged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradbalance.statistics._central import Central, merge


def over_ranks(central: Central, group: "dist.ProcessGroup") -> Central:
    """The moments of the batches of all ranks, out of those of this rank, with a precise mean."""
    fields = [central.count, central.mean, *central.powers]
    if central.covariance is not None:
        fields.append(central.covariance)
    message = torch.cat([field.to(central.mean.dtype).flatten() for field in fields])
    replies = _AllGather.apply(message, group)  # type: ignore[no-untyped-call]
    parts = []
    for field, reply in zip(fields, replies.split([f.numel() for f in fields], 1), strict=True):
        parts.append(reply.reshape(-1, *field.shape).to(field.dtype))
    covariance = None if central.covariance is None else parts.pop()
    return merge(Central(parts[0], parts[1], parts[2:], covariance))


class _AllGather(torch.autograd.Function):
    """A vector of each rank -> ``[ranks, n]``; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        replies = message.new_empty(group.size(), len(message))
        dist.all_gather(list(replies.unbind()), message, group=group)
        return replies

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None
