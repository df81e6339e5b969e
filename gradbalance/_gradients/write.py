"""What is written into the gradients: factors, clipping and noise."""

from collections.abc import Iterable, Sequence
from itertools import chain, compress, repeat
from typing import Any

import torch
from torch import Tensor

from gradbalance._gradients.layout import Gathered, by_group


def scale_(gathered: Iterable[Gathered], factors: Tensor) -> None:
    """Multiply the gradients of each group by its factor, in place, without a host read of a device tensor.

    Args:
        gathered: The gradients, see :meth:`Layout.gather`.
        factors: Shape ``[G]``, or ``[]`` for one that all share.
    """
    for bucket, counts, _, write in gathered:
        counts = counts if factors.dim() else [len(write)]
        calls: list[tuple[list[Tensor], Any]]
        if bucket.on_host:
            # Here looking waits for nothing: what is multiplied by 1 need not be written. And one call serves all
            # groups; elsewhere this overload would launch once a tensor.
            each = _for_each(factors.reshape(-1).tolist(), counts)
            acts = [factor != 1 for factor in each]
            calls = [(list(compress(write, acts)), list(compress(each, acts)))]
        else:
            own = factors.to(bucket.device, bucket.precision).reshape(-1)
            calls = list(zip(by_group(write, counts), own.unbind(), strict=True))
        with torch.enable_grad():  # a gradient with a graph (create_graph=True) takes the factor into it
            for tensors, factor in calls:
                if tensors:
                    torch._foreach_mul_(tensors, factor)


def _for_each(values: Iterable[Any], counts: Iterable[int]) -> list[Any]:
    """Each value as often as its count says."""
    return list(chain.from_iterable(map(repeat, values, counts)))


def clipped(norms: Tensor, factors: Tensor | None, max_norm: float) -> tuple[Tensor, Tensor]:
    """The factor by which `clip_grad_norm_` would clip after the penalty: times that of each row, if any, and alone."""
    if factors is not None:
        factors = torch.nn.functional.pad(factors, (0, len(norms) - len(factors)), value=1.0)
        norms = norms * factors
    total = torch.linalg.vector_norm(norms)
    clip = torch.where(total < torch.inf, (max_norm / (total + 1e-6)).clamp(max=1.0), 1.0)
    return clip if factors is None else factors * clip, clip


def spreads(gathered: Iterable[Gathered], amounts: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """The tensors that get noise, with the standard deviation of it: the amount of the group times the tensor's own."""
    return [
        (t, t.std() * amount)
        for _, counts, _, write in gathered
        for t, amount in zip(write, _for_each(amounts, counts), strict=False)
        if amount and t.numel() > 1  # a single element has no spread
    ]


def add_noise_(
    spread: Iterable[tuple[Tensor, Tensor]],
    clip: Tensor | None,
    due: Tensor | bool,
    generator: torch.Generator | None,
) -> None:
    """Add Gaussian noise of the given standard deviations, times ``clip``, in place, if due."""
    if due is False:
        return
    for t, std in spread:
        std = std if clip is None else std * clip.to(std)
        noise = torch.empty_like(t).normal_(generator=generator).mul_(std)
        if isinstance(due, Tensor):
            # Selected, not multiplied by zero: the spread of a gradient with an inf in it is NaN.
            noise = torch.where(due.to(t.device), noise, 0.0)
        t.add_(noise)
