"""A record of the balance of every step that is measured: kept on the device, read out in batches."""

import math
import os
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._engine.optimizer import ConflictAwarePenalty
from gradbalance._engine.penalty import Penalty, penalty_of
from gradbalance._engine.state import Balance
from gradbalance._record.summary import Summary, dominance, summarise

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Steps between two reads of the device: rare enough not to be felt, few enough to take no memory.
_BATCH = 1024


class Recorder:
    """Records the :class:`Balance` of every step that is measured: to look first, and decide then.

    Each step packs it into one small tensor on the device; the host reads these in batches of about a thousand, and
    when asked. To watch a model without touching its training, build the optimizer with ``rule=rules.Watch()``. In
    distributed training each rank holds the same record: print it on one.

    Args:
        optimizer: What ``ConflictAwarePenalty`` or ``attach`` made, or an optimizer with a penalty on it.
        every: Record one of so many measured steps, >= 1.

    Raises:
        ValueError: If the optimizer has no penalty on it, or ``every`` is not a positive integer.
        TypeError: If it is not an optimizer.
        RuntimeError: If asked for a summary or a figure before a step.

    Example:
        >>> from gradbalance import rules
        >>> model = torch.nn.ModuleDict({"text": torch.nn.Linear(4, 1), "audio": torch.nn.Linear(4, 1)})
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = ConflictAwarePenalty(sgd, dict(model.items()), rule=rules.ByHand(text=0.5))
        >>> with Recorder(optimizer) as recorder:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         (10 * model["text"](torch.ones(1, 4)) + model["audio"](torch.ones(1, 4))).sum().backward()
        ...         optimizer.step()
        >>> print(recorder.summary())
                   mean norm  coherence  coefficient  in conflict
        text            22.4          -        0.500       100.0%
        audio           2.24          -        1.000         0.0%
        dominance  10 before, 5 after; steps: 3
    """

    def __init__(self, optimizer: ConflictAwarePenalty | Penalty | Optimizer, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be a positive integer. Got {every!r}. Take 1 to record each step.")
        penalty = optimizer if isinstance(optimizer, Penalty) else penalty_of(optimizer)
        if penalty is None:
            raise ValueError(
                f"`optimizer` must have a penalty on it. Got a plain {type(optimizer).__name__}. "
                "Wrap it in ConflictAwarePenalty first; `rule=rules.Watch()` only watches."
            )
        self.names = penalty.names
        self.every = every
        self._seen = 0
        self._waiting: list[Tensor] = []
        self._read: list[np.ndarray] = []
        self._logged = 0
        self._listeners = penalty._engine.listeners
        self._listeners.append(self._record)

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        if self._record in self._listeners:
            self._listeners.remove(self._record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, balance: Balance) -> None:
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        *parts, step, _ = balance
        row = torch.cat([*(part.flatten() for part in parts), step[None]])
        if self._waiting and self._waiting[0].device != row.device:
            self._flush()  # the model moved
        self._waiting.append(row)
        if len(self._waiting) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._read.append(torch.stack(self._waiting).cpu().numpy())
            self._waiting = []

    def to_dict(self) -> dict[str, "np.ndarray"]:
        """All that was recorded, S steps of N groups, as numpy arrays.

        Returns:
            ``norms``, ``shares``, ``coherences``, ``errors`` and ``coefficients``, shape ``[S, N]``; ``conflicts``,
            bool, shape ``[S, N, N]``; ``step``, int, shape ``[S]``; ``names``, shape ``[N]``. See :class:`Balance`.
        """
        import numpy as np

        self._flush()
        n = len(self.names)
        rows = np.concatenate([np.empty((0, n * (n + 5) + 1)), *self._read])
        *means, conflicts, step = np.split(rows, np.cumsum([n, n, n, n, n, n * n]), 1)
        return {
            **dict(zip(Balance._fields, means, strict=False)),
            "conflicts": conflicts.reshape(-1, n, n) > 0,
            "step": step[:, 0].astype(int),
            "names": np.array(self.names),
        }

    def summary(self) -> Summary:
        """The record in a few figures; ``print`` it for a table."""
        return summarise(self._counted_steps())

    def plot(self, path: str | PathLike[str]) -> "Figure":
        """Save a figure of norms, coherences, coefficients and the dominance over the steps.

        With a panel of the conflicts where the rule reports some. Needs matplotlib: ``pip install gradbalance[plot]``.

        Args:
            path: Where to save it; the suffix gives the format, such as ``.png``, ``.pdf`` or ``.svg``.

        Returns:
            The figure, to be changed or shown.
        """
        from gradbalance._record.figure import draw

        record = self._counted_steps()
        figure = draw(record, dominance(record["norms"]), dominance(record["norms"] * record["coefficients"]))
        figure.savefig(path, dpi=150)
        return figure

    def log_to(self, writer: Any) -> None:
        """Write what was recorded since the last call for TensorBoard, at the end of an epoch say.

        Args:
            writer: A ``SummaryWriter``, or anything with ``add_scalar(tag, value, step)``; or the folder of a run,
                such as ``"runs/1"``, which gets one more file at each call and needs ``pip install tensorboard``.

        Raises:
            TypeError: If it is neither.
        """
        if isinstance(writer, str | PathLike):
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(os.fspath(writer)) as writer:
                self.log_to(writer)
            return
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "`writer` must be a folder, or have a method add_scalar(tag, value, step). "
                f"Got {type(writer).__name__}. Pass a torch.utils.tensorboard.SummaryWriter, or a path."
            )
        record = self.to_dict()
        new = slice(self._logged, None)
        steps = record["step"][new].tolist()
        for key in ("norms", "coherences", "errors", "coefficients"):
            for name, values in zip(self.names, record[key][new].T.tolist(), strict=True):
                for value, step in zip(values, steps, strict=True):
                    if math.isfinite(value):  # NaN where it was not measured
                        writer.add_scalar(f"gradbalance/{key}/{name}", value, step)
        self._logged += len(steps)

    def _counted_steps(self) -> dict[str, "np.ndarray"]:
        """The record of the steps that count: finite norms, two of them not 0."""
        import numpy as np

        record = self.to_dict()
        counted = np.isfinite(record["norms"]).all(1) & ((record["norms"] > 0).sum(1) >= 2)
        if not counted.any():
            raise RuntimeError(
                "`Recorder` must have seen a step with finite gradients in two groups. "
                f"Got {len(counted)} steps, none such. Make it before the training loop, and ask it after a step."
            )
        return {key: value if key == "names" else value[counted] for key, value in record.items()}
