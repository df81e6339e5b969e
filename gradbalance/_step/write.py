"""What is written into the gradients: factors, clipping and noise."""

from collections.abc import Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor

from gradbalance._step.gradients import BucketGradients, on_host

# A tensor of gradients that gets noise, with the standard deviation of it.
Spread = tuple[Tensor, Tensor]


def scale_(
    gradients: Iterable[BucketGradients], factors: Sequence[float], clip: Tensor | None
) -> None:
    """Multiply the gradients of each row by its factor, and all by ``clip``, in place.

    Args:
        gradients: Of the step, bucket by bucket.
        factors: One for each row.
        clip: Factor that all share, shape ``[]``, or None. On an accelerator nobody looks at it.
    """
    # A gradient with a graph (create_graph=True) takes the factor into it.
    with torch.enable_grad():
        for bucket, _, write in gradients:
            on_device = clip
            common = 1.0
            if clip is not None and on_host(clip.device):
                on_device = None
                common = clip.item()
            of_each = [common * factors[row] for row in bucket.rows]
            is_scaled = [factor != 1 for factor in of_each]
            scaled = list(compress(write, is_scaled))
            if scaled:
                torch._foreach_mul_(scaled, list(compress(of_each, is_scaled)))
            if on_device is not None and write:
                # In the dtype of the gradients, for one launch.
                torch._foreach_mul_(write, on_device.to(bucket.device, write[0].dtype))


def clip_factor(norms: Tensor, factors: Sequence[float], max_norm: float) -> Tensor:
    """The factor by which ``clip_grad_norm_`` would clip the scaled gradients, shape ``[]``.

    Args:
        norms: Of each row, before they are scaled, shape ``[G]``.
        factors: Of each row.
        max_norm: The largest norm of all gradients together.
    """
    if any(factor != 1 for factor in factors):
        norms = torch.stack(torch._foreach_mul(norms.unbind(), list(factors)))
    total = torch.linalg.vector_norm(norms)
    clip = (max_norm / (total + 1e-6)).clamp(max=1.0)
    return torch.where(total < torch.inf, clip, 1.0)


def spreads(gradients: Iterable[BucketGradients], amounts: Sequence[float]) -> list[Spread]:
    """The tensors that get noise, each with the amount of its row times its own spread."""
    found: list[Spread] = []
    for bucket, _, write in gradients:
        for gradient, row in zip(write, bucket.rows, strict=True):
            amount = amounts[row]
            if amount and gradient.numel() > 1:  # a single element has no spread
                found.append((gradient, gradient.std() * amount))
    return found


def add_noise_(
    spread: Iterable[Spread], clip: Tensor | None, generator: torch.Generator | None
) -> None:
    """Add Gaussian noise of the given standard deviations, times ``clip``, in place."""
    for gradient, deviation in spread:
        # A gradient with an inf in it has a spread of NaN, which must not spread to the others.
        deviation = deviation.nan_to_num(nan=0.0, posinf=0.0)
        if clip is not None:
            deviation = deviation * clip.to(deviation)
        noise = torch.empty_like(gradient).normal_(generator=generator)
        gradient.add_(noise.mul_(deviation))
