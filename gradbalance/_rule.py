"""The rule: norms and errors of N groups in, N coefficients out. Pure arithmetic on small tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradbalance._settings import Settings

UNSEEN = -4.0  # a running mean before its first value; shares and errors are >= 0, cosines >= -1
EPS = 1e-8
DEAD_BAND = 1e-6  # the mean of equal floats can differ from them by one ulp, and that must not count as a lead


class State(NamedTuple):
    """What the rule remembers, UNSEEN where there is nothing yet."""

    step: Tensor  # [] steps that took place
    shares: Tensor  # [N] running shares
    errors: Tensor | None  # [N] running errors; None if none was ever observed
    agreements: Tensor | None  # [N] running cosines of successive gradients; None if they are not asked for


class Decision(NamedTuple):
    """What one step of the rule gives."""

    state: State
    conflicts: Tensor  # [N, N] bool
    coefficients: Tensor  # [N]
    due: Tensor  # [] bool, whether the step counts and lies inside the window


def decide(
    norms: Tensor, observed: Tensor | None, cosines: Tensor | None, state: State, settings: Settings
) -> Decision:
    """One step of the rule: the coefficients, and the state after it. No host read.

    A step with a non-finite norm or error, or with fewer than two active groups, does not count: every coefficient
    is 1 and the state stays as it was.

    Args:
        norms: Gradient norm of each group, shape ``[N]``; NaN where the step must not count.
        observed: Error of each group observed since the last step, >= 0, negative where not observed, shape ``[N]``;
            None keeps the errors in force.
        cosines: Cosine between this gradient of each group and its last one, NaN where undefined, shape ``[N]``; None
            if they are not asked for.
        state: What the rule remembers.
        settings: The options.
    """
    step, shares, errors, agreements = state
    active, total = norms > 0, norms.sum()
    counts = (total.abs() < torch.inf) & (active.sum() >= 2)  # one NaN or inf shows in the sum
    new_shares = torch.where(active, running_mean(shares, norms / total, settings.smoothing), shares)
    members = active
    ahead = seen = None
    if errors is not None:
        new_errors = errors
        if observed is not None:
            counts = counts & (observed.sum().abs() < torch.inf)
            new_errors = torch.where(observed < 0, UNSEEN, running_mean(errors, observed, settings.smoothing))
        seen = new_errors >= 0
        blind = ~seen.any()
        members = active & (seen | blind)
        ahead = (new_errors[:, None] < new_errors[None, :]) | blind
        errors = torch.where(counts, new_errors, errors)
    elif agreements is not None and cosines is not None and settings.agreement is not None:
        new = torch.where(cosines.isnan(), agreements, running_mean(agreements, cosines, settings.smoothing))
        ahead = agreement_matrix(torch.where(new == UNSEEN, torch.nan, new), settings.agreement)
        agreements = torch.where(counts, new, agreements)
    due = counts
    if settings.window is not None:
        start, stop = settings.window
        due = due & (step >= start)
        if stop is not None:
            due = due & (step < stop)

    members = members & due
    compared = torch.where(members, new_shares, torch.nan)
    conflicts = conflict_matrix(compared, settings.threshold)
    conflicts = conflicts if ahead is None else conflicts & ahead
    factor = penalty(conflicts, members, settings.eta, norms.dtype)
    if seen is not None and settings.alpha > 0:
        factor = factor * modulation(new_errors, members & seen, settings.alpha, settings.centred)
    # Who takes no part has no conflict: its factor is 1.
    coefficients = factor.clamp(min=settings.min_coefficient) if settings.min_coefficient > 0 else factor
    if settings.max_coefficient is not None and settings.max_coefficient > 1:
        raised = coefficients * lift(coefficients, compared, settings.max_coefficient)
        coefficients = torch.where(members, raised, coefficients)
    state = State(step + counts, torch.where(counts, new_shares, shares), errors, agreements)
    return Decision(state, conflicts, coefficients, due)


def running_mean(mean: Tensor, value: Tensor, smoothing: float) -> Tensor:
    """The exponential running mean after one more value, starting at the first one."""
    return torch.where(mean == UNSEEN, value, torch.lerp(value, mean, smoothing))


def conflict_matrix(shares: Tensor, threshold: float) -> Tensor:
    r"""Which group outweighs which, :math:`X_{mk} = p_m > \tau\,p_k`, shape ``[N, N]``.

    Args:
        shares: Share of the gradient norm of each group, in [0, 1], shape ``[N]``.
        threshold: How many times the other share counts as a conflict, >= 1.

    Example:
        >>> conflict_matrix(torch.tensor([0.6, 0.3, 0.1]), threshold=2.5)[0].tolist()
        [False, False, True]
    """
    return shares[:, None] > threshold * shares[None, :]


def agreement_matrix(agreements: Tensor, ratio: float) -> Tensor:
    r"""Which group's gradients agree from step to step less than another's, :math:`a_m < \rho\,a_k`, shape ``[N, N]``.

    [R] A dominant group whose gradients still agree is learning, and slowing it down costs accuracy; one whose
    gradients point elsewhere at every batch fits what is left, noise most of all.

    Args:
        agreements: Running mean of the cosine between successive gradients of each group, shape ``[N]``; negative ones
            count as 0, NaN as no agreement known.
        ratio: The fraction of the other's agreement below which a group counts as done, in [0, 1].

    Example:
        >>> agreement_matrix(torch.tensor([0.1, 0.4]), ratio=0.5).tolist()
        [[False, True], [False, False]]
    """
    agreements = agreements.clamp(min=0)
    return agreements[:, None] < ratio * agreements[None, :]


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


def lift(coefficients: Tensor, shares: Tensor, most: float) -> Tensor:
    r"""The factor by which all coefficients rise, :math:`\lambda \geq 1`, shape ``[]``.

    [R] To slow the dominant group down or to speed the others up balances them alike, but the slow one may not finish
    in the steps there are. :math:`\lambda` is the largest factor that takes no coefficient above ``most`` and no norm
    times its coefficient above the largest norm, so that the dominant group's own coefficient stays at 1 or below.

    Args:
        coefficients: In [0, 1], one of them 1, shape ``[N]``.
        shares: Share of each group in the sum of the norms, NaN for who takes no part, shape ``[N]``.
        most: The largest coefficient allowed, >= 1.

    Example:
        >>> lift(torch.tensor([0.05, 1.0]), torch.tensor([0.9, 0.1]), most=20.0)
        tensor(9.)
    """
    shares = shares.nan_to_num()
    return (shares.amax() / (coefficients * shares).amax()).clamp(max=most)


def modulation(errors: Tensor, members: Tensor, alpha: float, centred: bool) -> Tensor:
    r"""The factor :math:`q_m = 1 - \tanh(\alpha\,\varphi(r_m))` where :math:`r_m > 1`, else 1, shape ``[N]``.

    :math:`r_m` is the score :math:`s_m = 1/(e_m + \epsilon)` over the mean score of the peers.

    Args:
        errors: Error of each group, >= 0, shape ``[N]``.
        members: Which groups take part, shape ``[N]``; the others get 1.
        alpha: Strength, >= 0.
        centred: Whether :math:`\varphi(r) = r - 1` [R], which starts at no modulation, instead of
            :math:`\varphi(r) = r` [P], which jumps from 1 to 0.24 at equality.

    Example:
        >>> modulation(torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bool), alpha=1.0, centred=False)
        tensor([0.0360, 1.0000])

    Reference:
        arXiv 2605.28575; Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022.
    """
    scores = torch.where(members, 1 / (errors + EPS), 0.0)
    # The mean over the peers is summed without the group's own score: subtracting it from the total would cancel.
    others = scores.expand(len(scores), -1).clone().fill_diagonal_(0).sum(1) / (members.sum() - 1)
    ratio = scores / others
    lead = ratio - 1 if centred else ratio
    return torch.where(members & (ratio > 1 + DEAD_BAND), 1 - torch.tanh(alpha * lead), 1.0)
