"""What a rule is given, and what it returns."""

from numbers import Real
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


class Measured(NamedTuple):
    """What the engine measured, as numpy arrays on the host; N groups.

    A *group* is the parameters of one branch of a model: an encoder, a modality, a tower, a head.

    Attributes:
        names: The groups, in order.
        norms: Gradient norm of each group over all its shards, unscaled, shape ``[N]``. [P]
        shares: Running mean of each group's share of the sum of the norms, in [0, 1], NaN before
            its first, shape ``[N]``. It does not change when the loss is scaled, clipped or
            accumulated. [R]
        coherences: Running mean of the cosine between a group's gradient and the last one that it
            had, in [-1, 1], NaN before its first, shape ``[N]``. None for a rule with
            ``needs_coherence = False``. [R]
        coherence_errors: Standard errors of these means, inf before the third value, shape ``[N]``;
            or None. [R]
        useful: Running mean of that cosine times the share of the norm: the part of the gradient
            that the batch before already asked for, NaN before its first, shape ``[N]``; or None.
            To first order it is the decrease of the loss, per unit length of a step of the group,
            on data that the step was not computed from. [R]
        useful_errors: Standard errors of these means, inf before the third value, shape ``[N]``; or
            None. [R]
        errors: Running mean of the observed errors, lower is better, NaN for a group that is not
            observed, shape ``[N]``. None if no errors were ever observed. [P]
        active: Which groups have a finite norm above 0 at this step, bool, shape ``[N]``.
        scale_free: Whether a step of the optimizer is as long however large the gradient is: true
            for all but ``torch.optim.SGD`` and its subclasses. [R]
        coefficients: Coefficients in force, 1 at the start, shape ``[N]``.
        step: Number of optimizer steps that counted before this one.
        rates: Learning rate of each group, the largest of its ``param_groups``, shape ``[N]``; NaN
            where the host has none, as of a tensor on a GPU. None for what was measured elsewhere.

    Reference:
        Gradient coherence: Chatterjee, Coherent Gradients, ICLR 2020; Chatterjee and Zielinski,
        arXiv 2008.01217. The useful part is the derivative that hypergradient descent follows:
        Baydin et al., ICLR 2018.
    """

    names: tuple[str, ...]
    norms: Vector
    shares: Vector
    coherences: Vector | None
    coherence_errors: Vector | None
    useful: Vector | None
    useful_errors: Vector | None
    errors: Vector | None
    active: NDArray[np.bool_]
    scale_free: bool
    coefficients: Vector
    step: int
    rates: Vector | None = None


def check_number(name: str, value: object) -> None:
    """Check the kind of an option.

    Raises:
        TypeError: If it is not a real number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number. Got {value!r}. Pass a Python number.")


class Rule(Protocol):
    """A callable from :class:`Measured` to the coefficients, shape ``[N]``, finite and >= 0.

    A plain function is a rule. The answer may be anything that ``numpy.asarray`` takes, such as an
    array, a list or a CPU tensor, or a pair of coefficients and conflicts (bool, shape ``[N, N]``).
    Optional attributes of a rule:

    - ``needs_coherence = False``: the coherences are not measured, and cost nothing.
    - ``acts = False``: the answer is shown as ``proposed``, and never applied.
    - ``is_constant = True``: the answer depends on the names alone, so that it applies from the
      first step on.
    - ``state_dict()`` and ``load_state_dict(state)``: what the rule keeps between steps is saved in
      the optimizer's checkpoint.

    A rule is called only at steps that count, and only where the step is measured (``every``).
    """

    def __call__(self, measured: Measured, /) -> ArrayLike | tuple[ArrayLike, ArrayLike]:
        """The coefficient of each group, or a pair with who is slowed down for whose sake."""
