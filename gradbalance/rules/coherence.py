"""The default rule: a branch moves as far as its gradients agree from step to step."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradbalance.rules.base import Measured, Vector, check_number

TINY = 1e-150  # below any share: shares are divided by


@dataclass(frozen=True)
class Coherence:
    r"""Branches whose gradients agree from step to step take larger steps than those of noise [R].

    The coherence :math:`a_m`, the running cosine between successive gradients of a branch, is high
    while all batches ask for the same change and near 0 where each asks for another one: the branch
    then fits noise. In three steps:

    1. how much clearer is m than k: :math:`K_{mk} = ((a_m + \epsilon)/(a_k + \epsilon))^2`, at
       least 1, negative :math:`a` counting as 0;
    2. how much further should m go: :math:`x_m = \max_k \min(K_{mk}, \text{most})` where a step is
       as long however large the gradient (Adam, AdamW, Muon). Under SGD, with :math:`L_{mk} =
       \max(1, p_k/p_m)` from the shares p of the norm, :math:`x_m = \max_k \min(K_{mk}, L_{mk},
       \text{most})\,L_{mk}^{\min(1, \log_2 K_{mk})}`: a starved branch comes up to the step of the
       one that dominates it, and above it, only as far as it is clearer;
    3. who pays: :math:`c_m = x_m\,(\max p / \max (x p))^{1 - \beta}`, with p = 1 but under SGD.
       With :math:`\beta = 0`, under SGD always, the longest step stays as long as it was and the
       others are slowed down; with :math:`\beta = 1` the least clear branch keeps your learning
       rate and the others are raised. :math:`\beta = \min(1, \max a / \text{clear})`: where even
       the clearest branch turns at every step the learning rate is at its limit.

    It helps where a branch is noise, is worse than another or, under SGD, starves another. It does
    nothing where all branches are alike, or done. It cannot see that features leak the labels,
    which looks coherent, and it takes a large pretrained branch, less coherent than small ones
    beside it, for the noisier one.

    Args:
        most: The largest ratio between branches for the sake of coherence alone, >= 1.
        chance: :math:`\epsilon`, about the coherence that noise can have, the batch over the
            training set, > 0. Far below it all branches are alike.
        clear: The coherence from which on a branch is raised at the cost of none, > 0.

    Shape:
        Coefficients ``[N]``, in ``[1 / most, most]``, under SGD up to 20; 1 for a branch that is
        not active or has no coherence yet.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> from gradbalance.rules import Measured
        >>> half = np.full(2, 0.5)
        >>> measured = Measured(
        ...     names=("speech", "noise"), norms=half, shares=half,
        ...     coherences=np.array([0.3, 0.1]), coherence_errors=np.zeros(2),
        ...     useful=np.array([0.15, 0.05]), useful_errors=np.zeros(2), errors=None,
        ...     active=np.ones(2, dtype=bool), scale_free=True, coefficients=np.ones(2), step=100,
        ... )
        >>> Coherence()(measured).tolist()
        [3.0, 1.0]

    Reference:
        Gradient coherence: Chatterjee, Coherent Gradients, ICLR 2020; Chatterjee and Zielinski,
        arXiv 2008.01217. To scale steps by it is ours.
    """

    most: float = 3.0
    chance: float = 0.1
    clear: float = 0.3

    limit: ClassVar[float] = 20.0  # of a starved branch under SGD

    def __post_init__(self) -> None:
        check_number("most", self.most)
        if not 1 <= self.most < math.inf:
            raise ValueError(
                f"`most` must be finite and >= 1. Got {self.most}. "
                "Take 1 to leave all branches alone."
            )
        for name in ("chance", "clear"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"`{name}` must be finite and > 0. Got {value}. A coherence is at most 1."
                )

    def __call__(self, measured: Measured) -> Vector:
        """The coefficients, shape ``[N]``."""
        coefficients = np.ones(len(measured.names))
        if measured.coherences is None:
            return coefficients
        known = ~np.isnan(measured.coherences)
        if known.any():
            coherences = np.maximum(measured.coherences[known], 0)
            if measured.scale_free:
                coefficients[known] = self._by_coherence(coherences)
            else:
                coefficients[known] = self._by_share(coherences, measured.shares[known])
        return coefficients

    def _by_coherence(self, coherences: Vector) -> Vector:
        signals = coherences + self.chance
        further = np.minimum(np.square(signals / signals.min()), self.most)
        beta = min(1.0, coherences.max() / self.clear)
        coefficients: Vector = further * further.max() ** (beta - 1)
        return coefficients

    def _by_share(self, coherences: Vector, shares: Vector) -> Vector:
        shares = np.maximum(shares, TINY)
        signals = coherences + self.chance
        clearer = np.maximum(np.square(signals[:, None] / signals), 1)
        longer = np.maximum(shares / shares[:, None], 1)
        pairs = np.minimum(np.minimum(clearer, self.most), longer)
        further = (pairs * longer ** np.minimum(np.log2(clearer), 1)).max(1)
        paid = shares.max() / (further * shares).max()
        coefficients: Vector = np.minimum(further * paid, self.limit)
        return coefficients
