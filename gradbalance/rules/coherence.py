"""The default rule: a branch moves as far as its gradients agree from step to step, not as far as they are large."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbalance.rules.base import Measured


@dataclass(frozen=True)
class Coherence:
    r"""Raise the branches whose gradients agree from step to step above those whose gradients are mostly noise [R].

    The coherence :math:`a_m`, the running cosine between successive gradients of a branch, is near 1 while all batches
    ask for the same change and near 0 where each asks for another one: the branch then fits noise. With
    :math:`K_{mk} = \max(1, ((a_m + \epsilon)/(a_k + \epsilon))^2)`, negative :math:`a` taken as 0,

    - where a step is as long however large the gradient (Adam, AdamW, Muon), :math:`c_m = \max_k K_{mk}`, at most
      ``most``: the least coherent branch keeps the learning rate that you chose;
    - else (SGD) with :math:`L_{mk} = \max(1, p_k/p_m)`, p the shares of the norm,
      :math:`x_m = \max_k \min(K_{mk}, L_{mk}, \text{most})\,L_{mk}^{\min(1, \log_2 K_{mk})}`: a starved branch is
      raised to the step of the one that dominates it, and above, only as far as it is more coherent;
      :math:`c_m = x_m \max p / \max (x p)`, so that the longest step stays as long as it was.

    It helps where a branch is noise, is worse than another or, under SGD, starves another. It does nothing where all
    are alike or all are done. It cannot tell a branch whose features leak the labels, which looks coherent, nor a
    large pretrained one, which looks less coherent than small ones beside it: it then raises these.

    Args:
        most: The largest ratio between branches for the sake of coherence alone, >= 1.
        chance: :math:`\epsilon`, about the coherence that noise alone can have, the batch over the training set, > 0.
            Far below it all branches are alike.
        limit: The largest coefficient of a starved branch, >= 1; under SGD alone.

    Shape:
        Coefficients ``[N]``, in ``[1, most]``, under SGD in ``[1 / most, limit]``; 1 for a branch that is not active or
        has no coherence yet.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> from gradbalance.rules import Measured
        >>> nothing, seen = torch.zeros(2), torch.ones(2, dtype=torch.bool)
        >>> measured = Measured(
        ...     ("speech", "noise"), nothing, torch.tensor([0.5, 0.5]), coherences=torch.tensor([0.2, 0.1]),
        ...     errors=None, active=seen, scale_free=True, coefficients=torch.ones(2), step=torch.tensor(100),
        ... )
        >>> Coherence()(measured)
        tensor([2.2500, 1.0000])

    Reference:
        Gradient coherence: Chatterjee, Coherent Gradients, ICLR 2020; Chatterjee and Zielinski, arXiv 2008.01217. To
        scale steps by it is ours.
    """

    most: float = 3.0
    chance: float = 0.1
    limit: float = 20.0

    def __post_init__(self) -> None:
        for name, low in (("most", 1), ("chance", 0), ("limit", 1)):
            value = getattr(self, name)
            if not low <= value < float("inf") or (name == "chance" and value == 0):
                sign = ">" if name == "chance" else ">="
                raise ValueError(
                    f"`{name}` must be finite and {sign} {low}. Got {value}. Choose a value in that range."
                )

    def __call__(self, measured: Measured) -> Tensor:
        """The coefficients, shape ``[N]``."""
        if measured.coherences is None:
            return torch.ones_like(measured.shares)
        signal = measured.coherences.clamp(min=0) + self.chance
        if measured.scale_free:
            least = signal.nan_to_num(nan=torch.inf).amin()
            return (signal / least).square().clamp(max=self.most).nan_to_num(nan=1.0)
        known = ~signal.isnan()
        shares = torch.where(known, measured.shares, 0.0)
        clearer = (signal[:, None] / signal).square().clamp(min=1.0)
        longer = (shares / shares[:, None]).clamp(min=1.0)
        raised = torch.minimum(clearer.clamp(max=self.most), longer) * longer ** clearer.log2().clamp(max=1.0)
        raised = torch.where(known[:, None] & known, raised, 1.0).amax(1)
        steps = torch.where(known, raised * shares, 0.0)
        return torch.where(known, (raised * (shares.amax() / steps.amax())).clamp(max=self.limit), 1.0)
