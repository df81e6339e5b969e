"""The default rule: a branch moves as far as its gradients agree from step to step, not as far as they are large."""

from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbalance.rules.base import Measured

TINY = 1e-150  # below any share: what is divided by


@dataclass(frozen=True)
class Coherence:
    r"""Let the branches whose gradients agree from step to step move further than those whose gradients are noise [R].

    The coherence :math:`a_m`, the running cosine between successive gradients of a branch, is high while all batches
    ask for the same change and near 0 where each asks for another one: the branch then fits noise. In three steps:

    1. how much clearer is m than k: :math:`K_{mk} = ((a_m + \epsilon)/(a_k + \epsilon))^2`, at least 1, negative
       :math:`a` counting as 0;
    2. how much further should m go: :math:`x_m = \max_k \min(K_{mk}, \text{most})` where a step is as long however
       large the gradient (Adam, AdamW, Muon). Under SGD, with :math:`L_{mk} = \max(1, p_k/p_m)` from the shares p of
       the norm, :math:`x_m = \max_k \min(K_{mk}, L_{mk}, \text{most})\,L_{mk}^{\min(1, \log_2 K_{mk})}`: a starved
       branch comes up to the step of the one that dominates it, and above it, only as far as it is clearer;
    3. who pays: :math:`c_m = x_m\,(\max p / \max (x p))^{1 - \beta}`, p = 1 but under SGD. With :math:`\beta = 0`,
       under SGD always, the longest step stays as long as it was and the others are damped; with :math:`\beta = 1` the
       least clear branch keeps your learning rate and the others are raised. :math:`\beta = \min(1, \max a /
       \text{clear})`: where even the clearest branch turns at every step the learning rate is at its limit.

    It helps where a branch is noise, is worse than another or, under SGD, starves another. It does nothing where all
    branches are alike, or done. It cannot see that features leak the labels, which looks coherent, and it takes a large
    pretrained branch, less coherent than small ones beside it, for the noisier one.

    Args:
        most: The largest ratio between branches for the sake of coherence alone, >= 1.
        chance: :math:`\epsilon`, about the coherence that noise can have, the batch over the training set, > 0. Far
            below it all branches are alike.
        clear: The coherence from which on a branch is raised at the cost of none, > 0.

    Shape:
        Coefficients ``[N]``, in ``[1 / most, most]``, under SGD up to 20; 1 for a branch that is not active or has no
        coherence yet.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> from gradbalance.rules import Measured
        >>> half, both = torch.full((2,), 0.5), torch.ones(2, dtype=torch.bool)
        >>> measured = Measured(
        ...     names=("speech", "noise"), norms=half, shares=half, coherences=torch.tensor([0.3, 0.1]), errors=None,
        ...     active=both, scale_free=True, coefficients=2 * half, step=torch.tensor(100),
        ... )
        >>> Coherence()(measured)
        tensor([3., 1.])

    Reference:
        Gradient coherence: Chatterjee, Coherent Gradients, ICLR 2020; Chatterjee and Zielinski, arXiv 2008.01217. To
        scale steps by it is ours.
    """

    most: float = 3.0
    chance: float = 0.1
    clear: float = 0.3

    limit: ClassVar[float] = 20.0  # of a starved branch under SGD

    def __post_init__(self) -> None:
        if not 1 <= self.most < float("inf"):
            raise ValueError(f"`most` must be finite and >= 1. Got {self.most}. Take 1 to leave all branches alone.")
        for name in ("chance", "clear"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be finite and > 0. Got {value}. A coherence is at most 1.")

    def __call__(self, measured: Measured) -> Tensor:
        """The coefficients, shape ``[N]``."""
        if measured.coherences is None:
            return torch.ones_like(measured.shares)
        signal = measured.coherences.clamp(min=0) + self.chance
        if measured.scale_free:
            least = signal.nan_to_num(nan=torch.inf).amin()
            further = (signal / least).square().clamp(max=self.most)
            beta = (measured.coherences.nan_to_num(nan=0.0).amax() / self.clear).clamp(0.0, 1.0)
            paid = further.nan_to_num(nan=1.0).amax() ** (beta - 1)
            return (further * paid).nan_to_num(nan=1.0)
        known = ~signal.isnan()
        shares = torch.where(known, measured.shares, 0.0)
        clearer = (signal[:, None] / signal).square().clamp(min=1.0)
        longer = (shares / shares[:, None]).clamp(min=1.0)
        further = torch.minimum(clearer.clamp(max=self.most), longer) * longer ** clearer.log2().clamp(max=1.0)
        further = torch.where(known[:, None] & known, further, 1.0).amax(1)
        paid = shares.amax() / (further * shares).amax()
        return torch.where(known, (further * paid).clamp(max=self.limit), 1.0)

    def in_numbers(self, measured: Any) -> list[float]:
        """The same for lists of floats, which is how the engine asks on the host."""
        if measured.coherences is None:
            return [1.0] * len(measured.names)
        a = {m: max(value, 0.0) for m, value in enumerate(measured.coherences) if value == value}
        if measured.scale_free:
            p = dict.fromkeys(a, 1.0)
            least = min(a.values(), default=0.0) + self.chance
            x = {m: min(((a[m] + self.chance) / least) ** 2, self.most) for m in a}
            beta, limit = min(1.0, max(a.values(), default=0.0) / self.clear), self.most
        else:
            p = {m: max(measured.shares[m], TINY) for m in a}
            x = {m: max(self._further(a[m], a[k], p[k] / p[m]) for k in a) for m in a}
            beta, limit = 0.0, self.limit
        before, after = max(p.values(), default=1.0), max((x[m] * p[m] for m in a), default=1.0)
        paid = (before / after) ** (1 - beta)
        return [min(x[m] * paid, limit) if m in a else 1.0 for m in range(len(measured.names))]

    def _further(self, mine: float, other: float, ratio: float) -> float:
        clearer, longer = max(((mine + self.chance) / (other + self.chance)) ** 2, 1.0), max(ratio, 1.0)
        further: float = min(clearer, longer, self.most) * longer ** min(log2(clearer), 1.0)
        return further
