"""A loss that matches the statistics of a prediction to those of data."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradbalance.statistics import masked
from gradbalance.statistics._ranks import over_ranks

_ORDERS = {"mean": 1, "covariance": 1, "variance": 2, "skewness": 3, "kurtosis": 4}

# Part of `eps` below which a variance is no scale.
NEGLIGIBLE = 1e-6


class StatisticalLoss(nn.Module):
    r"""Mean over the chosen statistics ``s`` of :math:`\mathrm{MSE}(\tilde s, \hat s)`.

    :math:`\tilde s` is the statistic of the prediction, :math:`\hat s` that of the target. By
    default :math:`\frac12[\mathrm{MSE}(\tilde\mu,\hat\mu) +
    \mathrm{MSE}(\tilde\sigma^2,\hat\sigma^2)]`.

    It anchors an encoder to the first moments of its input, aligns two domains, or takes the place
    of the divergence to a prior in a VAE-like encoder. It does not compare samples one by one: two
    batches of equal statistics have loss 0 whatever the order of their samples.

    Args:
        moments: Any of "mean", "variance", "skewness", "kurtosis", "covariance". A (mean, variance)
            pair has the first two alone.
        dim: Axes to reduce. Default: all but the last one, which holds the features.
        normalise: Divide the error of the mean by the target's variance, and those of variance and
            covariance by its square, which makes them independent of the scale of the features.
            The error of a feature without spread in the target, which has no scale, counts as 0.
            Without spread is what varies by rounding alone: that of the feature itself or, where
            the variance is below ``eps`` and 1e-6, of the feature with the largest variance; and
            what has a variance below ``1e-6 * eps``.
        mixture: Add the variance of the predicted means to the mean of the predicted variances (law
            of total variance). For a pair only.
        reduction: "mean" over the features, or "none".
        eps: Added to the target's variance by ``normalise``, > 0. Lower it for features that are
            far smaller than the others.
        process_group: Take the statistics over the batches of all its ranks. Every rank then holds
            the whole loss, and each gradient is scaled by the number of ranks, so that the
            **average** that DistributedDataParallel takes is the gradient of the whole batch.

    Shape:
        ``prediction`` is ``[..., D]`` or a pair (mean ``[..., D]``, variance ``[..., D]``),
        ``target`` is ``[..., D]``, where the reduced axes may differ in size. ``mask`` and
        ``target_mask`` are boolean ``[...]``, True where a sample counts; ``target_mask=None``
        means ``mask``. A tensor ``[N]`` counts as ``[N, 1]``: N samples of one feature. The loss is
        0-d, or ``[D]`` (with the kept axes before it) without reduction; float32, or float64 for
        float64 data. A batch without a valid sample adds 0; NaN in a valid sample gives NaN.

    Raises:
        TypeError: An input is not floating point or not dense, a mask is not boolean, or an option
            is of the wrong kind.
        ValueError: An option or a shape is out of range, or a predicted variance is negative. The
            last is seen on the CPU only, outside `torch.compile`: elsewhere it would make the
            device wait.
        RuntimeError: A pair under `torch.func.vmap`, which cannot look at the sign of a variance.

    Example:
        >>> loss = StatisticalLoss(("mean", "covariance"))
        >>> loss(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor(0.5000)

    Reference:
        [P] Mean and variance, arXiv 2605.28575: the mean of this loss over the audio and the visual
        branch is :math:`L_\mathrm{stat}`. The target's statistics carry no gradient.
        [R] Variances divide by n, as a batch of one sample has to have one; the paper does not say.
        Masks, other moments, ``normalise`` and ``mixture`` are ours. "covariance" is
        :math:`\|\tilde C - \hat C\|_F^2/(4D^2)` of Deep CORAL (Sun and Saenko, 2016), which divides
        by n - 1.
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
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        self.moments = _checked_names(moments)
        self.dim = masked.checked_dim(dim)
        self.normalise = _checked_flag("normalise", normalise)
        self.mixture = _checked_flag("mixture", mixture)
        self.eps = _checked_eps(eps)
        if reduction not in ("mean", "none"):
            raise ValueError(
                f"`reduction` must be 'mean' or 'none'. Got {reduction!r}. "
                "Take 'none' and reduce by hand."
            )
        self.reduction = reduction
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "`process_group` must be a group that this process belongs to, or None. "
                f"Got {process_group!r}. Pass what torch.distributed.new_group returns."
            )
        self.process_group = process_group

    def forward(
        self,
        prediction: Tensor | tuple[Tensor, Tensor],
        target: Tensor,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch."""
        order = max(_ORDERS[name] for name in self.moments)
        if not isinstance(prediction, Tensor):
            predicted = self._statistics_of_pair(prediction, mask)
        elif self.mixture:
            raise ValueError(
                "`mixture` must be False for samples. Got True. Give a pair (mean, variance)."
            )
        else:
            predicted = self._statistics(prediction, mask, order, "prediction")
        if self.normalise:
            order = max(order, 2)
        with torch.no_grad():
            if target_mask is None:
                actual = self._statistics(target, mask, order, "target")
            else:
                actual = self._statistics(target, target_mask, order, "target", "target_mask")
        if predicted["mean"].shape != actual["mean"].shape:
            raise ValueError(
                "`prediction` and `target` must agree in every axis that is not reduced. "
                f"Got statistics of shape {list(predicted['mean'].shape)} and "
                f"{list(actual['mean'].shape)}. Project one onto the other's features."
            )
        masked.check_device("target", target, predicted["mean"].device, "prediction")
        scale = None
        if self.normalise:
            scale = _scale(actual["mean"], actual["variance"], self.eps, target.dtype)
        errors = [_error(name, predicted[name], actual[name], scale) for name in self.moments]
        error = torch.stack(errors).mean(0)
        known = (predicted["count"] > 0) & (actual["count"] > 0)
        if error.dim() > known.dim():
            known = known.unsqueeze(-1)
        error = torch.where(known, error, 0)
        if self.reduction == "none":
            return error
        return error.sum() / max(1, error.numel())  # 0 where a kept axis is empty

    def extra_repr(self) -> str:
        """The options that shape the value."""
        return (
            f"{self.moments}, dim={self.dim}, normalise={self.normalise}, mixture={self.mixture}, "
            f"reduction={self.reduction!r}, eps={self.eps}"
        )

    def _statistics(
        self, x: Tensor, mask: Tensor | None, order: int, name: str, mask_name: str = "mask"
    ) -> dict[str, Tensor]:
        """The statistics by name, over all ranks; the names of the arguments are for errors."""
        merged = self.process_group is not None
        covariance = "covariance" in self.moments
        central = masked.central_moments(
            x, mask, self.dim, order, covariance, merged, name, mask_name
        )
        if self.process_group is not None:
            central = over_ranks(central, self.process_group)
        found = masked.standardise(central)
        names = ("count", "mean", "variance", "skewness", "kurtosis", "covariance")
        values = (*found, central.covariance)
        return {key: value for key, value in zip(names, values, strict=True) if value is not None}

    def _statistics_of_pair(
        self, pair: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Count, mean and variance of what an encoder puts out."""
        # Two types in a tuple: the compiler of torch 2.6 knows no union.
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], Tensor) or not isinstance(pair[1], Tensor):
            raise TypeError(
                "`prediction` must be a tensor, or a pair (mean, variance) of tensors. "
                f"Got {type(pair).__name__}. Pass what the encoder puts out."
            )
        mean, variance = pair
        if mean.shape != variance.shape:
            raise ValueError(
                f"`prediction` must be a mean and a variance of one shape. Got {list(mean.shape)} "
                f"and {list(variance.shape)}. Expand one of them."
            )
        masked.check_device("prediction[1]", variance, mean.device, "prediction[0]")
        if unknown := set(self.moments) - {"mean", "variance"}:
            raise ValueError(
                f"`moments` must be 'mean' or 'variance' for a pair. Got {sorted(unknown)}. "
                "Draw samples for the others."
            )
        statistics = self._statistics(mean, mask, 2 if self.mixture else 1, "prediction")
        within = self._statistics(variance, mask, 1, "prediction")["mean"]
        _check_sign(variance, mask)
        statistics["variance"] = within + statistics["variance"] if self.mixture else within
        return statistics


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
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Distance of the statistics of two batches: `StatisticalLoss` as a function, documented there.

    Example:
        >>> mean, variance = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])
        >>> statistical_loss((mean, variance), torch.tensor([[0.0], [2.0]])).item()
        2.0
    """
    loss = StatisticalLoss(
        moments,
        dim=dim,
        normalise=normalise,
        mixture=mixture,
        reduction=reduction,
        eps=eps,
        process_group=process_group,
    )
    return loss.forward(prediction, target, mask, target_mask)


def _scale(mean: Tensor, variance: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """What squared errors are divided by: inf, which leaves them out, without a spread.

    Args:
        mean: Of each feature of the target.
        variance: Of each feature of the target.
        eps: Of the loss.
        dtype: Of the target, whose rounding is no spread.
    """
    rounding = torch.finfo(dtype).eps ** 2
    finite = torch.where(variance < torch.inf, variance, 0)  # where it is not, the loss is NaN
    largest = finite.amax() if finite.numel() else finite.sum()
    flat = masked.without_spread(mean, variance) | (variance <= rounding * mean.square())
    # Around 0 only the other features, or `eps`, tell what is small. Far below `eps` a prediction
    # on the scale of the target adds nothing, and any other one would add more than all the rest.
    flat |= variance <= (rounding * largest).clamp(NEGLIGIBLE * eps, min(NEGLIGIBLE, eps))
    return torch.where(flat, torch.inf, variance + eps)


def _error(name: str, predicted: Tensor, actual: Tensor, scale: Tensor | None) -> Tensor:
    """Squared error per feature; ``scale`` is the target's variance to be divided by, if any."""
    error = (predicted - actual).square()
    if name == "covariance":
        if scale is not None:
            error = error / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
        return error.mean(-1) / 4  # averaged, the squared Frobenius norm over 4 D^2
    if scale is None or name in ("skewness", "kurtosis"):
        return error
    return error / (scale if name == "mean" else scale.square())


def _check_sign(variance: Tensor, mask: Tensor | None) -> None:
    if variance.device.type != "cpu" or torch.compiler.is_compiling():
        return
    negative = variance < 0
    if mask is not None:
        negative &= mask if variance.dim() == 1 else mask.unsqueeze(-1)
    if negative.any():
        first = negative.nonzero()[0].tolist()
        raise ValueError(
            f"`prediction` must hold variances >= 0. Got {int(negative.sum())} below 0 of "
            f"{variance.numel()}, the first at {first}: {variance[tuple(first)].item():.4g}. "
            "Put out softplus or exp of what the net gives."
        )


def _checked_names(names: object) -> tuple[str, ...]:
    given = tuple(names) if isinstance(names, Iterable) else ()
    known = all(isinstance(name, str) and name in _ORDERS for name in given)
    if isinstance(names, str) or not given or not known or len(set(given)) < len(given):
        kind = ValueError if isinstance(names, Iterable) else TypeError
        raise kind(
            f"`moments` must hold different names out of {list(_ORDERS)}, at least one. "
            f"Got {names!r}. The default is ('mean', 'variance')."
        )
    return given


def _checked_flag(name: str, flag: object) -> bool:
    flag = masked.plain(flag)
    if not isinstance(flag, bool):
        raise TypeError(f"`{name}` must be True or False. Got {flag!r}. The default is False.")
    return flag


def _checked_eps(eps: object) -> float:
    eps = masked.plain(eps)
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f"`eps` must be a positive number. Got {eps!r}. The default is 1e-6.")
    try:
        number = float(eps)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"`eps` must be positive and finite. Got {eps!r}. The default is 1e-6.")
    return number
