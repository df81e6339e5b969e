"""What is remembered between steps: running means and their errors, the last decision, warnings."""

import warnings
from math import inf, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradbalance._optimizer.checkpoint import Saved
from gradbalance._step.measure import UNSEEN
from gradbalance.balance import Balance
from gradbalance.rules import Measured, Rule

Vector = NDArray[np.float64]
Flags = NDArray[np.bool_]
Window = tuple[int, int | None] | None

# Rows of the running means.
SHARE, COHERENCE, USEFUL, ERROR = range(4)

# Measured steps in a row without effect after which a warning says so.
PATIENCE = 100


class RunningMeans(NamedTuple):
    r"""Running means of several quantities of N groups, and the variance of their values.

    The k-th value of a mean has the weight :math:`\max(1 - s, 1/k)` with the smoothing s: a plain
    mean at first, an exponential one later. The variance has the same weights.

    Attributes:
        means: 0 before the first value, shape ``[4, N]``.
        variances: Shape ``[4, N]``.
        counts: Number of values, shape ``[4, N]``.

    Reference:
        The update of mean and variance: West, Updating mean and variance estimates, 1979.
    """

    means: Vector
    variances: Vector
    counts: Vector

    @classmethod
    def empty(cls, n: int) -> "RunningMeans":
        """Means of N groups before any value."""
        return cls(np.zeros((4, n)), np.zeros((4, n)), np.zeros((4, n)))

    def after(self, values: Vector, smoothing: float) -> "RunningMeans":
        """The means after one more value of each; NaN leaves its mean as it is."""
        is_given = ~np.isnan(values)
        counts = self.counts + is_given
        weights = np.maximum(1 - smoothing, 1 / np.maximum(counts, 1)) * is_given
        values = np.where(is_given, values, self.means)
        # Not `means + weights * (values - means)`, which loses a small value after a large one.
        means = (1 - weights) * self.means + weights * values
        deviations = values - self.means
        variances = (1 - weights) * (self.variances + weights * deviations**2)
        return RunningMeans(means, variances, counts)

    def shown(self) -> Vector:
        """The means as others see them, NaN before the first value, shape ``[4, N]``."""
        shown: Vector = np.where(self.counts > 0, self.means, nan)
        return shown

    def without(self, is_gone: Flags) -> "RunningMeans":
        """The means with those where ``is_gone``, shape ``[4, N]``, back at no value."""
        return RunningMeans(
            np.where(is_gone, 0.0, self.means),
            np.where(is_gone, 0.0, self.variances),
            np.where(is_gone, 0.0, self.counts),
        )

    def errors(self, smoothing: float) -> Vector:
        r"""Standard errors :math:`s/\sqrt{n - 1}`, inf before the third value, shape ``[4, N]``.

        n is the number of values, at most (1 + smoothing)/(1 - smoothing), which is how many an
        exponential mean is worth.
        """
        n = np.minimum(self.counts, (1 + smoothing) / (1 - smoothing))
        is_known = (self.counts >= 3) & (n > 1)
        errors = np.full(n.shape, inf)
        np.divide(self.variances, n - 1, out=errors, where=is_known)
        roots: Vector = np.sqrt(errors)
        return roots


class State:
    """What is remembered between steps.

    Args:
        names: The groups.
        rule: Decides.
        smoothing: Weight of the past in the running means, per measured step.
        scale_free: Whether a step of the optimizer is as long however large the gradient.

    Attributes:
        step: Number of optimizer steps that counted.
        running: The running means.
        decided: What the rule answered last, shape ``[N]``.
        norms: Of the last step that was read, shape ``[N]``.
        conflicts: As the rule reported them at the last step, bool, shape ``[N, N]``; or None.
        has_errors: Whether errors were ever observed.
    """

    def __init__(
        self, names: tuple[str, ...], rule: Rule, smoothing: float, scale_free: bool
    ) -> None:
        n = len(names)
        self.names = names
        self.step = 0
        self.running = RunningMeans.empty(n)
        self.decided = np.ones(n)
        self.norms = np.zeros(n)
        self.conflicts: Flags | None = None
        self.has_errors = False
        self._rule = rule
        self._smoothing = smoothing
        self._scale_free = scale_free
        self._watchdog = Watchdog(names)
        if getattr(rule, "is_constant", False):
            unknown = np.full(n, nan)
            self.decided, _ = self._ask(RunningMeans.empty(n), unknown)

    def learn(self, norms: Vector, cosines: Vector | None, errors: Vector | None) -> Flags:
        """Take a step into the means and decide, if the step counts.

        Args:
            norms: Unscaled, shape ``[N]``.
            cosines: NaN where there is none, shape ``[N]``; None if they are not measured.
            errors: ``UNSEEN`` for a group that was not observed, shape ``[N]``; None if none was.

        Returns:
            Which groups are active, none if the step does not count, bool, shape ``[N]``.

        Raises:
            TypeError, ValueError: If the rule gives anything but valid coefficients.
        """
        active = norms > 0
        is_finite = bool(np.isfinite(norms).all())
        has_finite_errors = errors is None or bool(np.isfinite(errors).all())
        self.norms = norms
        self.conflicts = None
        self.has_errors |= errors is not None
        counts = is_finite and has_finite_errors and int(np.count_nonzero(active)) >= 2
        self._watchdog.see(active, is_finite, has_finite_errors, counts)
        if not counts:
            return np.zeros(len(norms), dtype=bool)
        running = self._after(norms, cosines, errors)
        self.decided, self.conflicts = self._ask(running, norms)
        self.running = running
        return active

    def _after(self, norms: Vector, cosines: Vector | None, errors: Vector | None) -> RunningMeans:
        running = self.running
        values = np.full(running.means.shape, nan)
        values[SHARE] = np.where(norms > 0, norms / norms.sum(), nan)
        if cosines is not None:
            values[COHERENCE] = cosines
            values[USEFUL] = cosines * values[SHARE]
        if errors is not None:
            is_seen = errors != UNSEEN
            values[ERROR] = np.where(is_seen, errors, nan)
            # A group that is left out of a call is not observed any more.
            is_gone = np.zeros(running.means.shape, dtype=bool)
            is_gone[ERROR] = ~is_seen
            running = running.without(is_gone)
        return running.after(values, self._smoothing)

    def _ask(self, running: RunningMeans, norms: Vector) -> tuple[Vector, Flags | None]:
        with_coherence = getattr(self._rule, "needs_coherence", True)
        means = running.shown()
        spreads = means
        if with_coherence:
            spreads = running.errors(self._smoothing)
        measured = Measured(
            names=self.names,
            norms=norms.copy(),
            shares=means[SHARE],
            coherences=means[COHERENCE] if with_coherence else None,
            coherence_errors=spreads[COHERENCE] if with_coherence else None,
            useful=means[USEFUL] if with_coherence else None,
            useful_errors=spreads[USEFUL] if with_coherence else None,
            errors=means[ERROR] if self.has_errors else None,
            active=norms > 0,
            scale_free=self._scale_free,
            coefficients=self.decided.copy(),
            step=self.step,
        )
        return checked_answer(self._rule, self._rule(measured), len(self.names))

    def balance(self, coefficients: Vector) -> Balance:
        """The last step that was read, with the coefficients in force; copies."""
        means = self.running.shown()
        spreads = self.running.errors(self._smoothing)
        conflicts = self.conflicts
        if conflicts is None:
            conflicts = coefficients[:, None] < coefficients
        return Balance(
            names=self.names,
            step=self.step,
            norms=self.norms.copy(),
            shares=means[SHARE],
            coherences=means[COHERENCE],
            coherence_errors=spreads[COHERENCE],
            useful=means[USEFUL],
            useful_errors=spreads[USEFUL],
            errors=means[ERROR],
            coefficients=coefficients.copy(),
            proposed=self.decided.copy(),
            conflicts=conflicts.copy(),
        )

    def forget(self, is_gone: Flags) -> None:
        """Forget the means of groups that take no part any more, bool, shape ``[N]``."""
        self.running = self.running.without(np.broadcast_to(is_gone, self.running.means.shape))
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
        for m, name in enumerate(self.names):
            groups[name] = {
                "means": self.running.means[:, m].tolist(),
                "variances": self.running.variances[:, m].tolist(),
                "counts": self.running.counts[:, m].tolist(),
                "decided": float(self.decided[m]),
            }
        return {"step": self.step, "errors": self.has_errors, "groups": groups}

    def check(self, saved: Saved) -> None:
        """Check what :meth:`save` gave.

        Raises:
            KeyError: If something is missing in it.
            ValueError: If it is that of other groups.
        """
        own = self.save()
        for key in own:
            saved[key]
        names = saved["groups"]
        if set(names) != set(self.names):
            raise ValueError(
                "`state_dict` must hold the state of the groups "
                f"{', '.join(self.names)}. Got {', '.join(names)}. "
                "Load a checkpoint of the same groups, or build with `persist=False`."
            )
        for name, group in names.items():
            for key in own["groups"][name]:
                group[key]

    def load(self, saved: Saved) -> None:
        """Take what :meth:`save` gave, of the same groups in any order."""
        groups = [saved["groups"][name] for name in self.names]
        means = np.array([group["means"] for group in groups], dtype=float)
        variances = np.array([group["variances"] for group in groups], dtype=float)
        counts = np.array([group["counts"] for group in groups], dtype=float)
        self.running = RunningMeans(means.T.copy(), variances.T.copy(), counts.T.copy())
        if not getattr(self._rule, "is_constant", False):
            self.decided = np.array([group["decided"] for group in groups], dtype=float)
        self.step = int(saved["step"])
        self.has_errors = bool(saved["errors"])
        self.norms = np.zeros(len(groups))
        self.conflicts = None


class Watchdog:
    """Warns once if nothing has happened for many measured steps.

    A penalty that cannot act says so.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = np.array(names)
        self._uncounted = 0  # measured steps in a row that did not count
        self._without_gradient = np.zeros(len(names), dtype=int)  # in a row, of each group
        self._has_warned = False
        self.is_frozen = np.zeros(len(names), dtype=bool)

    def see(self, active: Flags, is_finite: bool, has_finite_errors: bool, counts: bool) -> None:
        """One more measured step."""
        if self._has_warned:
            return
        if counts and active.all():
            self._uncounted = 0
            self._without_gradient[:] = 0
            return
        self._uncounted = 0 if counts else self._uncounted + 1
        is_silent = ~active & is_finite & ~self.is_frozen
        self._without_gradient = np.where(is_silent, self._without_gradient + 1, 0)
        silent = self._names[self._without_gradient >= PATIENCE]
        listed = ", ".join(f"`{name}`" for name in silent)
        if self._uncounted >= PATIENCE:
            if not is_finite:
                why = "The gradient norms are not finite"
            elif not has_finite_errors:
                why = "The observed errors are not finite"
            elif len(silent):
                why = f"No parameter of {listed} has a gradient"
            else:
                why = "Fewer than two groups have a gradient in the same step"
            self._warn(
                f"No step has counted for {PATIENCE} measured steps, so nothing is balanced. {why}."
            )
        elif len(silent):
            self._warn(
                f"No parameter of {listed} has had a gradient for {PATIENCE} measured steps. Was a "
                "module replaced after the optimizer was wrapped, or is its output not used?"
            )

    def _warn(self, message: str) -> None:
        self._has_warned = True
        warnings.warn(message, UserWarning, stacklevel=2)


def checked_answer(rule: Rule, answer: object, n: int) -> tuple[Vector, Flags | None]:
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
    coefficients = coefficients.astype(np.float64)
    is_valid = (coefficients >= 0) & (coefficients < inf)
    if coefficients.shape != (n,) or not is_valid.all():
        raise ValueError(
            f"{name} must return finite coefficients >= 0 of shape ({n},). "
            f"Got {coefficients.tolist() if coefficients.ndim == 1 else coefficients.shape}. "
            "Mind the NaN before a mean is known."
        )
    if conflicts is None:
        return coefficients, None
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
    return coefficients, flags.copy()


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
