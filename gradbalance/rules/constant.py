"""Rules that do not act on what was measured: constant factors, or none at all."""

import math

import numpy as np
from numpy.typing import ArrayLike

from gradbalance.rules.base import Measured, Rule, Vector, check_number


class ByHand:
    """Constant coefficients, 1 for a group that is not named: the simple rival of every rule.

    It helps where you know which branch is too fast or too slow. It is also the way to test an
    optimizer.

    Args:
        **factors: Coefficient of a group, >= 0.

    Raises:
        TypeError: If a factor is not a number.
        ValueError: If a factor is negative or not finite; when the optimizer is wrapped, if it
            names no group.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rule=ByHand(text=0.1))
        >>> (text(torch.ones(1, 2)) + audio(torch.ones(1, 2))).sum().backward()
        >>> optimizer.step()
        >>> penalty.coefficients()
        {'text': 0.1, 'audio': 1.0}
    """

    needs_coherence = False
    is_constant = True

    def __init__(self, /, **factors: float) -> None:
        for name, factor in factors.items():
            check_number(name, factor)
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"`{name}` must be a finite factor >= 0. Got {factor}. "
                    "Take 1 to leave the group alone."
                )
        self.factors = factors

    def __call__(self, measured: Measured) -> Vector:
        """The constants, shape ``[N]``."""
        unknown = self.factors.keys() - set(measured.names)
        if unknown:
            raise ValueError(
                f"`ByHand` must name groups. Got {', '.join(sorted(unknown))}. "
                f"The groups are: {', '.join(measured.names)}."
            )
        return np.array([self.factors.get(name, 1.0) for name in measured.names])

    def __repr__(self) -> str:
        return f"ByHand({', '.join(f'{name}={factor}' for name, factor in self.factors.items())})"


class Watch:
    """Coefficients of 1: look first, decide then.

    Everything is measured, and the optimizer steps as if alone.

    Args:
        rule: A rule whose answers are recorded as ``proposed`` and not applied. None proposes 1.

    Raises:
        TypeError: If the rule is not callable.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> rule = Watch(ByHand(text=0.1))
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rule=rule)
        >>> (3 * text(torch.zeros(1, 2)) + audio(torch.zeros(1, 2))).sum().backward()
        >>> optimizer.step()
        >>> penalty.coefficients(), penalty.balance.proposed.tolist()
        ({'text': 1.0, 'audio': 1.0}, [0.1, 1.0])
    """

    acts = False

    def __init__(self, rule: Rule | None = None) -> None:
        if rule is not None and (isinstance(rule, type) or not callable(rule)):
            raise TypeError(
                f"`rule` must be a callable from Measured to coefficients. Got {rule!r}. "
                "Pass an instance, such as rules.ConflictAware(), or a function."
            )
        self.rule = rule

    def __call__(self, measured: Measured) -> ArrayLike | tuple[ArrayLike, ArrayLike]:
        """What the watched rule proposes, shape ``[N]``."""
        if self.rule is None:
            return np.ones(len(measured.names))
        return self.rule(measured)

    def __repr__(self) -> str:
        return f"Watch({'' if self.rule is None else repr(self.rule)})"
