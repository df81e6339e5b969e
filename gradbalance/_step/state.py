"""What is remembered between steps: running means and their errors, the last decision, warnings."""

from collections.abc import Iterable, Sequence
from math import inf, isfinite, isnan, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradbalance._optimizer.checkpoint import Saved, count_in, number_in
from gradbalance._step.measure import UNSEEN
from gradbalance._warn import warn
from gradbalance.balance import Balance
from gradbalance.rules import Measured, Rule

Vector = NDArray[np.float64]
Flags = NDArray[np.bool_]
Window = tuple[int, int | None] | None

# Measured steps in a row without effect after which a warning says so.
PATIENCE = 100


class RunningMean(NamedTuple):
    r"""A running mean of some values, and their variance.

    The k-th value has the weight :math:`\max(1 - s, 1/k)` with the smoothing s: a plain mean at
    first, an exponential one later. The variance has the same weights. Of plain floats, which on a
    few groups are faster than arrays.

    Attributes:
        mean: 0 before the first value.
        variance: Of the values.
        number: Of the values.

    Reference:
        West, Updating mean and variance estimates, 1979.
    """

    mean: float = 0.0
    variance: float = 0.0
    number: int = 0

    def after(self, value: float, smoothing: float) -> "RunningMean":
        """The mean after one more value; NaN leaves it as it is."""
        if isnan(value):
            return self
        if self.number == 0:
            return RunningMean(value, 0.0, 1)
        number = self.number + 1
        weight = max(1 - smoothing, 1 / number)
        # Not `mean + weight * (value - mean)`, which loses a small value after a large one.
        mean = (1 - weight) * self.mean + weight * value
        deviation = value - self.mean
        variance = (1 - weight) * (self.variance + weight * deviation * deviation)
        return RunningMean(mean, variance, number)

    @property
    def value(self) -> float:
        """The mean as others see it, NaN before the first value."""
        return self.mean if self.number else nan

    def error(self, smoothing: float) -> float:
        r"""The standard error :math:`s/\sqrt{n - 1}`, inf before the third value.

        n is the number of values, at most (1 + smoothing)/(1 - smoothing), which is how many an
        exponential mean is worth.
        """
        n = min(self.number, (1 + smoothing) / (1 - smoothing))
        if self.number < 3 or n <= 1:
            return inf
        return sqrt(self.variance / (n - 1))


class Means(NamedTuple):
    """Running means of a group, each :class:`RunningMean`."""

    share: RunningMean = RunningMean()
    coherence: RunningMean = RunningMean()
    useful: RunningMean = RunningMean()
    error: RunningMean = RunningMean()


def _values(means: Iterable[RunningMean]) -> Vector:
    return np.array([mean.value for mean in means])


def _errors(means: Iterable[RunningMean], smoothing: float) -> Vector:
    return np.array([mean.error(smoothing) for mean in means])


class State:
    """What is remembered between steps.

    Args:
        names: The groups.
        rule: Decides.
        smoothing: Weight of the past in the running means, per measured step.
        scale_free: Whether a step of the optimizer is as long however large the gradient.
        fewest: Number of active groups from which on a step counts.

    Attributes:
        step: Number of optimizer steps that counted.
        means: The running means of each group.
        decided: The coefficients that the rule returned last.
        norms: Of the last step that was read.
        cosines: Of the last step that was read, NaN where there are none.
        moved: How far each group moved at the last step that was read, NaN where that is unknown.
        conflicts: As the rule reported them at the last step, bool, shape ``[N, N]``; or None.
        has_errors: Whether errors were ever observed.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        rule: Rule,
        smoothing: float,
        scale_free: bool,
        fewest: int = 2,
    ) -> None:
        n = len(names)
        self.names = names
        self.step = 0
        self.means = [Means()] * n
        self.decided = [1.0] * n
        self.norms = [0.0] * n
        self.cosines = [nan] * n
        self.moved = [nan] * n
        self.fewest = fewest
        self.conflicts: Flags | None = None
        self.has_errors = False
        self._rule = rule
        self._smoothing = smoothing
        self._scale_free = scale_free
        self._watchdog = Watchdog(names)
        if getattr(rule, "is_constant", False):
            self.decided, _ = self._ask(self.means, [nan] * n, has_errors=False, rates=None)

    def learn(
        self,
        norms: list[float],
        cosines: list[float] | None,
        errors: list[float] | None,
        rates: list[float] | None,
    ) -> list[bool]:
        """Take a step into the means and decide, if the step counts.

        Args:
            norms: Unscaled, of each group.
            cosines: NaN where there is none; None if they are not measured.
            errors: ``UNSEEN`` for a group that was not observed; None if none was.
            rates: Learning rates, NaN where one is not known; None if none is.

        Returns:
            Which groups are active, none if the step does not count.

        Raises:
            TypeError, ValueError: If the rule gives anything but valid coefficients.
        """
        active = [norm > 0 for norm in norms]
        is_finite = isfinite(sum(norms))
        has_finite_errors = errors is None or isfinite(sum(errors))
        self.norms = norms
        self.cosines = [nan] * len(norms) if cosines is None else cosines
        self.conflicts = None
        counts = is_finite and has_finite_errors and sum(active) >= self.fewest
        self._watchdog.see(active, is_finite, has_finite_errors, counts)
        if not counts:
            return [False] * len(norms)
        means = self._after(norms, cosines, errors)
        has_errors = self.has_errors or errors is not None
        if sum(active) >= 2:  # a rule compares groups
            self.decided, self.conflicts = self._ask(means, norms, has_errors, rates)
        self.means = means
        self.has_errors = has_errors
        return active

    def _after(
        self, norms: list[float], cosines: list[float] | None, errors: list[float] | None
    ) -> list[Means]:
        """The running means after one more step."""
        total = sum(norms)
        means = []
        for m, old in enumerate(self.means):
            share = norms[m] / total if norms[m] > 0 else nan
            cosine = nan if cosines is None else cosines[m]
            error = old.error
            if errors is not None and errors[m] == UNSEEN:
                error = RunningMean()  # who is left out of a call is not observed any more
            elif errors is not None:
                error = error.after(errors[m], self._smoothing)
            means.append(
                Means(
                    old.share.after(share, self._smoothing),
                    old.coherence.after(cosine, self._smoothing),
                    old.useful.after(cosine * share, self._smoothing),
                    error,
                )
            )
        return means

    def _ask(
        self, means: list[Means], norms: list[float], has_errors: bool, rates: list[float] | None
    ) -> tuple[list[float], Flags | None]:
        """Call the rule."""
        with_coherence = getattr(self._rule, "needs_coherence", True)
        measured = Measured(
            names=self.names,
            norms=np.array(norms),
            shares=_values([group.share for group in means]),
            coherences=None,
            coherence_errors=None,
            useful=None,
            useful_errors=None,
            errors=_values([group.error for group in means]) if has_errors else None,
            active=np.array(norms) > 0,
            scale_free=self._scale_free,
            coefficients=np.array(self.decided),
            step=self.step,
            rates=None if rates is None else np.array(rates),
        )
        if with_coherence:
            coherences = [group.coherence for group in means]
            useful = [group.useful for group in means]
            measured = measured._replace(
                coherences=_values(coherences),
                coherence_errors=_errors(coherences, self._smoothing),
                useful=_values(useful),
                useful_errors=_errors(useful, self._smoothing),
            )
        return checked_answer(self._rule, self._rule(measured), len(self.names))

    def balance(self, coefficients: Sequence[float]) -> Balance:
        """The last step that was read, with the coefficients in force."""
        in_force = np.array(coefficients)
        conflicts = self.conflicts
        if conflicts is None:
            conflicts = in_force[:, None] < in_force
        coherences = [group.coherence for group in self.means]
        useful = [group.useful for group in self.means]
        return Balance(
            names=self.names,
            step=self.step,
            norms=np.array(self.norms),
            shares=_values([group.share for group in self.means]),
            cosines=np.array(self.cosines),
            coherences=_values(coherences),
            coherence_errors=_errors(coherences, self._smoothing),
            useful=_values(useful),
            useful_errors=_errors(useful, self._smoothing),
            errors=_values([group.error for group in self.means]),
            moved=np.array(self.moved),
            coefficients=in_force,
            proposed=np.array(self.decided),
            conflicts=conflicts.copy(),
        )

    def forget(self, is_gone: list[bool]) -> None:
        """Forget the means of groups that take no part any more."""
        for m, gone in enumerate(is_gone):
            if gone:
                self.means[m] = Means()
        self._watchdog.is_frozen = is_gone

    def is_inside(self, window: Window) -> bool:
        """Whether the next step lies inside a window of counted steps."""
        if window is None:
            return True
        start, stop = window
        return start <= self.step and (stop is None or self.step < stop)

    def save(self) -> Saved:
        """What is remembered, by group name, in builtin types."""
        groups = {}
        for name, means, decided in zip(self.names, self.means, self.decided, strict=True):
            group: Saved = {key: list(mean) for key, mean in means._asdict().items()}
            groups[name] = group | {"decided": decided}
        return {"step": self.step, "errors": self.has_errors, "groups": groups}

    def parse(self, saved: Saved) -> tuple[list[Means], list[float], int, bool]:
        """Read what :meth:`save` gave, of the same groups in any order, and change nothing.

        Raises:
            KeyError, TypeError: If it is damaged.
            ValueError: If it is that of other groups.
        """
        groups = saved["groups"]
        if set(groups) != set(self.names):
            raise ValueError(
                "`state_dict` must hold the state of the groups "
                f"{', '.join(self.names)}. Got {', '.join(groups) or 'none'}. "
                "Load a checkpoint of the same groups, or build with `persist=False`."
            )
        means = []
        decided = []
        for name in self.names:
            group = groups[name]
            means.append(Means(**{key: _parsed_mean(group[key]) for key in Means._fields}))
            decided.append(number_in(group["decided"]))
            if not 0 <= decided[-1] < inf:
                raise TypeError(f"a coefficient of {decided[-1]}")
        if not isinstance(saved["errors"], bool):
            raise TypeError(f"{saved['errors']!r} in the place of a bool")
        return means, decided, count_in(saved["step"]), saved["errors"]

    def load(self, saved: Saved) -> None:
        """Take what :meth:`save` gave, of the same groups in any order."""
        self.means, decided, self.step, self.has_errors = self.parse(saved)
        if not getattr(self._rule, "is_constant", False):
            self.decided = decided
        self.norms = [0.0] * len(decided)
        self.moved = [nan] * len(decided)
        self.conflicts = None


def _parsed_mean(saved: Sequence[object]) -> RunningMean:
    mean, variance, number = saved if len(saved) == 3 else (None, None, None)
    parsed = RunningMean(number_in(mean), number_in(variance), count_in(number))
    if not isfinite(parsed.mean):
        raise TypeError(f"a mean of {parsed.mean}")
    return parsed


class Watchdog:
    """Warns once if nothing has happened for many measured steps.

    A penalty that cannot act says so.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._uncounted = 0  # measured steps in a row that did not count
        self._without_gradient = [0] * len(names)  # in a row, of each group
        self._has_warned = False
        self.is_frozen = [False] * len(names)

    def see(
        self, active: list[bool], is_finite: bool, has_finite_errors: bool, counts: bool
    ) -> None:
        """One more measured step."""
        if self._has_warned:
            return
        self._uncounted = 0 if counts else self._uncounted + 1
        silent = []
        for m, name in enumerate(self._names):
            if active[m] or self.is_frozen[m] or not is_finite:
                self._without_gradient[m] = 0
            else:
                self._without_gradient[m] += 1
            if self._without_gradient[m] >= PATIENCE:
                silent.append(f"`{name}`")
        listed = ", ".join(silent)
        if self._uncounted >= PATIENCE:
            if not is_finite:
                why = "The gradient norms are not finite"
            elif not has_finite_errors:
                why = "The observed errors are not finite"
            elif silent:
                why = f"No parameter of {listed} has a gradient other than 0"
            else:
                why = "Fewer than two groups have a gradient in the same step"
            self._warn(
                f"No step has counted for {PATIENCE} measured steps, so nothing is balanced. {why}."
            )
        elif silent:
            self._warn(
                f"No parameter of {listed} has had a gradient other than 0 for {PATIENCE} measured "
                "steps. Was a module replaced after the optimizer was wrapped, or is its output "
                "not used?"
            )

    def _warn(self, message: str) -> None:
        self._has_warned = True
        warn(message)


def checked_answer(rule: Rule, answer: object, n: int) -> tuple[list[float], Flags | None]:
    """The coefficients in the answer of a rule, and the conflicts if it reports them.

    Raises:
        TypeError: If they are not of real numbers, or the conflicts not of bool.
        ValueError: If a shape is wrong, or a coefficient negative or not finite.
    """
    name = name_of(rule)
    conflicts: object = None
    if isinstance(answer, tuple) and any(np.ndim(part) > 0 for part in answer):
        if len(answer) != 2:
            raise ValueError(
                f"{name} must return coefficients, or a pair of coefficients and conflicts. "
                f"Got a tuple of {len(answer)}. Return an array of shape ({n},)."
            )
        answer, conflicts = answer
    coefficients = _array(name, "coefficients", answer)
    if coefficients.dtype.kind not in "fiub":
        raise TypeError(
            f"{name} must return real coefficients. Got {_kind(answer, coefficients)}. "
            f"Return an array of floats, of shape ({n},)."
        )
    numbers = coefficients.astype(np.float64).tolist()
    if coefficients.shape != (n,) or not all(0 <= c < inf for c in numbers):
        got = numbers if coefficients.ndim == 1 else coefficients.shape
        raise ValueError(
            f"{name} must return finite coefficients >= 0 of shape ({n},). Got {got}. "
            "Mind the NaN before a mean is known."
        )
    if conflicts is None:
        return numbers, None
    flags = _array(name, "conflicts", conflicts)
    if flags.dtype != bool:
        raise TypeError(
            f"{name} must return conflicts of bool. Got {_kind(conflicts, flags)}. "
            "Compare, or return the coefficients alone."
        )
    if flags.shape != (n, n):
        raise ValueError(
            f"{name} must return conflicts of shape ({n}, {n}). Got {flags.shape}. "
            "Return the coefficients alone, or with who is slowed down for whose sake."
        )
    return numbers, flags.copy()


def _array(name: str, what: str, answer: object) -> NDArray[Any]:
    if isinstance(answer, Tensor):
        if answer.device.type != "cpu":
            raise TypeError(
                f"{name} must return {what} on the host. Got a tensor on {answer.device}. "
                "What it is given is on the host: compute with numpy, or with CPU tensors."
            )
        answer = answer.detach()
        answer = answer.float() if answer.dtype == torch.bfloat16 else answer
    try:
        return np.asarray(answer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must return {what} that numpy.asarray takes. Got {type(answer).__name__}. "
            "Return an array, a list or a CPU tensor."
        ) from error


def _kind(answer: object, array: NDArray[Any]) -> str:
    return type(answer).__name__ if array.dtype == object else str(array.dtype)


def name_of(rule: Rule) -> str:
    """What a rule is called in messages and checkpoints."""
    name: str = getattr(rule, "__qualname__", type(rule).__qualname__)
    return f"`{name}`"
