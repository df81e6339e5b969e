"""What the rule remembers of one optimizer and decided last, as tensors on the device of its parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance import _rule
from gradbalance._buckets import wide
from gradbalance._rule import UNSEEN, State
from gradbalance._settings import Settings
from gradbalance._sketch import Sketch

# Where a checkpoint keeps it, in the first param_group, in builtin types: every checkpoint format takes these.
KEYS = (
    "gradbalance_step",
    "gradbalance_shares",
    "gradbalance_errors",
    "gradbalance_agreements",
    "gradbalance_sketch",
)


class Balance(NamedTuple):
    """What the rule saw and decided in the last step, as device tensors.

    Attributes:
        norms: Gradient norm of each group, as the option ``norm`` defines it, shape ``[N]``.
        shares: Running share of each group in the sum of the norms, NaN before the first, shape ``[N]``.
        errors: Running error of each group, NaN where none is in force, shape ``[N]``.
        coefficients: Coefficient of each group, in [0, 1], shape ``[N]``.
        conflicts: ``conflicts[m, k]``: group m is damped for the sake of group k, bool, shape ``[N, N]``.
        agreements: Running cosine between successive gradients of each group, NaN where not known, shape ``[N]``.
        step: Optimizer steps that took place, shape ``[]``.
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
    errors: Tensor
    coefficients: Tensor
    conflicts: Tensor
    agreements: Tensor
    step: Tensor
    names: tuple[str, ...]


class Memory:
    """The state of the rule between the steps; written in place, so that a CUDA graph may hold it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.has_errors: bool
        self._sketch: Tensor
        unseen = [UNSEEN] * len(names)
        self._set((0.0, unseen, unseen, unseen, []), torch.device("cpu"))

    @property
    def home(self) -> torch.device:
        """The device of the tensors."""
        return self._step.device

    @property
    def balance(self) -> Balance:
        """A copy of the last step's figures, without a host read."""
        shares, errors, agreements = (
            torch.where(mean == UNSEEN, torch.nan, mean) for mean in (self._shares, self._errors, self._agreements)
        )
        norms, conflicts, step = self._norms.clone(), self._conflicts.clone(), self._step.clone()
        return Balance(norms, shares, errors, self.coefficients.clone(), conflicts, agreements, step, self.names)

    def decide(
        self, norms: Tensor, observed: Tensor | None, settings: Settings, sketcher: Sketch | None, sketch: Tensor | None
    ) -> Tensor:
        """Run the rule and remember what it gives.

        Args:
            norms: Shape ``[N]``, NaN where the step must not count.
            observed: Errors, shape ``[N]``, negative where there is none; or None.
            settings: The options.
            sketcher: What took the sketch, or None.
            sketch: Some entries of the gradients, or None where their agreement is not asked for.

        Returns:
            Whether the step counts and lies inside the window, bool, shape ``[]``.
        """
        cosines = None
        if sketcher is not None and sketch is not None:
            last = self._sketch
            if len(last) != len(sketch):  # the first one, or the parameters changed
                self._sketch = last = torch.zeros_like(sketch)
            cosines = sketcher.cosines(last, sketch).to(norms)
        errors = self._errors if self.has_errors else None
        old = State(self._step, self._shares, errors, None if cosines is None else self._agreements)
        decision = _rule.decide(norms, observed, cosines, old, settings)
        if sketch is not None:
            self._sketch.copy_(torch.where(decision.state.step > self._step, sketch, self._sketch))
        for tensor, new in zip(old, decision.state, strict=True):
            if tensor is not None and new is not None:
                tensor.copy_(new)
        self._norms, self._conflicts, self.coefficients = norms, decision.conflicts, decision.coefficients
        return decision.due

    def to(self, home: torch.device) -> None:
        """Move to the device of the parameters."""
        if home != self.home:
            self._set(tuple(self.numbers().values()), home)

    def numbers(self) -> dict[str, Any]:
        """The state in builtin types; a host read."""
        means = (mean.tolist() for mean in (self._shares, self._errors, self._agreements, self._sketch))
        return dict(zip(KEYS, (self._step.item(), *means), strict=True))

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint.

        Raises:
            ValueError: If it is that of another number of groups.
        """
        step, shares, *others = (numbers[key] for key in KEYS)
        if len(shares) != len(self.names):
            raise ValueError(
                f"`state_dict` must hold the state of {len(self.names)} groups. Got {len(shares)}. "
                "Load a checkpoint of the same groups, or build with `persist=False`."
            )
        self._set((step, shares, *others), self.home)

    def _set(self, numbers: tuple[Any, ...], home: torch.device) -> None:
        n, dtype = len(self.names), wide(home)
        self._step, self._shares, self._errors, self._agreements = (
            torch.tensor(value, dtype=dtype, device=home) for value in numbers[:4]
        )
        self._sketch = torch.tensor(numbers[4], dtype=torch.float32, device=home)
        self.has_errors = any(error >= 0 for error in numbers[2])
        self._norms = torch.zeros(n, dtype=dtype, device=home)
        self.coefficients = torch.ones(n, dtype=dtype, device=home)
        self._conflicts = torch.zeros(n, n, dtype=torch.bool, device=home)
