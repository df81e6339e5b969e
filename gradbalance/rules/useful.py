"""The default rule: a branch moves in proportion to the useful part of its gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gradbalance.rules.base import Measured, Vector, check_number

Matrix = NDArray[np.float64]

TINY = 1e-150  # below any share that matters: what is divided by is at least this


@dataclass(frozen=True)
class Useful:
    r"""Slows each branch whose gradient is of less use than that of another [R].

    .. math::
        c_k = \min_m\ \text{clip}\Bigl(\rho^u_{km}\,
        \max\bigl(1, \tfrac{a_k + e_{km}}{a_m}\bigr)^2 \max\bigl(1, \tfrac{\eta_k}{\eta_m}\bigr)^2,
        \ \tfrac{1}{\text{most}},\ 1\Bigr), \qquad \rho^x_{km} = 1 - \frac{s(x_m - x_k)}{x_m}

    - :math:`u_m` is the useful part of the gradient norm of group m and :math:`a_m` its coherence,
      negative ones counting as 0.
    - :math:`\rho^x_{km}`, in [0, 1], is how large :math:`x_k` is beside :math:`x_m` as far as that
      can be told from chance: of a difference d > 0 with the squared standard error v only
      :math:`s(d) = \max(0, d - v/d)` counts, and none of one below its standard error.
    - The first square spares a branch whose gradient is still small, but may be more coherent than
      that of the branch that is more useful now. :math:`e_{km}` is the standard error of
      :math:`a_k - a_m`.
    - The second square spares a branch that you gave a higher learning rate :math:`\eta`, as new
      layers beside a pretrained encoder have: it may be of little use beside the encoder, and has
      to learn nevertheless. Rates that are not known count as equal.

    So a group moves in proportion to the useful part of its gradient, the most useful one at your
    learning rate and none above it. SGD's steps are already as long as the gradient. There the
    coherence alone slows a branch, and one that is starved by a larger and less clear one is
    raised: with the shares :math:`p_m` of the norm, :math:`L_{mk} = \max(1, p_k/p_m)` and
    :math:`K_{mk} = (1/\rho^a_{km})^2`

    .. math::
        x_m = \max_k\ \min(K_{mk}, L_{mk}, \text{most})\,L_{mk}^{\min(1, \log_2 K_{mk})}, \qquad
        c_m = \min\Bigl(x_m\,\frac{\max p}{\max (x p)},\ \frac{\max n}{n_m},\ 20\Bigr).

    A branch with K of 2 comes up to the step of the one that dominates it, and beyond it as far as
    it is clearer still. The longest step becomes no longer, in the mean and by the norms n that
    were measured last: a gradient that has grown is raised no further than to the longest of them,
    and a group without one is not raised. With ``every``, and on an accelerator, these are the
    norms of an earlier step.

    It helps where a branch is noise, is worse than another or, under SGD, starves another. It does
    nothing where all branches are alike, or done. It can harm at the largest learning rates, where
    every branch turns at every step, and it slows a small new branch beside a pretrained one at the
    same rate. It cannot see that features leak the labels, and noise looks useful where a small
    training set agrees with itself. It needs a long memory, the default ``smoothing`` of .995: with
    a short one it takes a branch that has learned for one of noise.

    Args:
        most: How many times more slowly a branch moves at most, >= 1. Under SGD how much further
            than the one that dominates it.

    Shape:
        Coefficients ``[N]``. In ``[1 / most, 1]`` with a maximum of 1; under SGD in
        ``[1 / most, 20]``. 1 for a group whose means or standard errors are not known yet.

    Raises:
        ValueError: If ``most`` is out of its range.

    Example:
        >>> from gradbalance.rules import Measured
        >>> half = np.full(2, 0.5)
        >>> measured = Measured(
        ...     names=("speech", "noise"), norms=half, shares=half,
        ...     coherences=np.array([0.4, 0.2]), coherence_errors=np.zeros(2),
        ...     useful=np.array([0.2, 0.1]), useful_errors=np.zeros(2), errors=None,
        ...     active=np.ones(2, dtype=bool), scale_free=True, coefficients=np.ones(2), step=100,
        ... )
        >>> Useful()(measured).tolist()
        [1.0, 0.5]
        >>> unsure = measured._replace(useful_errors=np.full(2, 0.05))
        >>> Useful()(unsure).round(2).tolist()
        [1.0, 0.75]

    Reference:
        Gradient coherence: Chatterjee, Coherent Gradients, ICLR 2020; Chatterjee and Zielinski,
        arXiv 2008.01217. The useful part is the derivative that hypergradient descent follows:
        Baydin et al., ICLR 2018. s is the positive-part shrinkage of James and Stein, 1961. To
        scale the steps of groups by them is ours.
    """

    most: float = 10.0

    limit: ClassVar[float] = 20.0  # of a starved branch under SGD

    def __post_init__(self) -> None:
        check_number("most", self.most)
        if not 1 <= self.most < math.inf:
            raise ValueError(
                f"`most` must be finite and >= 1. Got {self.most}. "
                "Take 1 to leave all branches alone."
            )

    def __call__(self, measured: Measured) -> Vector:
        """The coefficients, shape ``[N]``."""
        coefficients = np.ones(len(measured.names))
        a, a_errors = measured.coherences, measured.coherence_errors
        u, u_errors = measured.useful, measured.useful_errors
        if a is None or a_errors is None or u is None or u_errors is None:
            return coefficients
        known = np.isfinite(a) & np.isfinite(a_errors) & np.isfinite(u) & np.isfinite(u_errors)
        if not known.any():
            return coefficients
        a, a_errors = np.maximum(a[known], 0), a_errors[known]
        u, u_errors = np.maximum(u[known], 0), u_errors[known]
        if measured.scale_free:
            rates = np.ones(len(known)) if measured.rates is None else measured.rates
            faster = _faster(rates[known])
            coefficients[known] = self._by_use(_ratios(u, u_errors), a, a_errors, faster)
        else:
            norms = np.where(measured.active, measured.norms, 0.0)[known]
            shares = measured.shares[known]
            coefficients[known] = self._by_share(_ratios(a, a_errors), shares, norms)
        return coefficients

    def _by_use(self, useful: Matrix, coherences: Vector, errors: Vector, faster: Matrix) -> Vector:
        highest = coherences[:, None] + np.hypot(errors, errors[:, None])
        highest = np.minimum(highest, 1)  # a cosine is not larger
        clearer = np.maximum(highest / np.maximum(coherences, TINY), 1)
        spared = np.square(np.minimum(clearer * faster, 1 / TINY))
        coefficients: Vector = np.clip(useful * spared, 1 / self.most, 1).min(axis=1)
        return coefficients

    def _by_share(self, coherent: Matrix, shares: Vector, norms: Vector) -> Vector:
        clearer = np.square(1 / np.maximum(coherent.T, TINY))
        shares = np.maximum(shares, TINY)
        longer = np.maximum(shares / shares[:, None], 1)
        pairs = np.minimum(np.minimum(clearer, longer), self.most)
        further = (pairs * longer ** np.minimum(np.log2(clearer), 1)).max(axis=1)
        paid = shares.max() / (further * shares).max()
        of_longest = np.where(norms > 0, norms / max(norms.max(), TINY), 1)
        coefficients: Vector = np.minimum(
            further * paid, 1 / np.maximum(of_longest, 1 / self.limit)
        )
        return coefficients


def _faster(rates: Vector) -> Matrix:
    r"""How many times the learning rate of one group is that of another, at least 1, ``[N, N]``.

    Example:
        >>> _faster(np.array([1.0, 4.0, np.nan])).tolist()
        [[1.0, 1.0, 1.0], [4.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    with np.errstate(all="ignore"):
        ratios: Matrix = rates[:, None] / rates
    return np.fmin(np.fmax(ratios, 1), 1 / TINY)


def _ratios(values: Vector, errors: Vector) -> Matrix:
    r"""How large one value is beside another, :math:`\rho_{km}`, shape ``[N, N]``.

    Args:
        values: At least 0, shape ``[N]``.
        errors: Their standard errors, shape ``[N]``.

    Example:
        >>> _ratios(np.array([1.0, 3.0]), np.array([0.0, 1.0])).tolist()
        [[1.0, 0.5], [1.0, 1.0]]
    """
    differences = np.maximum(values - values[:, None], 0)
    chance = np.hypot(errors, errors[:, None])
    # At most 1, where nothing is certain, so that no square overflows.
    doubt = chance / np.maximum(np.maximum(differences, chance), TINY)
    certain = differences * (1 - np.square(doubt))
    ratios: Matrix = 1 - certain / np.maximum(values, TINY)
    return ratios
