"""What a rule is given, and what it gives back."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Measured(NamedTuple):
    """What the engine measured at a step, as tensors on the device of the parameters; N groups.

    Attributes:
        names: The groups, in order.
        norms: Gradient norm of each group over all its shards, unscaled, shape ``[N]``. [P]
        shares: Running mean of each group's part in the sum of the norms, NaN before its first, shape ``[N]``. It
            does not change when the loss is scaled, clipped or accumulated. [R]
        coherences: Running mean of the cosine between successive gradients of a group, in [-1, 1], NaN before the
            second step and for a group that is not active, shape ``[N]``. None for a rule with ``needs_coherence =
            False``. [R]
        errors: Running mean of the observed errors, lower is better, NaN for a group that is not observed, shape
            ``[N]``. None if none ever was. [P]
        active: Which groups have a finite norm above 0, bool, shape ``[N]``.
        scale_free: Whether a step of the optimizer is as long however large the gradient: true but for SGD. [R]
        coefficients: Those in force, 1 at the start, shape ``[N]``.
        step: Optimizer steps that counted, shape ``[]``.

    Reference:
        Gradient coherence: Chatterjee, Coherent Gradients, ICLR 2020; Chatterjee and Zielinski, arXiv 2008.01217.
    """

    names: tuple[str, ...]
    norms: Tensor
    shares: Tensor
    coherences: Tensor | None
    errors: Tensor | None
    active: Tensor
    scale_free: bool
    coefficients: Tensor
    step: Tensor


class Rule(Protocol):
    """A callable from :class:`Measured` to coefficients ``[N]``, finite and >= 0, or to these and conflicts ``[N, N]``.

    A plain function will do. What a rule may have besides:

    - ``needs_coherence = False``: the coherences are not measured, which then cost nothing.
    - ``acts = False``: the coefficients are shown but never applied.
    - ``in_numbers(measured)``: the same as its call, with lists of floats for tensors and without conflicts. The engine
      asks it instead where the parameters are on the CPU: a small model's step is then shorter.
    - ``state_dict()`` and ``load_state_dict(state)``: what it keeps between steps goes into the optimizer's checkpoint.
      Such a rule is asked only at steps that count; on an accelerator to know that costs a host read.

    Tensors stay on the device: a host read (``item``, ``if`` on a tensor) would stall an accelerator at every step.
    """

    def __call__(self, measured: Measured, /) -> Tensor | tuple[Tensor, Tensor]:
        """The coefficient of each group, ``[N]``; or a pair with who is damped for whose sake, bool, ``[N, N]``."""
