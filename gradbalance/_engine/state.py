"""What is remembered between the steps, as tensors on the device of the parameters."""

from collections.abc import Mapping
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._gradients.layout import on_host, wide

Window = tuple[int, int | None] | None
Flag = Tensor | bool  # a bool on the host, where looking costs nothing; on an accelerator a tensor, never looked at


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
    """The running means and the last decision.

    On an accelerator what is remembered is written in place, so that CUDA graphs may hold it.

    Attributes:
        step: Optimizer steps that counted, shape ``[]``.
        shares: Running mean, NaN where unknown, shape ``[N]``; so are ``coherences`` and ``errors``.
        decided: The coefficients that the rule gave last, shape ``[N]``.
        norms: Of the last step, shape ``[N]``.
        coefficients: Those of the last step, 1 where it did not count, shape ``[N]``.
        conflicts: Of the last step, bool, shape ``[N, N]``; None for what the coefficients show.
        has_errors: Whether errors were ever observed.
        complete: Whether every mean that is measured is known, of every group.
    """

    step: Tensor
    ones: Tensor

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
        """The last step's figures, without a host read; copy what is to outlast the next step."""
        c = self.coefficients
        conflicts = c[:, None] < c if self.conflicts is None else self.conflicts
        return Balance(self.norms, self.shares, self.coherences, self.errors, c, conflicts, self.step, self.names)

    def inside(self, window: Window, counts: Flag) -> Flag:
        """Whether a step counts and the next one lies inside a window of counted steps."""
        if window is None:
            return counts
        start, stop = window
        inside = (self.step >= start) & (self.step < (float("inf") if stop is None else stop))
        return counts and bool(inside) if on_host(self.home) else counts & inside

    def keep_deciding(self, window: Window, counts: Flag) -> Flag:
        """Keep what was decided, at a step that is not measured; whether it counts and lies inside the window."""
        due = self.inside(window, counts)
        if isinstance(due, bool):
            self.coefficients = self.decided if due else self.ones
        else:
            self.coefficients = torch.where(due, self.decided, 1.0)
        self._count(counts)
        return due

    def remember(self, counts: Flag, **new: Tensor | None) -> None:
        """Take new means and coefficients, if the step counts."""
        for name, value in new.items():
            if value is not None:
                if isinstance(counts, bool):
                    setattr(self, name, value)
                else:
                    old = getattr(self, name)
                    torch.where(counts, value, old, out=old)
        self._count(counts)

    def _count(self, counts: Flag) -> None:
        if isinstance(counts, bool):
            self.step = self.step + counts  # anew, as a rule may keep the one that it was given
        else:
            self.step.add_(counts)

    def to(self, home: torch.device) -> None:
        """Move to the device of the parameters."""
        if home != self.home:
            self.load(self.numbers(), home)

    def numbers(self) -> dict[str, Any]:
        """What is remembered, by group name, in builtin types, None for what is not known; a host read."""
        columns = torch.stack((self.shares, self.coherences, self.errors, self.decided), 1).tolist()
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
        rows = [[nan if groups[name][i] is None else groups[name][i] for name in self.names] for i in range(4)]
        self.shares, self.coherences, self.errors, self.decided = (
            torch.tensor(row, dtype=dtype, device=home) for row in rows
        )
        self.step = torch.tensor(numbers["step"], dtype=dtype, device=home)
        self.has_errors, self.complete = bool(numbers["errors"]), False
        self.ones, self.norms = torch.ones_like(self.decided), torch.zeros_like(self.decided)
        self.everyone = self.ones > 0
        self.coefficients = self.ones
        self.conflicts: Tensor | None = None
