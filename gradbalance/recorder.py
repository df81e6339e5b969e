"""A record of what was measured and decided at every step: as numbers, a table, a figure, logs."""

import math
import os
from collections.abc import Callable, Iterator
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, runtime_checkable
from weakref import ref

import numpy as np
from torch.optim import Optimizer

from gradbalance.balance import Balance
from gradbalance.penalty import Penalty, penalty_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recorder", "Summary"]

# The fields of `Balance` with one number for each group, and those of them that are logged.
VECTORS = (
    "norms",
    "shares",
    "coherences",
    "coherence_errors",
    "useful",
    "useful_errors",
    "errors",
    "coefficients",
    "proposed",
)
LOGGED = ("norms", "shares", "coherences", "useful", "errors", "coefficients", "proposed")


class Summary(NamedTuple):
    """A record in a few figures; prints as a table.

    Attributes:
        steps: Number of recorded steps with finite gradients in at least two groups. The other
            steps are left out of the means.
        norms: Mean gradient norm of each group.
        coherences: Mean coherence of each group, NaN where it was not measured.
        coefficients: Mean coefficient of each group.
        conflicts: Fraction of the steps at which the group was slowed down for the sake of another.
        dominance: Largest norm divided by the mean of the others, median over the steps.
        dominance_after: The same with each norm times its coefficient.
    """

    steps: int
    norms: dict[str, float]
    coherences: dict[str, float]
    coefficients: dict[str, float]
    conflicts: dict[str, float]
    dominance: float
    dominance_after: float

    def __str__(self) -> str:
        width = max(len("dominance"), *map(len, self.norms))
        lines = [f"{'':{width}}  mean norm  coherence  coefficient  in conflict"]
        for name, norm in self.norms.items():
            coherence = f"{self.coherences[name]:.3f}"
            if math.isnan(self.coherences[name]):
                coherence = "-"
            lines.append(
                f"{name:{width}}  {norm:9.3g}  {coherence:>9}  {self.coefficients[name]:11.3f}"
                f"  {self.conflicts[name]:11.1%}"
            )
        dominance = f"{self.dominance:.3g} before, {self.dominance_after:.3g} after"
        lines.append(f"{'dominance':{width}}  {dominance}; steps: {self.steps}")
        return "\n".join(lines)


@runtime_checkable
class ScalarWriter(Protocol):
    """What :meth:`Recorder.log_to` needs of a ``SummaryWriter``."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Write one value of one step."""


class Recorder:
    """Records the :class:`Balance` of every step that is measured.

    It records from its construction until :meth:`close` or the end of a ``with`` block, and again
    in the next ``with`` block. To watch a model without touching its training, build the optimizer
    with ``rule=rules.Watch()``. In distributed training each rank has the same record: print it on
    one of them.

    Args:
        optimizer: A ``ConflictAwarePenalty``, what ``attach`` returns, or an optimizer with a
            penalty on it.
        every: Record one of every so many measured steps, >= 1.

    Attributes:
        names: The groups, in order.

    Raises:
        ValueError: If the optimizer has no penalty on it, if the penalty was removed, or if
            ``every`` is not a positive integer.
        TypeError: If ``optimizer`` is not an optimizer.

    Example:
        >>> import torch
        >>> from gradbalance import ConflictAwarePenalty, rules
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> groups = {"text": text, "audio": audio}
        >>> optimizer = ConflictAwarePenalty(sgd, groups, rule=rules.ByHand(text=0.5))
        >>> with Recorder(optimizer) as recorder:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         (10 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        ...         optimizer.step()
        >>> print(recorder.summary())
                   mean norm  coherence  coefficient  in conflict
        text            22.4      1.000        0.500       100.0%
        audio           2.24      1.000        1.000         0.0%
        dominance  10 before, 5 after; steps: 3
    """

    def __init__(self, optimizer: Optimizer | Penalty, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"`every` must be a positive integer. Got {every!r}. Take 1 to record each step."
            )
        penalty = optimizer
        if not isinstance(penalty, Penalty):
            penalty = penalty_of(optimizer)
        if penalty is None:
            raise ValueError(
                "`optimizer` must have a penalty on it. "
                f"Got a plain {type(optimizer).__name__}. "
                "Wrap it in ConflictAwarePenalty first; `rule=rules.Watch()` only watches."
            )
        self.names = penalty.names
        self.every = every
        # The optimizer holds the penalty: a record must not keep the model in memory.
        self._penalty = ref(penalty)
        self._depth = 0  # of `with` blocks inside each other
        self._seen = 0
        self._count = 0
        self._logged = 0
        self._rows = np.empty(64, _row_type(len(self.names)))
        self._listen()

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        penalty = self._penalty()
        if penalty is not None and self._record in penalty._engine.listeners:
            penalty._engine.listeners.remove(self._record)

    def __enter__(self) -> Self:
        self._listen()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.close()

    def _listen(self) -> None:
        penalty = self._penalty()
        if penalty is None or not _is_attached(penalty):
            raise ValueError(
                "`optimizer` must have a penalty on it. Got a penalty that was removed. "
                "Wrap the optimizer again, and record that."
            )
        if self._record not in penalty._engine.listeners:
            penalty._engine.listeners.append(self._record)

    def _record(self, balance: Balance) -> None:
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        row = self._rows[self._count]
        for field in ("step", *VECTORS, "conflicts"):
            row[field] = getattr(balance, field)
        self._count += 1

    def to_dict(self) -> dict[str, np.ndarray]:
        """All that was recorded, S steps of N groups, as numpy arrays.

        Returns:
            Each field of :class:`Balance` by its name: the vectors with shape ``[S, N]``;
            ``conflicts``, bool, shape ``[S, N, N]``; ``step``, int, shape ``[S]``; ``names``,
            shape ``[N]``.
        """
        record = {"names": np.array(self.names)}
        for field in ("step", *VECTORS, "conflicts"):
            record[field] = self._rows[field][: self._count].copy()
        return record

    def summary(self) -> Summary:
        """The record in a few figures; ``print`` it for a table.

        Raises:
            RuntimeError: If no step with finite gradients in at least two groups was recorded.
        """
        record = self._counted_steps()
        norms = record["norms"]
        return Summary(
            steps=len(norms),
            norms=self._by_name(norms.mean(0)),
            coherences=self._by_name(_mean_of_known(record["coherences"])),
            coefficients=self._by_name(record["coefficients"].mean(0)),
            conflicts=self._by_name(record["conflicts"].any(2).mean(0)),
            dominance=float(np.median(_dominance(norms))),
            dominance_after=float(np.median(_dominance(norms * record["coefficients"]))),
        )

    def plot(self, path: str | PathLike[str]) -> "Figure":
        """Save a figure of coherences, coefficients, norms and dominance over the steps.

        The coherences have a band of one standard error. The conflicts are drawn where the rule
        reports some. Needs matplotlib: ``pip install gradbalance[plot]``.

        Args:
            path: Where to save it; the suffix gives the format, such as ``.png`` or ``.pdf``.

        Returns:
            The figure, to be changed or shown.

        Raises:
            RuntimeError: If no step with finite gradients in at least two groups was recorded.
        """
        from gradbalance._figure import draw

        record = self._counted_steps()
        norms = record["norms"]
        figure = draw(record, _dominance(norms), _dominance(norms * record["coefficients"]))
        figure.savefig(path, dpi=150)
        return figure

    def log_to(
        self, writer: ScalarWriter | str | PathLike[str] | Callable[[dict[str, float]], object]
    ) -> None:
        """Log the steps that were recorded since the last call, at the end of an epoch say.

        The keys are ``gradbalance/<quantity>/<group>``. What was not measured is left out.

        Args:
            writer: One of

                - a ``SummaryWriter``, or anything with ``add_scalar(tag, value, step)``;
                - the folder of a run, such as ``"runs/1"``, which gets one more file at each call
                  and needs ``pip install tensorboard``;
                - a function of a dict, such as ``wandb.log``. It is called once for each recorded
                  step, which is under ``gradbalance/step``.

        Raises:
            TypeError: If it is none of these.
        """
        if isinstance(writer, str | PathLike):
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(os.fspath(writer)) as opened:
                self.log_to(opened)
        elif isinstance(writer, type) or not (isinstance(writer, ScalarWriter) or callable(writer)):
            raise TypeError(
                "`writer` must be a folder, have a method add_scalar(tag, value, step), or be a "
                f"function of a dict. Got {writer!r}. "
                "Pass a path, a torch.utils.tensorboard.SummaryWriter, or `wandb.log`."
            )
        elif isinstance(writer, ScalarWriter):
            for step, scalars in self._unlogged():
                for key, value in scalars.items():
                    writer.add_scalar(key, value, step)
        else:
            for step, scalars in self._unlogged():
                writer({"gradbalance/step": step, **scalars})

    def _unlogged(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each step that was not logged yet, with its values by key."""
        while self._logged < self._count:
            row = self._rows[self._logged]
            scalars = {}
            for quantity in LOGGED:
                for name, value in self._by_name(row[quantity]).items():
                    if math.isfinite(value):
                        scalars[f"gradbalance/{quantity}/{name}"] = value
            yield int(row["step"]), scalars
            # Only now: a step whose writer raised is logged by the next call.
            self._logged += 1

    def _by_name(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def _counted_steps(self) -> dict[str, np.ndarray]:
        """The record of the steps that count: all norms are finite, and at least two are not 0."""
        record = self.to_dict()
        norms = record["norms"]
        counts = np.isfinite(norms).all(1) & ((norms > 0).sum(1) >= 2)
        if not counts.any():
            raise RuntimeError(
                "`Recorder` must have seen a step with finite gradients in two groups. "
                f"Got {len(counts)} steps, none such. "
                "Make it before the training loop, and ask it after a step."
            )
        for field in ("step", *VECTORS, "conflicts"):
            record[field] = record[field][counts]
        return record


def _row_type(n: int) -> np.dtype[np.void]:
    """The fields of a :class:`Balance` of N groups without the names."""
    vectors = [(field, np.float64, (n,)) for field in VECTORS]
    return np.dtype([("step", np.int64), *vectors, ("conflicts", np.bool_, (n, n))])


def _is_attached(penalty: Penalty) -> bool:
    """Whether the penalty is still on an optimizer."""
    optimizer = penalty._stepper()
    return optimizer is not None and penalty_of(optimizer) is penalty


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values of each column, NaN where there are none."""
    is_known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(is_known, values, 0.0).sum(0) / is_known.sum(0)


def _dominance(norms: np.ndarray) -> np.ndarray:
    """Largest norm divided by the mean of the others, shape ``[S]``; 1 is balance.

    It is infinite where the others are 0, NaN where all are.

    Args:
        norms: Shape ``[S, N]``, N at least 2.

    Example:
        >>> _dominance(np.array([[6.0, 1.0, 2.0]])).tolist()
        [4.0]
    """
    ascending = np.sort(norms, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return ascending[:, -1] / ascending[:, :-1].mean(1)
