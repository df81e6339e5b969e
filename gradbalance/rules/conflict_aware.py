"""The paper's rule: who dominates and is ahead in its own error is slowed down."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbalance.rules.base import Measured

EPS = 1e-8
DEAD_BAND = 1e-6  # the mean of equal floats can differ from them by one ulp, and that must not count as a lead


@dataclass(frozen=True)
class ConflictAware:
    r"""The paper's penalty and modulation [P], for any number of groups [R]: :math:`c_m = q_m\,\pi_m`.

    A group is in conflict with another that it outweighs and whose error is higher; without errors, with each that it
    outweighs. If only some groups are observed the rule runs among those, and the others keep 1, as text does in the
    paper. It helps where a dominant branch is worse than those that it starves, and costs where it deserves to lead.

    Args:
        alpha: Strength of the modulation by errors, >= 0 [P: 1]. Nothing without errors.
        eta: Factor of a group in conflict with all others, in [0, 1] [P: 0.5]; 1 never damps.
        threshold: How many times the other's share is a conflict, >= 1 [P: 1].
        centred: Whether the modulation starts at no lead [R]; the paper's form jumps from 1 to 0.24 at equality.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> penalty = attach(sgd, {"text": text, "audio": audio}, rule=ConflictAware(), apply_to="gradient")
        >>> penalty.observe(text=0.5, audio=1.0)
        >>> (3 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> sgd.step()
        >>> {name: round(c, 4) for name, c in penalty.coefficients().items()}
        {'text': 0.018, 'audio': 1.0}

    Reference:
        arXiv 2605.28575, equation 6 and the modulation of OGM (Peng et al., CVPR 2022). [R]: N groups, errors optional.
    """

    alpha: float = 1.0
    eta: float = 0.5
    threshold: float = 1.0
    centred: bool = False

    needs_coherence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", 0, float("inf")), ("eta", 0, 1), ("threshold", 1, float("inf"))):
            value = getattr(self, name)
            if not low <= value <= high or value == float("inf"):
                interval = f"[{low}, {high}]" if high == 1 else f"[{low}, inf)"
                raise ValueError(f"`{name}` must be in {interval}. Got {value}. Choose a value inside the interval.")

    def __call__(self, measured: Measured) -> tuple[Tensor, Tensor]:
        """The coefficients, in [0, 1], shape ``[N]``, and the conflicts, bool, shape ``[N, N]``."""
        members, errors = measured.active, measured.errors
        if errors is not None:
            seen = ~errors.isnan()
            blind = ~seen.any()  # all that was observed fell into steps that did not count
            members = members & (seen | blind)
        shares = torch.where(members, measured.shares, torch.nan)
        conflicts = conflict_matrix(shares, self.threshold)
        if errors is not None:
            conflicts = conflicts & ((errors[:, None] < errors[None, :]) | blind)
        coefficients = penalty(conflicts, members, self.eta, shares.dtype)
        if errors is not None and self.alpha > 0:
            coefficients = coefficients * modulation(errors, members & seen, self.alpha, self.centred)
        return coefficients, conflicts


def conflict_matrix(shares: Tensor, threshold: float) -> Tensor:
    r"""Which group outweighs which, :math:`X_{mk} = p_m > \tau\,p_k`, shape ``[N, N]``.

    Args:
        shares: Share of the gradient norm of each group, in [0, 1], NaN for who takes no part, shape ``[N]``.
        threshold: How many times the other share counts as a conflict, >= 1.

    Example:
        >>> conflict_matrix(torch.tensor([0.6, 0.3, 0.1]), threshold=2.5)[0].tolist()
        [False, False, True]
    """
    return shares[:, None] > threshold * shares[None, :]


def penalty(conflicts: Tensor, members: Tensor, eta: float, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""The factor :math:`\pi_m = \eta^{\kappa_m}`, :math:`\kappa_m` the fraction of peers in conflict, shape ``[N]``.

    [P] for two groups: ``eta`` or 1. [R] for more: the mean over the peers.

    Args:
        conflicts: Which group outweighs which, shape ``[N, N]``.
        members: Which groups take part, shape ``[N]``.
        eta: The factor of a group in conflict with every peer, in [0, 1].
        dtype: Of the result.

    Example:
        >>> conflicts = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
        >>> penalty(conflicts, torch.ones(3, dtype=torch.bool), eta=0.25).tolist()
        [0.25, 0.5, 1.0]
    """
    peers = (members.sum(dtype=dtype) - 1).clamp(min=1)
    return torch.pow(eta, conflicts.sum(1) / peers)


def modulation(errors: Tensor, members: Tensor, alpha: float, centred: bool) -> Tensor:
    r"""The factor :math:`q_m = 1 - \tanh(\alpha\,\varphi(r_m))` where :math:`r_m > 1`, else 1, shape ``[N]``.

    :math:`r_m` is the score :math:`s_m = 1/(e_m + \epsilon)` over the mean score of the peers.

    Args:
        errors: Error of each group, >= 0, shape ``[N]``.
        members: Which groups take part, shape ``[N]``; the others get 1.
        alpha: Strength, >= 0.
        centred: Whether :math:`\varphi(r) = r - 1` [R] instead of :math:`\varphi(r) = r` [P].

    Example:
        >>> modulation(torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bool), alpha=1.0, centred=False)
        tensor([0.0360, 1.0000])
    """
    scores = torch.where(members, 1 / (errors + EPS), 0.0)
    # The mean over the peers is summed without the group's own score: subtracting it from the total would cancel.
    others = scores.expand(len(scores), -1).clone().fill_diagonal_(0).sum(1) / (members.sum() - 1)
    ratio = scores / others
    lead = ratio - 1 if centred else ratio
    return torch.where(members & (ratio > 1 + DEAD_BAND), 1 - torch.tanh(alpha * lead), 1.0)
