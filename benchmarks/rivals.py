"""The rules compared: each takes a model, an optimizer and the value of its knob, and returns one training step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.testbeds import Model, losses
from gradbalance import PAPER, ConflictAwarePenalty

Step = Callable[[list[Tensor], Tensor], None]


@dataclass(frozen=True)
class Rule:
    """``step(model, optimizer, knob)``, the values of its knob, and whether it has a learning rate of its own."""

    step: Callable[[Model, Optimizer, Any], Step]
    knobs: tuple[Any, ...] = (None,)
    own_rate: bool = False


def descent(
    model: Model,
    optimizer: Optimizer,
    before: Callable[[list[Tensor], Tensor], None] = lambda features, target: None,
    weight: float = 0.0,
) -> Step:
    """Gradient descent on the joint loss plus ``weight`` times the losses of the branches' own heads.

    Args:
        model: The model.
        optimizer: Of all its parameters.
        before: Called with the features and the targets between the backward pass and the optimizer's step.
        weight: Of the losses of the branches alone.
    """

    def step(inputs: list[Tensor], target: Tensor) -> None:
        optimizer.zero_grad()
        features = model.features(inputs)
        joint, *own = all_losses(model, features, target) if weight else [joint_loss(model, features, target)]
        (joint + weight * sum(own)).backward()
        with torch.no_grad():
            before(features, target)
        optimizer.step()

    return step


def joint_loss(model: Model, features: list[Tensor], target: Tensor) -> Tensor:
    return losses(model.joint(torch.cat(features, 1)), target).mean()


def all_losses(model: Model, features: list[Tensor], target: Tensor) -> list[Tensor]:
    """The joint loss, then that of each branch's own head."""
    own = [losses(head(f), target).mean() for head, f in zip(model.heads, features, strict=True)]
    return [joint_loss(model, features, target), *own]


def errors(model: Model, features: list[Tensor], target: Tensor) -> list[Tensor]:
    """The losses of each branch's contribution to the joint output, per sample: what OGM scores a branch by."""
    return [losses(part, target) for part in model.contributions(features)]


def plain(model: Model, optimizer: Optimizer, _: None) -> Step:
    return descent(model, optimizer)


def own_heads(model: Model, optimizer: Optimizer, weight: float) -> Step:
    """The sum of the joint loss and of each branch's own, unbalanced."""
    return descent(model, optimizer, weight=weight)


def clip_groups(model: Model, optimizer: Optimizer, max_norm: float) -> Step:
    def before(*_: object) -> None:
        for encoder in model.encoders.values():
            nn.utils.clip_grad_norm_(encoder.parameters(), max_norm)

    return descent(model, optimizer, before)


def clip_global(model: Model, optimizer: Optimizer, max_norm: float) -> Step:
    return descent(model, optimizer, lambda *_: nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def slower_first(model: Model, optimizer: Optimizer, factor: float) -> Step:
    """A learning rate set by hand for the branch known to dominate, which is the first."""
    optimizer.param_groups[0]["lr"] *= factor
    return descent(model, optimizer)


def faster_others(model: Model, optimizer: Optimizer, factor: float) -> Step:
    """A learning rate set by hand for the branches known not to dominate."""
    for group in optimizer.param_groups[1 : len(model.encoders)]:
        group["lr"] *= factor
    return descent(model, optimizer)


def ogm_coefficients(scores: Tensor, alpha: float) -> Tensor:
    r"""On-the-fly gradient modulation, :math:`k_m = 1 - \tanh(\alpha\,r_m)` where :math:`r_m > 1`, else 1.

    :math:`r_m` is the score of branch m over the mean score of the others, shape ``[N]``.

    Reference:
        Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022, equations 8 to 10,
        for two branches.
    """
    ratio = scores * (len(scores) - 1) / (scores.sum() - scores)
    return torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)


def ogm(model: Model, optimizer: Optimizer, alpha: float, noise: bool = False) -> Step:
    """OGM, and with ``noise`` OGM-GE: Gaussian noise of the spread of each gradient tensor, after scaling it."""

    def before(features: list[Tensor], target: Tensor) -> None:
        scores = torch.stack([torch.exp(-e).sum() for e in errors(model, features, target)])  # of a class: softmax
        for encoder, k in zip(model.encoders.values(), ogm_coefficients(scores, alpha), strict=True):
            for p in encoder.parameters():
                p.grad.mul_(k)
                if noise:
                    p.grad.add_(torch.randn_like(p.grad), alpha=float(p.grad.std()) + 1e-8)

    return descent(model, optimizer, before)


def gradnorm(model: Model, optimizer: Optimizer, rate: float) -> Step:
    """GradNorm over the joint loss and those of the branches, by their gradients at the features."""
    from gradnorm_pytorch import GradNormLossWeighter

    weighter = GradNormLossWeighter(
        num_losses=len(model.heads) + 1, learning_rate=rate, restoring_force_alpha=1.5, grad_norm_parameters=None
    )

    def step(inputs: list[Tensor], target: Tensor) -> None:
        features = model.features(inputs)
        # The package also backpropagates its own loss into whatever it is given, so that it gets a copy.
        copy = torch.cat(features, 1).detach().requires_grad_()
        parts = list(copy.split([f.shape[1] for f in features], 1))
        weighter.backward(all_losses(model, parts, target), activations=copy)
        optimizer.zero_grad()
        (torch.stack(all_losses(model, features, target)) @ weighter.loss_weights.detach()).backward()
        optimizer.step()

    return step


def jacobian_descent(name: str) -> Callable[[Model, Optimizer, None], Step]:
    """TorchJD's aggregation ``name`` of the joint loss and those of the branches."""

    def build(model: Model, optimizer: Optimizer, _: None) -> Step:
        from torchjd import aggregation
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = getattr(aggregation, name)()
        shared = list(model.encoders.parameters())

        def step(inputs: list[Tensor], target: Tensor) -> None:
            optimizer.zero_grad()
            features = model.features(inputs)
            mtl_backward(all_losses(model, features, target), features=features, shared_params=shared)
            jac_to_grad(shared, aggregator)
            optimizer.step()

        return step

    return build


def ours(observe: bool = False, **options: Any) -> Callable[[Model, Optimizer, Any], Step]:
    """The library with ``options``; ``observe`` tells it the error of each branch's contribution."""

    def build(model: Model, optimizer: Optimizer, _: Any) -> Step:
        wrapped = ConflictAwarePenalty(optimizer, dict(model.encoders.items()), **options)

        def tell(features: list[Tensor], target: Tensor) -> None:
            means = (e.mean() for e in errors(model, features, target))
            wrapped.observe(**dict(zip(wrapped.penalty.names, means, strict=True)))

        return descent(model, wrapped, tell) if observe else descent(model, wrapped)

    return build


_ALPHAS = (0.1, 0.3, 1.0)
_NORMS = (0.1, 0.3, 1.0)

#: Every rule has three tries on validation at most, at the learning rate best without balancing, or one for each of
#: five rates of its own.
RULES = {
    "none": Rule(plain),
    "default": Rule(ours()),
    "norms only": Rule(ours(agreement=None)),
    "paper": Rule(ours(observe=True, **PAPER)),
    "errors": Rule(ours(observe=True)),
    "faster by hand": Rule(faster_others, (3.0, 10.0, 30.0)),
    "slower by hand": Rule(slower_first, (0.3, 0.1, 0.03)),
    "OGM-GE": Rule(lambda *args: ogm(*args, noise=True), _ALPHAS),
    "clip groups": Rule(clip_groups, _NORMS),
    "GradNorm": Rule(gradnorm, (0.025, 0.25, 2.5)),
    "UPGrad": Rule(jacobian_descent("UPGrad")),
    "OGM": Rule(ogm, _ALPHAS),
    "clip all": Rule(clip_global, _NORMS),
    "own heads": Rule(own_heads, (0.3, 1.0, 3.0)),
    "PCGrad": Rule(jacobian_descent("PCGrad")),
    "IMTL-G": Rule(jacobian_descent("IMTLG")),
    "none, own rate": Rule(plain, own_rate=True),
    "default, own rate": Rule(ours(), own_rate=True),
    "agreement 0.8": Rule(ours(agreement=0.8)),
    "norms only, raising": Rule(ours(agreement=None, max_coefficient=20.0)),
    "damping": Rule(ours(max_coefficient=1.0)),
    "damping, norms only": Rule(ours(agreement=None, max_coefficient=1.0)),
    "default, gradient": Rule(ours(apply_to="gradient")),
    "norms only, gradient": Rule(ours(agreement=None, apply_to="gradient")),
}
