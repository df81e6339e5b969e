"""What is remembered between the steps."""

from collections.abc import Mapping
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._gradients.layout import numbers, on_host, wide

Window = tuple[int, int | None] | None
Flag = Tensor | bool  # on an accelerator a tensor, never looked at


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
    """The running means and the last decision: lists of numbers on the host, tensors on an accelerator.

    There what is remembered is written in place, so that CUDA graphs may hold it.

    Attributes:
        home: The device of the parameters.
        on_host: Whether that is the host.
        step: Optimizer steps that counted.
        shares: Running mean of each group, NaN where unknown; so are ``coherences`` and ``errors``.
        decided: The coefficients that the rule gave last.
        norms: Of the last step.
        coefficients: Those of the last step, 1 where it did not count.
        conflicts: Of the last step, a tensor of bool, shape ``[N, N]``; None for what the coefficients show.
        has_errors: Whether errors were ever observed.
    """

    home: torch.device
    on_host: bool
    step: Any
    decided: Any
    ones: Any

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        nothing = dict.fromkeys(names, (None, None, None, 1.0))
        self.load({"step": 0.0, "groups": nothing, "errors": False}, torch.device("cpu"))

    @property
    def balance(self) -> Balance:
        """The last step's figures, without a host read; copy what is to outlast the next step."""
        rows = (self.norms, self.shares, self.coherences, self.errors, self.coefficients, self.step)
        norms, shares, coherences, errors, c, step = map(self.tensor, rows)
        conflicts = c[:, None] < c if self.conflicts is None else self.conflicts
        return Balance(norms, shares, coherences, errors, c, conflicts, step, self.names)

    def inside(self, window: Window) -> Any:
        """Whether the next step lies inside a window of counted steps."""
        if window is None:
            return True
        start, stop = window
        return (self.step >= start) & (self.step < (inf if stop is None else stop))

    def keep_deciding(self, window: Window, counts: Flag) -> Flag:
        """Keep what was decided, at a step that is not measured; whether it counts and lies inside the window."""
        counts = bool(counts) if self.on_host else counts
        due: Flag = self.inside(window) & counts
        if isinstance(due, bool):
            self.coefficients = self.decided if due else self.ones
        else:
            self.coefficients = torch.where(due, self.decided, 1.0)
        self.step += counts
        return due

    def remember_if(self, counts: Flag, **new: Tensor | None) -> None:
        """On an accelerator, take new means and coefficients, if the step counts."""
        for name, value in new.items():
            if value is not None:
                old = getattr(self, name)
                torch.where(torch.as_tensor(counts, device=self.home), value, old, out=old)
        self.step += counts

    def to(self, home: torch.device) -> None:
        """Move to the device of the parameters."""
        if home != self.home:
            self.load(self.numbers(), home)

    def numbers(self) -> dict[str, Any]:
        """What is remembered, by group name, in builtin types, None for what is not known; a host read."""
        rows = map(numbers, (self.shares, self.coherences, self.errors, self.decided))
        # Checkpoints may be compared, and no NaN is equal to another.
        columns = [[None if x != x else x for x in column] for column in zip(*rows, strict=True)]
        groups = dict(zip(self.names, columns, strict=True))
        return {"step": float(self.step), "groups": groups, "errors": self.has_errors}

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
        self.home = self.home if home is None else home
        self.on_host = on_host(self.home)
        rows = [[nan if groups[name][i] is None else groups[name][i] for name in self.names] for i in range(4)]
        rows += [[x] * len(self.names) for x in (1.0, 0.0)]
        self.shares, self.coherences, self.errors, self.decided, self.ones, self.norms = map(self._kept, rows)
        self.step = self._kept(numbers["step"])
        self.has_errors = bool(numbers["errors"])
        self.coefficients = self.ones
        self.conflicts: Tensor | None = None

    def _kept(self, numbers: Any) -> Any:
        return numbers if self.on_host else self.tensor(numbers)

    def tensor(self, kept: Any) -> Tensor:
        """What is remembered, as a tensor."""
        return torch.as_tensor(kept, dtype=wide(self.home), device=self.home)
