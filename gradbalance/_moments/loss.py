"""A loss that matches the statistics of a prediction to those of data."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradbalance._moments.ranks import gathered, merge
from gradbalance._moments.statistics import central_moments, standardise

_ORDERS = {"mean": 1, "covariance": 1, "variance": 2, "skewness": 3, "kurtosis": 4}


def statistical_loss(
    prediction: Tensor | tuple[Tensor, Tensor],
    target: Tensor,
    mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    moments: Sequence[str] = ("mean", "variance"),
    dim: int | Sequence[int] | None = None,
    normalise: bool = False,
    mixture: bool = False,
    reduction: str = "mean",
    eps: float = 1e-6,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Distance of the statistics of two batches; the function behind `StatisticalLoss`, which documents it.

    Example:
        >>> target = torch.tensor([[0.0], [2.0]])
        >>> statistical_loss((torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])), target).item()
        2.0
    """
    _check_options(moments, reduction, eps)
    order = max(_ORDERS[name] for name in moments)
    statistics = partial(_statistics, dim=dim, covariance="covariance" in moments, process_group=process_group)
    if isinstance(prediction, Tensor):
        if mixture:
            raise ValueError("`mixture` must be False for samples. Got True. Give a pair (mean, variance).")
        predicted = statistics(prediction, mask, order=order, name="prediction")
    else:
        mean, variance = _pair(prediction, moments)
        predicted = statistics(mean, mask, order=2 if mixture else 1, name="prediction")
        within = statistics(variance, mask, order=1, name="prediction")["mean"]
        _check_sign(variance, mask)
        predicted["variance"] = within + predicted["variance"] if mixture else within
    with torch.no_grad():
        valid = mask if target_mask is None else target_mask
        actual = statistics(target, valid, order=max(order, 2 if normalise else 1), name="target")
    if predicted["mean"].shape != actual["mean"].shape:
        raise ValueError(
            "`prediction` and `target` must agree in every axis that is not reduced. Got statistics of shape "
            f"{list(predicted['mean'].shape)} and {list(actual['mean'].shape)}. Project one onto the other's features."
        )
    scale = actual["variance"] + eps if normalise else None
    error = torch.stack([_error(name, predicted[name], actual[name], scale) for name in moments]).mean(0)
    known = (predicted["count"] > 0) & (actual["count"] > 0)
    error = torch.where(known.reshape(known.shape + (1,) * (error.dim() - known.dim())), error, 0)
    return error if reduction == "none" else error.mean()


class StatisticalLoss(nn.Module):
    r"""Mean over the chosen statistics ``s`` of :math:`\mathrm{MSE}(\tilde s, \hat s)`, predicted against empirical.

    For the default :math:`\frac12[\mathrm{MSE}(\tilde\mu,\hat\mu) + \mathrm{MSE}(\tilde\sigma^2,\hat\sigma^2)]`. It
    anchors an encoder to the first moments of its input, aligns two domains, or takes the place of the divergence to a
    prior in a VAE-like encoder. It does not compare samples one by one: two batches of equal statistics have loss 0
    whatever the order of their samples.

    Args:
        moments: Any of "mean", "variance", "skewness", "kurtosis", "covariance". A (mean, variance) pair has the first
            two alone.
        dim: Axes to reduce. Default: all but the last one, which holds the features.
        normalise: Divide the error of the mean by the target's variance, those of variance and covariance by its
            square: free of the scale of the features. Skewness and kurtosis are so already.
        mixture: Add the variance of the predicted means to the mean of the predicted variances (law of total
            variance). For a pair only.
        reduction: "mean" over the features, or "none".
        eps: Added to the target's variance by ``normalise``.
        process_group: Take the statistics over the batches of all its ranks. As every rank then holds the whole loss,
            each gradient is scaled by the number of ranks, so that the **average** over the ranks that
            DistributedDataParallel takes is the gradient of a single process with the whole batch.

    Shape:
        ``prediction`` is ``[..., D]`` or a pair (mean ``[..., D]``, variance ``[..., D]``), ``target`` is
        ``[..., D]``, where the reduced axes may differ in size. ``mask`` and ``target_mask`` are boolean ``[...]``,
        True where a sample counts; ``target_mask=None`` means ``mask``. A tensor ``[N]`` counts as ``[N, 1]``: N
        samples of one feature. The loss is 0-d, or ``[D]`` (with the kept axes before it) without reduction; float32,
        or float64 for float64 data. A batch without a valid sample adds 0.

    Raises:
        TypeError: An input is not floating point or not dense, or a mask is not boolean.
        ValueError: An option or a shape is out of range, or a predicted variance is negative. The last is seen on the
            CPU only, outside `torch.compile`: elsewhere it would make the device wait.
        RuntimeError: A pair under `torch.func.vmap`, which cannot look at the sign of a variance. Samples work there.

    Example:
        >>> loss = StatisticalLoss(("mean", "covariance"))
        >>> loss(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).item()
        0.5

    Reference:
        [P] Mean and variance, arXiv 2605.28575: the mean of this loss over the audio and the visual branch is
        :math:`L_\mathrm{stat}`. The target's statistics carry no gradient.
        [R] Variances divide by n, as a batch of one sample has to have one; the paper does not say. Masks, other
        moments, ``normalise`` and ``mixture`` are ours. "covariance" is
        :math:`\|\tilde C - \hat C\|_F^2/(4D^2)` of Deep CORAL (Sun and Saenko, 2016), which divides by n - 1.
    """

    def __init__(
        self,
        moments: Sequence[str] = ("mean", "variance"),
        *,
        dim: int | Sequence[int] | None = None,
        normalise: bool = False,
        mixture: bool = False,
        reduction: str = "mean",
        eps: float = 1e-6,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(moments, reduction, eps)
        self.moments = tuple(moments)
        self.dim = dim
        self.normalise = normalise
        self.mixture = mixture
        self.reduction = reduction
        self.eps = eps
        self.process_group = process_group

    def forward(
        self,
        prediction: Tensor | tuple[Tensor, Tensor],
        target: Tensor,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch."""
        return statistical_loss(
            prediction,
            target,
            mask,
            target_mask,
            moments=self.moments,
            dim=self.dim,
            normalise=self.normalise,
            mixture=self.mixture,
            reduction=self.reduction,
            eps=self.eps,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """The options that shape the value."""
        return (
            f"{self.moments}, dim={self.dim}, normalise={self.normalise}, mixture={self.mixture}, "
            f"reduction={self.reduction!r}, eps={self.eps}"
        )


def _statistics(
    x: Tensor, mask: Tensor | None, *, process_group: dist.ProcessGroup | None, **options: Any
) -> dict[str, Tensor]:
    """The statistics of ``x`` by name, over all ranks of ``process_group``; the options of `central_moments`."""
    central = central_moments(x, mask, in_two_parts=process_group is not None, **options)
    if process_group is not None:
        central = merge(gathered(central, process_group))
    found = {**standardise(central)._asdict(), "covariance": central.covariance}
    return {key: value for key, value in found.items() if value is not None}


def _error(name: str, predicted: Tensor, actual: Tensor, scale: Tensor | None) -> Tensor:
    """Squared error per feature; ``scale`` is the target's variance to be divided by, if any."""
    error = (predicted - actual).square()
    if scale is not None and name in ("mean", "variance"):
        error = error / (scale if name == "mean" else scale.square())
    if name == "covariance":  # the mean of these rows is the squared Frobenius norm over 4 D^2
        error = (error if scale is None else error / (scale[..., None] * scale[..., None, :])).mean(-1) / 4
    return error


def _pair(pair: tuple[Tensor, Tensor], moments: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean and variance, checked in all but their values."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise TypeError(
            f"`prediction` must be a tensor, or a pair (mean, variance) of tensors. Got {type(pair).__name__}. "
            "Pass what the encoder puts out."
        )
    mean, variance = pair
    if mean.shape != variance.shape:
        raise ValueError(
            f"`prediction` must be a mean and a variance of one shape. Got {list(mean.shape)} and "
            f"{list(variance.shape)}. Expand one of them."
        )
    if unknown := set(moments) - {"mean", "variance"}:
        raise ValueError(
            f"`moments` must be 'mean' or 'variance' for a pair. Got {sorted(unknown)}. Draw samples for the others."
        )
    return mean, variance


def _check_sign(variance: Tensor, mask: Tensor | None) -> None:
    if variance.device.type == "cpu" and not torch.compiler.is_compiling():
        negative = variance < 0
        if mask is not None:
            negative &= mask if variance.dim() == 1 else mask[..., None]
        if negative.any():
            first = negative.nonzero()[0].tolist()
            raise ValueError(
                f"`prediction` must hold variances >= 0. Got {int(negative.sum())} below 0 of {variance.numel()}, the "
                f"first at {first}: {variance[tuple(first)].item():.4g}. Put out softplus or exp of what the net gives."
            )


def _check_options(moments: Sequence[str], reduction: str, eps: float) -> None:
    if isinstance(moments, str) or not moments or set(moments) - set(_ORDERS) or len(set(moments)) < len(moments):
        raise ValueError(
            f"`moments` must hold different names out of {list(_ORDERS)}, at least one. Got {moments!r}. "
            "The default is ('mean', 'variance')."
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"`reduction` must be 'mean' or 'none'. Got {reduction!r}. Take 'none' and reduce by hand.")
    if not 0 < eps < torch.inf:
        raise ValueError(f"`eps` must be positive and finite. Got {eps!r}. The default is 1e-6.")
