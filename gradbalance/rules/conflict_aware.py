"""The paper's rule: a branch that dominates and is ahead in its own error is slowed down."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gradbalance.rules.base import Measured, Vector, check_number

Flags = NDArray[np.bool_]

EPS = 1e-8
# The mean of equal floats can differ from them by one ulp, which must not count as a lead.
DEAD_BAND = 1e-6


@dataclass(frozen=True)
class ConflictAware:
    r"""The paper's penalty and modulation [P], for any number of groups [R]: :math:`q_m\,\pi_m`.

    A group is in conflict with another that it outweighs and whose error is higher; without errors,
    with each that it outweighs. If only some groups are observed the rule runs among those, and the
    others keep 1, as text does in the paper. It helps where a dominant branch is worse than those
    that it starves, and costs where it deserves to lead.

    Args:
        alpha: Strength of the modulation by errors, >= 0 [P: 1]. Nothing without errors.
        eta: Factor of a group in conflict with all others, in [0, 1] [P: 0.5]; 1 never damps.
        threshold: How many times the other's share is a conflict, >= 1 [P: 1].
        centred: Whether the modulation starts at no lead [R]; the paper's form jumps from 1 to 0.24
            at equality.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> groups = {"text": text, "audio": audio}
        >>> penalty = attach(sgd, groups, rule=ConflictAware(), apply_to="gradient")
        >>> penalty.observe(text=0.5, audio=1.0)
        >>> (3 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> sgd.step()
        >>> {name: round(c, 4) for name, c in penalty.coefficients().items()}
        {'text': 0.018, 'audio': 1.0}

    Reference:
        arXiv 2605.28575, equation 6 and the modulation of OGM (Peng et al., CVPR 2022). [R]: N
        groups, errors optional.
    """

    alpha: float = 1.0
    eta: float = 0.5
    threshold: float = 1.0
    centred: bool = False

    needs_coherence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_range("alpha", self.alpha, 0, math.inf)
        _check_range("eta", self.eta, 0, 1)
        _check_range("threshold", self.threshold, 1, math.inf)
        if not isinstance(self.centred, bool):
            raise TypeError(f"`centred` must be a bool. Got {self.centred!r}. Pass True or False.")

    def __call__(self, measured: Measured) -> tuple[Vector, Flags]:
        """The coefficients, in [0, 1], shape ``[N]``, and the conflicts, bool, shape ``[N, N]``."""
        errors = measured.errors
        # Unknown if all that was observed fell into steps that did not count.
        if errors is None or np.isnan(errors).all():
            members = measured.active
            conflicts = conflict_matrix(measured.shares, members, self.threshold)
            return penalty(conflicts, members, self.eta), conflicts
        members = measured.active & ~np.isnan(errors)
        conflicts = conflict_matrix(measured.shares, members, self.threshold)
        conflicts &= errors[:, None] < errors
        coefficients = penalty(conflicts, members, self.eta)
        if self.alpha > 0:
            scores = 1 / (errors + EPS)
            coefficients = coefficients * modulation(scores, members, self.alpha, self.centred)
        return coefficients, conflicts


def _check_range(name: str, value: float, low: float, high: float) -> None:
    check_number(name, value)
    if not low <= value <= high or value == math.inf:
        raise ValueError(
            f"`{name}` must be finite and in [{low}, {high}]. Got {value}. "
            "Choose a value inside the interval."
        )


def conflict_matrix(shares: Vector, members: Flags, threshold: float) -> Flags:
    r"""Which group outweighs which, :math:`X_{mk} = p_m > \tau\,p_k`, shape ``[N, N]``.

    Args:
        shares: Share of the gradient norm of each group, in [0, 1], shape ``[N]``.
        members: Which groups take part, bool, shape ``[N]``.
        threshold: How many times the other share counts as a conflict, >= 1.

    Example:
        >>> everyone = np.ones(3, dtype=bool)
        >>> conflict_matrix(np.array([0.6, 0.3, 0.1]), everyone, threshold=2.5)[0].tolist()
        [False, False, True]
    """
    outweighs = shares[:, None] > threshold * shares
    return outweighs & members[:, None] & members


def penalty(conflicts: Flags, members: Flags, eta: float) -> Vector:
    r"""The factor :math:`\pi_m = \eta^{\kappa_m}`, shape ``[N]``.

    :math:`\kappa_m` is the fraction of the other members with which the group is in conflict. [P]
    for two groups: ``eta`` or 1. [R] for more: the mean over the other members.

    Args:
        conflicts: Which group is in conflict with which, shape ``[N, N]``.
        members: Which groups take part, shape ``[N]``.
        eta: The factor of a group in conflict with all others, in [0, 1].

    Example:
        >>> conflicts = np.array([[False, True, True], [False, False, True], [False, False, False]])
        >>> penalty(conflicts, np.ones(3, dtype=bool), eta=0.25).tolist()
        [0.25, 0.5, 1.0]
    """
    others = max(1, members.sum() - 1)
    fractions = conflicts.sum(1) / others
    factors: Vector = np.power(eta, fractions)
    return factors


def modulation(scores: Vector, members: Flags, alpha: float, centred: bool) -> Vector:
    r"""The factor :math:`q_m = 1 - \tanh(\alpha\,\varphi(r_m))` where :math:`r_m > 1`, else 1.

    :math:`r_m` is the score of a group over the mean score of the other members.

    Args:
        scores: Score of each group, >= 0, higher is better, shape ``[N]``.
        members: Which groups take part, shape ``[N]``; the others get 1.
        alpha: Strength, >= 0.
        centred: Whether :math:`\varphi(r) = r - 1` [R] instead of :math:`\varphi(r) = r` [P].

    Example:
        >>> everyone = np.ones(2, dtype=bool)
        >>> factors = modulation(np.array([1.0, 0.5]), everyone, alpha=1.0, centred=False)
        >>> factors.round(3).tolist()
        [0.036, 1.0]
    """
    if members.sum() < 2:
        return np.ones(len(scores))
    scores = np.where(members, scores, 0.0)
    # Summed without the group's own score: to subtract it from the total would cancel.
    of_others = np.tile(scores, (len(scores), 1))
    np.fill_diagonal(of_others, 0.0)
    # Where the others have next to no score the ratio is infinite, and the factor 0; where nobody
    # has any it is NaN, and no lead.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = scores / (of_others.sum(1) / (members.sum() - 1))
        leads = ratios - 1 if centred else ratios
        factors = 1 - np.tanh(alpha * leads)
    return np.where(members & (ratios > 1 + DEAD_BAND), factors, 1.0)
