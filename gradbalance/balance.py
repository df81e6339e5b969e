"""What one step measured and decided, for people, recorders and loggers."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Balance"]

Vector = NDArray[np.float64]


class Balance(NamedTuple):
    """What was measured and decided at a step, as numpy arrays on the host; N groups.

    On an accelerator the measurements are those of the step before, see
    :class:`gradbalance.ConflictAwarePenalty`.

    Attributes:
        names: The groups, in order.
        step: Number of optimizer steps that counted.
        norms: Gradient norm of each group, shape ``[N]``.
        shares: Running mean of each group's share of the sum of the norms, NaN before its first,
            shape ``[N]``.
        cosines: Cosine between each group's gradient at this step and the last one that it had, NaN
            where there is none, shape ``[N]``.
        coherences: Running mean of the cosine between successive gradients of a group, NaN before
            its first, shape ``[N]``.
        coherence_errors: Standard errors of the coherences, inf before the third value, shape
            ``[N]``.
        useful: Running mean of the useful part of each group's share, NaN before its first, shape
            ``[N]``.
        useful_errors: Standard errors of the useful parts, inf before the third value, shape
            ``[N]``.
        errors: Running mean of the observed errors, NaN where none is in force, shape ``[N]``.
        moved: Length of a step of each group, divided by that of its parameters, on a sketch of
            their entries, at the last step that was read: while a :class:`gradbalance.Recorder`
            listens these are its first 32 steps and about one of 7 after them, each known at the
            next one. NaN where nothing was read yet, and for a group that had no gradient then and
            stood still, shape ``[N]``.
        coefficients: Factor on the step of each group, shape ``[N]``.
        proposed: What the rule answered, whether or not it was applied, shape ``[N]``.
        conflicts: ``conflicts[m, k]``: group m is slowed down for the sake of group k, as the rule
            reports, else where the coefficient of m is the smaller one; bool, shape ``[N, N]``.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> penalty = attach(optimizer, {"text": text, "audio": audio})
        >>> (3 * text(torch.zeros(1, 1)) + audio(torch.zeros(1, 1))).sum().backward()
        >>> optimizer.step()
        >>> penalty.balance.shares.tolist()
        [0.75, 0.25]
    """

    names: tuple[str, ...]
    step: int
    norms: Vector
    shares: Vector
    cosines: Vector
    coherences: Vector
    coherence_errors: Vector
    useful: Vector
    useful_errors: Vector
    errors: Vector
    moved: Vector
    coefficients: Vector
    proposed: Vector
    conflicts: NDArray[np.bool_]
