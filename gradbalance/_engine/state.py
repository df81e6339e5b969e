"""What is remembered between the steps, as tensors on the device of the parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._gradients.layout import wide


class Balance(NamedTuple):
    """What was measured and decided in the last step, as device tensors.

    Attributes:
        norms: Gradient norm of each group, shape ``[N]``.
        shares: Running share of each group in the sum of the norms, NaN before the first, shape ``[N]``.
        coherences: Running cosine between successive gradients of each group, NaN where not known, shape ``[N]``.
        errors: Running error of each group, NaN where none is in force, shape ``[N]``.
        coefficients: Coefficient of each group, shape ``[N]``.
        conflicts: ``conflicts[m, k]``: group m is damped for the sake of group k, as the rule says, else
            :math:`c_m < c_k`; bool, shape ``[N, N]``.
        step: Optimizer steps that counted, shape ``[]``.
        names: The groups, in order.

    Example:
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> penalty = attach(optimizer, {"text": text, "audio": audio})
        >>> (3 * text(torch.zeros(1, 1)) + audio(torch.zeros(1, 1))).sum().backward()
        >>> optimizer.step()
        >>> penalty.balance.shares.tolist()
        [0.75, 0.25]
    """

    norms: Tensor
    shares: Tensor
    coherences: Tensor
    errors: Tensor
    coefficients: Tensor
    conflicts: Tensor
    step: Tensor
    names: tuple[str, ...]


class State:
    """The running means and the last decision; what is remembered is written in place, so that CUDA graphs may hold it.

    Attributes:
        step: Optimizer steps that counted, shape ``[]``.
        means: Running shares, coherences and errors, NaN where unknown, shape ``[3, N]``.
        norms: Of the last step, shape ``[N]``.
        decided: The coefficients that the rule gave last, shape ``[N]``.
        coefficients: Those of the last step, 1 where it did not count, shape ``[N]``.
        conflicts: Of the last step, bool, shape ``[N, N]``.
        has_errors: Whether errors were ever observed.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        nothing = dict.fromkeys(names, (None, None, None, 1.0))
        self.load({"step": 0.0, "groups": nothing, "errors": False}, torch.device("cpu"))

    @property
    def home(self) -> torch.device:
        """The device of the tensors."""
        return self.step.device

    @property
    def balance(self) -> Balance:
        """A copy of the last step's figures, without a host read."""
        shares, coherences, errors = self.means.clone()
        coefficients, conflicts, step = self.coefficients.clone(), self.conflicts.clone(), self.step.clone()
        return Balance(self.norms.clone(), shares, coherences, errors, coefficients, conflicts, step, self.names)

    def inside(self, window: tuple[int, int | None] | None) -> Tensor:
        """Whether the next step lies inside a window of counted steps, bool, shape ``[]``."""
        if window is None:
            return self._always
        start, stop = window
        return (self.step >= start) & (self.step < (float("inf") if stop is None else stop))

    def keep_deciding(self, window: tuple[int, int | None] | None, fresh: Tensor | bool) -> Tensor:
        """A step that is not measured, if it counts: the coefficients stay as decided; whether it lies in the window."""
        due = self.inside(window) & fresh
        self.coefficients = torch.where(due, self.decided, 1.0)
        self.step.add_(fresh)
        return due

    def remember(self, counts: Tensor, means: Tensor, decided: Tensor) -> None:
        """Take the new means and coefficients, in place, if the step counts."""
        self.means.copy_(torch.where(counts, means, self.means))
        self.decided.copy_(torch.where(counts, decided, self.decided))
        self.step.add_(counts)

    def to(self, home: torch.device) -> None:
        """Move to the device of the parameters."""
        if home != self.home:
            self.load(self.numbers(), home)

    def numbers(self) -> dict[str, Any]:
        """What is remembered, by group name, in builtin types, None for what is not known; a host read."""
        columns = torch.cat((self.means, self.decided[None])).T.tolist()
        columns = [[None if x != x else x for x in column] for column in columns]  # checkpoints may be compared
        groups = dict(zip(self.names, columns, strict=True))
        return {"step": self.step.item(), "groups": groups, "errors": self.has_errors}

    def load(self, numbers: Mapping[str, Any], home: torch.device | None = None) -> None:
        """Take what :meth:`numbers` gave, for the same groups in any order.

        Raises:
            ValueError: If it is that of other groups.
        """
        groups = numbers["groups"]
        if set(groups) != set(self.names):
            raise ValueError(
                f"`state_dict` must hold the state of the groups {', '.join(self.names)}. Got {', '.join(groups)}. "
                "Load a checkpoint of the same groups, or build with `persist=False`."
            )
        home = self.home if home is None else home
        dtype = wide(home)
        columns = [[float("nan") if x is None else x for x in groups[name]] for name in self.names]
        rows = torch.tensor(columns, dtype=dtype, device=home).T
        self.step = torch.tensor(numbers["step"], dtype=dtype, device=home)
        self.means, self.decided = rows[:3].contiguous(), rows[3].contiguous()
        self.norms, self.coefficients = torch.zeros_like(self.decided), torch.ones_like(self.decided)
        self.conflicts = torch.zeros(len(self.names), len(self.names), dtype=torch.bool, device=home)
        self.has_errors = bool(numbers["errors"])
        self._always = torch.ones((), dtype=torch.bool, device=home)
