"""Asking the rule on the host: what was read becomes running means, these a decision, if the step counts.

In plain numbers, since on the host one operator on tensors takes longer than all of this arithmetic.
"""

from collections.abc import Callable
from math import inf, isfinite, nan
from typing import Any, cast

import torch
from torch import Tensor

from gradbalance._engine.state import State, Window
from gradbalance._gradients.layout import numbers, on_host, wide
from gradbalance._gradients.meter import Reading
from gradbalance.rules import Measured, Rule


def ask_on_host(
    rule: Rule, state: State, reading: Reading, *, smoothing: float, window: Window, scale_free: bool, fresh: bool
) -> tuple[bool, bool]:
    """One decision, written into the state.

    A step with a non-finite norm or error, or with fewer than two active groups, does not count: every coefficient is
    1 and nothing is remembered.

    Args:
        rule: Is given what was measured.
        state: Is changed in place.
        reading: Of this step.
        smoothing: Weight of the past in the running means.
        window: Counted steps between which the coefficients are applied.
        scale_free: See :class:`Measured`.
        fresh: Whether the gradients are new.

    Returns:
        Whether the step counts, and whether it also lies inside the window.

    Raises:
        ValueError: If the rule gives coefficients that are not finite, negative or of another shape than ``[N]``.
        TypeError: If it gives no tensor.
    """
    norms = numbers(reading.norms)[: len(state.names)]
    total, active = sum(norms), [norm > 0 for norm in norms]
    counts, errors = fresh and total < inf and sum(active) >= 2, state.errors
    if reading.errors is not None:
        observed = reading.errors.tolist()
        state.has_errors, counts = True, counts and isfinite(sum(observed))
        # Who was left out of the last call is not observed any more.
        errors = [nan if e < 0 else _mean(old, e, smoothing) for old, e in zip(errors, observed, strict=True)]
    state.norms, state.conflicts, state.coefficients = norms, None, state.ones
    if not counts:
        return False, False
    shares = [_mean(old, x / total if x > 0 else nan, smoothing) for old, x in zip(state.shares, norms, strict=True)]
    coherences = shown = None
    if reading.cosines is not None:
        cosines = numbers(reading.cosines)
        coherences = [_mean(old, c, smoothing) for old, c in zip(state.coherences, cosines, strict=True)]
        shown = [a if on else nan for a, on in zip(coherences, active, strict=True)]
    seen_errors = errors if state.has_errors else None
    measured = (norms, shares, shown, seen_errors, active, scale_free, state.decided, state.step)
    coefficients, conflicts = _answer(rule, Measured(state.names, *cast(Any, measured)), state.home)
    due = state.inside(window)
    if due:
        state.coefficients = [c if on else 1.0 for c, on in zip(coefficients, active, strict=True)]
        state.conflicts = conflicts
    state.shares, state.errors, state.decided = shares, errors, coefficients
    state.coherences = state.coherences if coherences is None else coherences
    state.step += 1
    return True, due


def _mean(old: float, new: float, smoothing: float) -> float:
    """The running mean after one more value, starting at the first; a NaN leaves it."""
    if new != new:
        return old
    return new if old != old else new + smoothing * (old - new)


def _answer(rule: Rule, measured: Measured, home: torch.device) -> tuple[list[float], Tensor | None]:
    """The coefficients, and the conflicts if the rule tells them, for a measurement in lists."""
    n = len(measured.names)
    if (in_numbers := numbers_of(rule)) is not None:
        found, conflicts = in_numbers(measured), None
    else:
        coefficients, conflicts = checked(rule, rule(_in_tensors(measured, home)), n)
        found = [float(c) for c in coefficients.tolist()]
    if len(found) != n or not all(0 <= c < inf for c in found):
        raise ValueError(unfit(rule, n, found))
    return found, conflicts


def _in_tensors(measured: Measured, home: torch.device) -> Measured:
    vectors = {name: getattr(measured, name) for name in ("norms", "shares", "coherences", "errors", "coefficients")}
    there = {name: row for name, row in vectors.items() if row is not None}
    tensors = torch.tensor(list(there.values()), dtype=wide(home), device=home).unbind()
    active = torch.tensor(measured.active, device=home)
    step = tensors[0].new_tensor(measured.step)
    return measured._replace(active=active, step=step, **cast(Any, dict(zip(there, tensors, strict=True))))


def numbers_of(rule: Rule) -> Callable[[Measured], list[float]] | None:
    """The rule's ``in_numbers``, if it belongs to its call: a subclass with another call does not mean it any more."""
    for kind in type(rule).__mro__:
        if "__call__" in vars(kind):
            return cast(Any, rule).in_numbers if "in_numbers" in vars(kind) else None
    return None


def checked(rule: Rule, answer: Any, n: int) -> tuple[Tensor, Tensor | None]:
    """The coefficients of N groups, and the conflicts if the rule tells them, of the right shapes."""
    coefficients, conflicts = answer if isinstance(answer, tuple) else (answer, None)
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"{name_of(rule)} must give a tensor. Got {type(coefficients).__name__}. Return shape [N].")
    if coefficients.shape != (n,):
        shown = coefficients.dim() == 1 and on_host(coefficients.device)
        raise ValueError(unfit(rule, n, coefficients.tolist() if shown else tuple(coefficients.shape)))
    if conflicts is not None and conflicts.shape != (n, n):
        raise ValueError(
            f"{name_of(rule)} must give conflicts of shape {(n, n)}. Got {tuple(conflicts.shape)}. "
            "Return the coefficients alone, or with who is damped for whose sake."
        )
    return coefficients, conflicts


def unfit(rule: Rule, n: int, got: Any) -> str:
    """What is said of coefficients that are none."""
    return (
        f"{name_of(rule)} must give finite coefficients >= 0 of shape {(n,)}. Got {got}. "
        "Mind the NaN before a mean is known."
    )


def name_of(rule: Rule) -> str:
    """What a rule is called in messages and checkpoints."""
    name: str = getattr(rule, "__qualname__", type(rule).__qualname__)
    return f"`{name}`"
