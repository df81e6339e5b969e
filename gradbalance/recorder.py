"""A record of what was measured and decided at every step: numbers, a table, a figure, logs."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self, SupportsIndex
from weakref import ref

import numpy as np
from numpy.typing import ArrayLike
from torch.optim import Optimizer

from gradbalance._totals import Totals
from gradbalance.balance import Balance
from gradbalance.groups import Extent
from gradbalance.penalty import Penalty, penalty_of
from gradbalance.rules import Watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Multipliers", "Recorder", "Row", "Summary"]

FIELDS = Balance._fields[1:]  # all but the names
VECTORS = Balance._fields[2:-1]  # shape [N]
LOGGED = (
    "norms",
    "shares",
    "coherences",
    "useful",
    "errors",
    "moved",
    "coefficients",
    "proposed",
)

RECENT = 64  # steps that are taken into the totals together
LONGEST = 1 << 13  # rows that are kept; of a longer record one of 2, 4, 8, ... steps

# Between two groups: how many times further the one moves for its size.
APART = 100.0


class Row(NamedTuple):
    """What a group did, in the mean over the steps of a record that counted.

    Attributes:
        parameters: Number of entries of its parameters.
        trainable: Entries of those that require a gradient.
        in_optimizer: Entries of those of them that the optimizer has.
        steps: Number of recorded steps at which the group had a gradient other than 0.
        moved: Length of a step over the length of the parameters, on a sketch of their entries. It
            is read at the first 32 steps and at about one of 7 after them, but not at the last
            step. Those count at which the group had a gradient or moved; NaN if there is none.
        norm_share: Share of the sum of the gradient norms.
        useful_share: The useful part of that share, NaN if it was not measured.
        coherence: Cosine between successive gradients, NaN if it was not measured.
        coherence_error: Its standard error, inf before the third cosine.
        noise_scale: :math:`(1 - a)/a` of the coherence a: how many batches together have as much
            signal as noise; inf where there is no signal.
        coefficient: Factor on its step.
        coefficient_spread: Standard deviation of that over the steps.
        proposed: What a rule that is only watched would give, NaN if there is none or it does not
            know standard errors yet.
        proposed_spread: Standard deviation of that over the steps.
    """

    parameters: int
    trainable: int
    in_optimizer: int
    steps: int
    moved: float
    norm_share: float
    useful_share: float
    coherence: float
    coherence_error: float
    noise_scale: float
    coefficient: float
    coefficient_spread: float
    proposed: float
    proposed_spread: float


class Summary(NamedTuple):
    """A record in a few figures; prints as a table with the warnings under it.

    Attributes:
        recorded: Number of recorded steps.
        counted: Number of those with finite gradients in enough groups: two, or the only one.
        rows: What each group did.
        warnings: What is wrong, by the names of groups.
    """

    recorded: int
    counted: int
    rows: dict[str, Row]
    warnings: list[str]

    def __str__(self) -> str:
        proposes = any(math.isfinite(row.proposed) for row in self.rows.values())
        table = [["", *HEADER, *["proposed"][:proposes]]]
        for name, row in self.rows.items():
            coherence = _number(row.coherence, "z.3f")
            if math.isfinite(row.coherence):
                coherence += f" ± {row.coherence_error:.3f}"
            cells = [
                name,
                f"{row.parameters:,}",
                _part(row.trainable, row.parameters),
                _part(row.in_optimizer, row.trainable),
                _part(row.steps, self.recorded),
                _number(row.moved, ".1e"),
                _number(row.norm_share, ".3f"),
                _number(row.useful_share, "z.3f"),
                coherence,
                _number(row.noise_scale, ".3g" if row.noise_scale < 100 else ",.0f"),
                _with_spread(row.coefficient, row.coefficient_spread),
            ]
            if proposes:
                cells.append(_with_spread(row.proposed, row.proposed_spread))
            table.append(cells)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for name, *cells in table:
            padded = [name.ljust(widths[0])]
            padded += [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join(padded))
        lines.append(f"{self.recorded:,} steps, of which {self.counted:,} counted")
        lines += [f"! {warning}" for warning in self.warnings]
        return "\n".join(lines)


HEADER = [
    "parameters",
    "trainable",
    "in optimizer",
    "gradient",
    "|dw|/|w|",
    "share",
    "useful",
    "coherence",
    "noise",
    "coefficient",
]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _with_spread(value: float, spread: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} ± {spread:.3f}"


def _part(part: int, whole: int) -> str:
    if part == 0:
        return "none"
    return "all" if part == whole else f"{part:,}"


class Multipliers(dict[str, tuple[float, float]]):
    """The factor on the learning rate of each group, and its standard error.

    Prints as ``param_groups``: ``lr`` is the learning rate, and ``groups`` what the penalty was
    given. Parameters of no group keep the learning rate.

    Args:
        factors: By name.
        modules: Names of the groups that are modules.
    """

    def __init__(
        self, factors: Mapping[str, tuple[float, float]], modules: Sequence[str] = ()
    ) -> None:
        super().__init__(factors)
        self._modules = frozenset(modules)

    def __str__(self) -> str:
        lines = []
        for name, (factor, error) in self.items():
            parameters = f"groups[{name!r}]"
            if name in self._modules:
                parameters += ".parameters()"
            entry = f'{{"params": {parameters}, "lr": {factor:.3g} * lr}},'
            lines.append((entry, f"# ± {error:.3f}"))
        width = max(len(entry) for entry, _ in lines)
        printed = [f"    {entry:{width}}  {error}" for entry, error in lines]
        return "\n".join(["[", *printed, "]"])


def _check_every(every: object) -> None:
    if isinstance(every, bool) or not isinstance(every, Integral):
        raise TypeError(f"`every` must be an integer. Got {every!r}. Take 1 for each step.")
    if every < 1:
        raise ValueError(f"`every` must be positive. Got {every}. Take 1 for each step.")


class Recorder:
    """Records the :class:`Balance` of every step that is measured.

    It records from its construction until :meth:`close` or the end of a ``with`` block, and again
    in the next ``with`` block. To watch a model without touching its training, build the optimizer
    with ``rule=rules.Watch()``; then one group is enough. In distributed training all ranks have
    the same record.

    Args:
        optimizer: An optimizer with a penalty on it, or what ``attach`` returns.
        every: Record one of every so many measured steps, >= 1.

    Raises:
        ValueError: If there is no penalty, or it was removed, or ``every`` is out of range.
        TypeError: If ``optimizer`` is not an optimizer, or ``every`` not an integer.
        RuntimeError: At a figure or at :meth:`multipliers`, if no step has counted.

    Example:
        >>> import torch
        >>> from gradbalance import attach, rules
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rules.ByHand(text=0.5))
        >>> with Recorder(optimizer) as recorder:
        ...     (10 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        ...     optimizer.step()
        >>> recorder.summary().rows["text"].norm_share.__round__(3)
        0.909
    """

    def __init__(self, optimizer: Optimizer | Penalty, every: int = 1) -> None:
        _check_every(every)
        penalty = optimizer if isinstance(optimizer, Penalty) else penalty_of(optimizer)
        if penalty is None:
            raise ValueError(
                f"`optimizer` must have a penalty on it. Got a plain {type(optimizer).__name__}. "
                "Wrap it in ConflictAwarePenalty first; `rule=rules.Watch()` only watches."
            )
        options = penalty._options
        rule = options.rule
        proposing = rule.rule if isinstance(rule, Watch) else rule
        needs_errors = getattr(proposing, "needs_coherence", True)
        self.names = penalty.names
        self.every = int(every)
        self._penalty = ref(penalty)  # a record does not keep the model in memory
        self._fewest = penalty._engine.state.fewest
        self._rule = repr(rule)
        self._proposes = proposing is not None
        self._is_watched = not getattr(rule, "acts", True)
        self._memory = options.smoothing ** (options.every * self.every)
        self._extents: dict[str, Extent] = {}
        self._modules: list[str] = []
        self._depth = 0  # of `with` blocks inside each other
        self._step = penalty._engine.state.step
        self._seen = 0
        self._next_logged = 0  # of the recorded steps
        n = len(self.names)
        vectors = [(field, np.float64, (n,)) for field in VECTORS]
        flags = [("conflicts", np.bool_, (n, n)), ("counts", np.bool_)]
        row = np.dtype([("step", np.int64), *vectors, *flags])
        self._totals = Totals(n, needs_errors)
        # The last rows, then one of every so many rows before them.
        self._recent = np.empty(RECENT, row)
        self._n_recent = 0
        self._columns = {field: self._recent[field] for field in FIELDS}
        self._kept = np.empty(RECENT, row)
        self._n_kept = 0
        self._stride = 1
        self._listen()

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        penalty = self._settled()
        if penalty is not None and penalty._engine.leave(self._record):
            self._look_up(penalty)

    def __enter__(self) -> Self:
        self._listen()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "`Recorder` must not be pickled or copied. Got a record of a live optimizer. "
            "Save what `to_dict()` or `summary()` returns."
        )

    def _listen(self) -> None:
        penalty = self._settled()
        stepper = None if penalty is None else penalty._stepper()
        if penalty is None or stepper is None or penalty_of(stepper) is not penalty:
            raise ValueError(
                "`optimizer` must have a penalty on it. Got one whose penalty was removed. "
                "Wrap it again, and make a new recorder."
            )
        penalty._engine.listen(self._record)
        self._look_up(penalty)

    def _look_up(self, penalty: Penalty) -> None:
        """How large the groups are now, as the optimizer may be gone when that is asked for."""
        reader = penalty._reader()
        if reader is not None:
            membership = penalty._engine.membership
            self._extents = membership.extents(reader.param_groups)
            self._modules = [name for name, is_one in membership.is_module().items() if is_one]

    def _settled(self) -> Penalty | None:
        """The penalty, if it still exists, once it has decided on the last step."""
        penalty = self._penalty()
        if penalty is not None:
            penalty._engine.settle()
        return penalty

    def _record(self, balance: Balance) -> None:
        is_new = balance.step > self._step  # whether the step has counted, among others
        self._step = balance.step
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        for field, column in self._columns.items():
            column[self._n_recent] = getattr(balance, field)
        self._recent["counts"][self._n_recent] = is_new
        self._n_recent += 1
        if self._n_recent == RECENT:
            self._fold()

    def _fold(self) -> None:
        """Take the last rows into the totals, and keep some of them."""
        rows = self._recent[: self._n_recent]
        norms = rows["norms"]
        rows["counts"] &= np.isfinite(norms).all(1) & ((norms > 0).sum(1) >= self._fewest)
        kept = rows[-self._totals.recorded % self._stride :: self._stride]
        self._totals.add(rows)
        self._n_recent = 0
        while self._n_kept + len(kept) > len(self._kept):
            self._kept = np.concatenate([self._kept, np.empty_like(self._kept)])
        self._kept[self._n_kept : self._n_kept + len(kept)] = kept
        self._n_kept += len(kept)
        if self._n_kept > LONGEST:
            half = self._kept[: self._n_kept : 2]
            self._n_kept = len(half)
            self._kept[: self._n_kept] = half.copy()
            self._stride *= 2

    def to_dict(self) -> dict[str, np.ndarray]:
        """What was recorded, S steps of N groups: each field of :class:`Balance` by its name.

        Of more than 8,192 recorded steps one of every 2, 4, 8, ... is here; :meth:`summary` and
        :meth:`multipliers` are of all.

        The shapes are ``[N]`` of ``names``, ``[S]`` of ``step``, ``[S, N, N]`` of ``conflicts``,
        and ``[S, N]`` of the others.
        """
        self._settled()
        self._fold()
        record = {"names": np.array(self.names)}
        for field in FIELDS:
            record[field] = self._kept[field][: self._n_kept].copy()
        return record

    def summary(self) -> Summary:
        """The record in a few figures, and what is wrong; ``print`` it for a table."""
        penalty = self._settled()
        if penalty is not None:
            self._look_up(penalty)
        self._fold()
        totals = self._totals
        coherences = totals.cosines.value
        proposed = np.full(len(self.names), np.nan)
        spreads = proposed
        if self._is_watched and self._proposes and totals.proposed.number:
            proposed = totals.proposed.mean
            spreads = np.sqrt(np.diagonal(totals.proposed.value))
        with np.errstate(divide="ignore"):
            noise = (1 - coherences) / np.maximum(coherences, 0)
        columns = [
            totals.with_gradient,
            totals.moved.value,
            totals.shares.value,
            totals.useful.value,
            coherences,
            totals.cosines.error,
            noise,
            totals.coefficients.value,
            totals.coefficients.deviation,
            proposed,
            spreads,
        ]
        rows = {}
        for m, name in enumerate(self.names):
            extent = self._extents[name]
            sizes = (extent.entries, extent.trainable, extent.held)
            rows[name] = Row(*sizes, *[column[m].item() for column in columns])
        return Summary(totals.recorded, totals.counted, rows, self._warnings(rows))

    def _warnings(self, rows: Mapping[str, Row]) -> list[str]:
        warnings = []
        totals = self._totals
        for name, row in rows.items():
            missing = self._extents[name].missing
            if missing:
                warnings.append(
                    f"`{name}` has trainable parameters that are not in the optimizer: "
                    f"{len(missing)}, the first being {missing[0]}. "
                    "Add them to the optimizer, or freeze them."
                )
            if row.trainable == 0:
                warnings.append(f"`{name}` is frozen: none of its parameters requires a gradient.")
            elif row.steps == 0 and totals.recorded > totals.not_finite:
                warnings.append(
                    f"`{name}` is in the optimizer but never had a gradient other than 0. "
                    "Is its output used?"
                )
            elif row.moved == 0 and row.coefficient > 0:
                warnings.append(
                    f"`{name}` has gradients but does not move. "
                    "Is its learning rate 0, or too small for its dtype?"
                )
        moving = {name: row.moved for name, row in rows.items() if row.moved > 0}
        if moving:
            furthest = max(moving, key=moving.__getitem__)
            least = min(moving, key=moving.__getitem__)
            ratio = moving[furthest] / moving[least]
            if ratio > APART:
                warnings.append(
                    f"`{furthest}` moves {ratio:,.0f} times as far as `{least}` beside the size of "
                    "its parameters. Is one of their learning rates meant for the other?"
                )
        if totals.counted == 0:
            warnings.append(self._nothing_counted())
        return warnings

    def _nothing_counted(self) -> str:
        totals = self._totals
        if totals.recorded == 0:
            return "No step was recorded. Make the recorder before the training loop."
        if totals.not_finite:
            why = f"{totals.not_finite} of {totals.recorded} had gradients that are not finite"
        elif self._fewest > 1:
            why = f"None of {totals.recorded} had a gradient in two groups"
        else:
            why = f"None of {totals.recorded} had a gradient in a group"
        return f"No step counted. {why}."

    def multipliers(self) -> Multipliers:
        r"""What to multiply the learning rate of each group by, to train without the penalty.

        The mean of what the rule answered, applied or not, divided by the largest; the steps before
        it knows standard errors are left out. A factor that is within two standard errors of 1 is
        1. ``print`` it for ``param_groups``.

        Returns:
            The factor of each group and its standard error, by name. Of the running means in which
            the rule looks at n steps, :math:`n\,(1 - s)/(1 + s)` are worth as much as independent
            ones with the smoothing s; at least one.

        Raises:
            RuntimeError: If the rule proposes nothing, or has not yet.
        """
        if not self._proposes:
            raise RuntimeError(
                f"`multipliers` must have a rule that proposes something. Got {self._rule}. "
                "Build with `rule=rules.Watch(rules.Useful())`, say."
            )
        self._settled()
        self._fold()
        proposed = self._totals.proposed
        if proposed.number == 0 or proposed.mean.max() == 0:
            raise RuntimeError(
                "`multipliers` must have seen steps at which the rule knew what to do. "
                f"Got {self._totals.counted} steps that counted, none such. Train for longer."
            )
        mean, covariance = proposed.mean, proposed.value
        largest = int(mean.argmax())
        factors = mean / mean[largest]
        # Of x - r y to first order, where r is the ratio of their means.
        variances = (
            np.diagonal(covariance)
            - 2 * factors * covariance[largest]
            + np.square(factors) * covariance[largest, largest]
        )
        worth = max(1.0, proposed.number * (1 - self._memory) / (1 + self._memory))
        errors = np.sqrt(np.maximum(variances, 0) / worth) / mean[largest]
        multipliers = {}
        for name, factor, error in zip(self.names, factors.tolist(), errors.tolist(), strict=True):
            is_one = abs(1 - factor) <= 2 * error
            multipliers[name] = (1.0 if is_one else factor, error)
        return Multipliers(multipliers, self._modules)

    def plot(
        self,
        path: str | PathLike[str],
        accuracy: Mapping[str, ArrayLike | tuple[ArrayLike, ArrayLike]] | None = None,
    ) -> "Figure":
        """Save a figure of the record in the format of the suffix, and return it.

        Needs ``pip install gradbalance[plot]``.

        Args:
            path: Where to.
            accuracy: Curves to show beside the record, by name: values, which are spread evenly
                over the steps, or a pair of steps and values.

        Raises:
            RuntimeError: If no recorded step has counted.
        """
        from gradbalance._figure import draw

        record = self.to_dict()
        counts = self._kept["counts"][: self._n_kept]
        if not counts.any():
            raise RuntimeError(
                f"`Recorder` must have seen a step that counted. {self._nothing_counted()}"
            )
        for field in FIELDS:
            record[field] = record[field][counts]
        is_watched = self._is_watched and self._proposes
        figure = draw(record, is_watched, accuracy or {})
        figure.savefig(path, dpi=150)
        return figure

    def log_to(
        self,
        writer: "SummaryWriter | str | PathLike[str] | Callable[[dict[str, float]], object]",
        every: int = 50,
    ) -> None:
        """Log what was recorded since the last call, under ``gradbalance/<quantity>/<group>``.

        Call it after each step, or once at the end. It never waits for an accelerator, where the
        last step is known after the next one, or after :meth:`close`.

        Args:
            writer: A ``SummaryWriter``; the folder of one, such as ``"runs/1"``, which gets one
                more file at each call that logs; or a function of a dict, such as ``wandb.log``,
                which is called once for each logged step and finds it under ``gradbalance/step``.
            every: Log the first recorded step and one of every so many after it, >= 1.

        Raises:
            TypeError: If ``writer`` is none of these, or ``every`` not an integer.
            ValueError: If ``every`` is out of range.
        """
        add_scalar = getattr(writer, "add_scalar", None)
        is_folder = isinstance(writer, str | PathLike)
        _check_every(every)
        if isinstance(writer, type) or not (is_folder or callable(add_scalar or writer)):
            raise TypeError(
                "`writer` must be a folder, have add_scalar(tag, value, step), or be a function of "
                f"a dict. Got {writer!r}. Pass a path, a SummaryWriter, or `wandb.log`."
            )
        if self._totals.recorded + self._n_recent <= self._next_logged:
            return
        self._fold()
        if isinstance(writer, str | PathLike):
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(writer) as opened:
                self.log_to(opened, every)
            return
        first = math.ceil(self._next_logged / self._stride)
        for i in range(first, self._n_kept):
            place = i * self._stride
            if place < self._next_logged:
                continue
            row = self._kept[i]
            step = int(row["step"])
            scalars = {}
            for quantity in LOGGED:
                for name, value in zip(self.names, row[quantity].tolist(), strict=True):
                    if np.isfinite(value):
                        scalars[f"gradbalance/{quantity}/{name}"] = value
            if add_scalar is not None:
                for key, value in scalars.items():
                    add_scalar(key, value, step)
            elif callable(writer):
                writer({"gradbalance/step": step, **scalars})
            # Only now: a step whose writer raised is logged by the next call.
            self._next_logged = place + every
