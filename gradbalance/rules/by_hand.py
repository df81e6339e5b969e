"""Coefficients that do not depend on what was measured: constants, or none at all."""

import torch
from torch import Tensor

from gradbalance.rules.base import Measured


class ByHand:
    """Constant coefficients, 1 for a group that is not named: the strong simple rival of every rule.

    It helps where you know the branch that is too fast or too slow. It is also the way to test an optimizer.

    Args:
        **factors: The coefficient of a group, >= 0.

    Raises:
        ValueError: If a factor is negative or not finite; at the first step, if it names no group.

    Example:
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

    def __init__(self, **factors: float) -> None:
        for name, factor in factors.items():
            if not 0 <= factor < float("inf"):
                raise ValueError(
                    f"`{name}` must be a finite factor >= 0. Got {factor}. Take 1 to leave the group alone."
                )
        self.factors = factors

    def __call__(self, measured: Measured) -> Tensor:
        """The constants, shape ``[N]``."""
        if unknown := self.factors.keys() - set(measured.names):
            raise ValueError(
                f"`ByHand` must name groups. Got {', '.join(sorted(unknown))}. "
                f"The groups are: {', '.join(measured.names)}."
            )
        # Filled on the device: a CUDA graph cannot capture a copy from the host.
        return torch.stack([measured.norms.new_full((), self.factors.get(name, 1.0)) for name in measured.names])

    def __repr__(self) -> str:
        return f"ByHand({', '.join(f'{name}={factor}' for name, factor in self.factors.items())})"


class Watch:
    """Coefficients of 1: look first, decide then. Everything is measured, and the optimizer steps as if alone.

    Example:
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rule=Watch())
        >>> (3 * text(torch.zeros(1, 2)) + audio(torch.zeros(1, 2))).sum().backward()
        >>> optimizer.step()
        >>> penalty.balance.shares.tolist()
        [0.75, 0.25]
    """

    acts = False

    def __call__(self, measured: Measured) -> Tensor:
        """All 1, shape ``[N]``."""
        return torch.ones_like(measured.norms)

    def __repr__(self) -> str:
        return "Watch()"
