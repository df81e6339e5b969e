"""A record of what was measured and decided at every step: numbers, a table, a figure, logs."""

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple, Self
from weakref import ref

import numpy as np
from torch.optim import Optimizer

from gradbalance.balance import Balance
from gradbalance.penalty import Penalty, penalty_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Recorder", "Summary"]

FIELDS = Balance._fields[1:]  # all but the names
VECTORS = Balance._fields[2:-1]  # shape [N]
LOGGED = ("norms", "shares", "coherences", "useful", "errors", "coefficients", "proposed")


class Summary(NamedTuple):
    """A record in a few figures; prints as a table.

    Attributes:
        steps: Number of steps summarised: those with finite gradients in at least two groups.
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
            coherence = f"{self.coherences[name]:9.3f}".replace("nan", "  -")
            numbers = f"{self.coefficients[name]:11.3f}  {self.conflicts[name]:11.1%}"
            lines.append(f"{name:{width}}  {norm:9.3g}  {coherence}  {numbers}")
        dominance = f"{self.dominance:.3g} before, {self.dominance_after:.3g} after"
        lines.append(f"{'dominance':{width}}  {dominance}; steps: {self.steps}")
        return "\n".join(lines)


class Recorder:
    """Records the :class:`Balance` of every step that is measured.

    It records from its construction until :meth:`close` or the end of a ``with`` block, and again
    in the next ``with`` block. To watch a model without touching its training, build the optimizer
    with ``rule=rules.Watch()``. In distributed training all ranks have the same record.

    Args:
        optimizer: An optimizer with a penalty on it, or what ``attach`` returns.
        every: Record one of every so many measured steps, >= 1.

    Raises:
        ValueError: If there is no penalty, or it was removed, or ``every`` is out of range.
        TypeError: If ``optimizer`` is not an optimizer.
        RuntimeError: At a summary or a figure, if no step had finite gradients in two groups.

    Example:
        >>> import torch
        >>> from gradbalance import attach, rules
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rules.ByHand(text=0.5))
        >>> with Recorder(optimizer) as recorder:
        ...     (10 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        ...     optimizer.step()
        >>> print(recorder.summary())
                   mean norm  coherence  coefficient  in conflict
        text            22.4          -        0.500       100.0%
        audio           2.24          -        1.000         0.0%
        dominance  10 before, 5 after; steps: 1
    """

    def __init__(self, optimizer: Optimizer | Penalty, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"`every` must be a positive integer. Got {every!r}. Take 1 to record each step."
            )
        penalty = optimizer if isinstance(optimizer, Penalty) else penalty_of(optimizer)
        if penalty is None:
            raise ValueError(
                f"`optimizer` must have a penalty on it. Got a plain {type(optimizer).__name__}. "
                "Wrap it in ConflictAwarePenalty first; `rule=rules.Watch()` only watches."
            )
        self.names = penalty.names
        self.every = every
        self._penalty = ref(penalty)  # a record does not keep the model in memory
        self._depth = 0  # of `with` blocks inside each other
        self._seen = 0
        self._count = 0
        self._logged = 0
        n = len(self.names)
        vectors = [(field, np.float64, (n,)) for field in VECTORS]
        row = np.dtype([("step", np.int64), *vectors, ("conflicts", np.bool_, (n, n))])
        self._rows = np.empty(64, row)
        self._listen()

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        penalty = self._settled()
        if penalty is not None and self._record in penalty._engine.listeners:
            penalty._engine.listeners.remove(self._record)

    def __enter__(self) -> Self:
        self._listen()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.close()

    def _listen(self) -> None:
        penalty = self._settled()
        stepper = None if penalty is None else penalty._stepper()
        if penalty is None or stepper is None or penalty_of(stepper) is not penalty:
            raise ValueError(
                "`optimizer` must have a penalty on it. Got one whose penalty was removed. "
                "Wrap it again, and make a new recorder."
            )
        if self._record not in penalty._engine.listeners:
            penalty._engine.listeners.append(self._record)

    def _settled(self) -> Penalty | None:
        """The penalty, if it still exists, once it has decided on the last step."""
        penalty = self._penalty()
        if penalty is not None:
            penalty._engine.settle()
        return penalty

    def _record(self, balance: Balance) -> None:
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        for field in FIELDS:
            self._rows[field][self._count] = getattr(balance, field)
        self._count += 1

    def to_dict(self) -> dict[str, np.ndarray]:
        """All that was recorded, S steps of N groups: each field of :class:`Balance` by its name.

        The shapes are ``[N]`` of ``names``, ``[S]`` of ``step``, ``[S, N, N]`` of ``conflicts``,
        and ``[S, N]`` of the others.
        """
        self._settled()
        record = {"names": np.array(self.names)}
        for field in FIELDS:
            record[field] = self._rows[field][: self._count].copy()
        return record

    def summary(self) -> Summary:
        """The record in a few figures; ``print`` it for a table."""
        record = self._counted_steps()
        coherences = np.ma.masked_invalid(record["coherences"]).mean(0)
        before, after = np.median(record["dominance"], axis=0).tolist()
        return Summary(
            steps=len(record["step"]),
            norms=self._by_name(record["norms"].mean(0)),
            coherences=self._by_name(coherences.filled(np.nan)),
            coefficients=self._by_name(record["coefficients"].mean(0)),
            conflicts=self._by_name(record["conflicts"].any(2).mean(0)),
            dominance=before,
            dominance_after=after,
        )

    def plot(self, path: str | PathLike[str]) -> "Figure":
        """Save a figure of the record in the format of the suffix, and return it.

        Conflicts are drawn where the rule reports some. Needs ``pip install gradbalance[plot]``.
        """
        from gradbalance._figure import draw

        figure = draw(self._counted_steps())
        figure.savefig(path, dpi=150)
        return figure

    def log_to(
        self,
        writer: "SummaryWriter | str | PathLike[str] | Callable[[dict[str, float]], object]",
    ) -> None:
        """Log what was recorded since the last call, under ``gradbalance/<quantity>/<group>``.

        Args:
            writer: A ``SummaryWriter``; the folder of one, such as ``"runs/1"``, which gets one
                more file at each call; or a function of a dict, such as ``wandb.log``, which is
                called once for each step and finds it under ``gradbalance/step``.

        Raises:
            TypeError: If it is none of these.
        """
        if isinstance(writer, str | PathLike):
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(writer) as opened:
                self.log_to(opened)
            return
        add_scalar = getattr(writer, "add_scalar", None)
        if isinstance(writer, type) or not callable(add_scalar or writer):
            raise TypeError(
                "`writer` must be a folder, have add_scalar(tag, value, step), or be a function of "
                f"a dict. Got {writer!r}. Pass a path, a SummaryWriter, or `wandb.log`."
            )
        self._settled()
        for row in self._rows[self._logged : self._count]:
            step = int(row["step"])
            scalars = {}
            for quantity in LOGGED:
                for name, value in self._by_name(row[quantity]).items():
                    if np.isfinite(value):
                        scalars[f"gradbalance/{quantity}/{name}"] = value
            if add_scalar is not None:
                for key, value in scalars.items():
                    add_scalar(key, value, step)
            elif callable(writer):
                writer({"gradbalance/step": step, **scalars})
            self._logged += 1  # only now: a step whose writer raised is logged by the next call

    def _by_name(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def _counted_steps(self) -> dict[str, np.ndarray]:
        """The record of the steps that count, and their dominance before and after, ``[S, 2]``."""
        record = self.to_dict()
        counts = np.isfinite(record["norms"]).all(1) & ((record["norms"] > 0).sum(1) >= 2)
        if not counts.any():
            raise RuntimeError(
                "`Recorder` must have seen a step with finite gradients in two groups. "
                f"Got {len(counts)} steps, none such. "
                "Make it before the training loop, and ask it after a step."
            )
        for field in FIELDS:
            record[field] = record[field][counts]
        norms = np.stack([record["norms"], record["norms"] * record["coefficients"]], axis=1)
        norms.sort(axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):  # inf where the others are 0
            record["dominance"] = norms[:, :, -1] / norms[:, :, :-1].mean(2)
        return record
