"""Asking the rule: what was read becomes running means, these a decision, if the step counts."""

from typing import Any

import torch
from torch import Tensor

from gradbalance._engine.state import Flag, State, Window
from gradbalance._gradients.layout import on_host
from gradbalance._gradients.meter import Reading
from gradbalance.rules import Measured, Rule


def ask_rule(
    rule: Rule,
    state: State,
    reading: Reading,
    *,
    smoothing: float,
    window: Window,
    scale_free: bool,
    fresh: Flag = True,
) -> tuple[Flag, Flag]:
    """One decision, written into the state.

    A step with a non-finite norm or error, or with fewer than two active groups, does not count: every coefficient is
    1 and nothing is remembered. The same holds for coefficients that are not finite and >= 0 where to look at them
    would be a host read; elsewhere these are an error.

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
    norms, cosines, observed = reading
    norms = norms[: len(state.names)] if len(norms) > len(state.names) else norms
    total = norms.sum()  # not finite if one of them is not
    shares = norms / total
    host = on_host(norms.device)
    complete = False  # whether every group has a value of everything, and a mean of it
    counts: Flag
    if host:
        seen = shares.tolist()
        counts = bool(fresh) and all(s == s for s in seen) and sum(s > 0 for s in seen) >= 2
        complete = counts and 0.0 not in seen and (cosines is None or all(c == c for c in cosines.tolist()))
        active = state.everyone if complete else norms > 0
    else:
        active = norms > 0
        counts = (total < torch.inf) & (active.sum() >= 2) & fresh
    errors = state.errors
    if observed is not None:
        state.has_errors = True
        finite = observed.sum().abs() < torch.inf
        counts = counts and bool(finite) if host else counts & finite
        # Who was left out of the last call is not observed any more.
        (later,) = running_means([errors], [observed], smoothing)
        errors = torch.where(observed < 0, torch.nan, later)
    if not complete:
        shares = torch.where(active, shares, torch.nan)
    means, values = [state.shares], [shares]
    if cosines is not None:
        means, values = [state.shares, state.coherences], [shares, cosines]
    shares, *rest = running_means(means, values, smoothing, complete and state.complete)
    coherences = rest[0] if rest else None
    shown = coherences if complete or coherences is None else torch.where(active, coherences, torch.nan)

    state.norms, state.conflicts, state.coefficients = norms, None, state.ones
    if not host and hasattr(rule, "state_dict"):
        counts = bool(counts)  # what the rule itself keeps must not change either
    if counts is False:
        return False, False
    seen_errors = errors if state.has_errors else None
    measured = Measured(state.names, norms, shares, shown, seen_errors, active, scale_free, state.decided, state.step)
    coefficients, conflicts = _checked(rule, rule(measured), norms)
    if not host:
        counts = counts & ((coefficients >= 0) & (coefficients < torch.inf)).all()
    due = state.inside(window, counts)
    if due is not False:
        state.coefficients = coefficients if complete else torch.where(active & due, coefficients, 1.0)
        state.conflicts = None if conflicts is None else conflicts & due
    state.complete = state.complete or complete
    state.remember(counts, shares=shares, coherences=coherences, errors=seen_errors, decided=coefficients)
    return counts, due


def running_means(
    means: list[Tensor], values: list[Tensor], smoothing: float, known: bool = False
) -> tuple[Tensor, ...]:
    """The exponential running means after one more value of each, starting at the first; a NaN leaves its mean.

    Args:
        means: NaN where there is none yet, shape ``[N]`` each; as many as there are values.
        values: NaN where there is none, shape ``[N]`` each.
        smoothing: Weight of the past, in [0, 1).
        known: Whether there is no NaN in either.
    """
    new = torch._foreach_lerp(values, means, smoothing)
    if known:
        return tuple(new)
    return tuple(
        torch.where(value.isnan(), mean, torch.where(mean.isnan(), value, later))
        for mean, value, later in zip(means, values, new, strict=True)
    )


def _checked(rule: Rule, answer: Any, norms: Tensor) -> tuple[Tensor, Tensor | None]:
    """The coefficients, and the conflicts if the rule tells them."""
    coefficients, conflicts = answer if isinstance(answer, tuple) else (answer, None)
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"{name_of(rule)} must give a tensor. Got {type(coefficients).__name__}. Return shape [N].")
    shown = coefficients.tolist() if on_host(norms.device) and coefficients.dim() == 1 else []
    if coefficients.shape != norms.shape or not all(0 <= c < float("inf") for c in shown):
        raise ValueError(
            f"{name_of(rule)} must give finite coefficients >= 0 of shape {tuple(norms.shape)}. "
            f"Got {shown or tuple(coefficients.shape)}. Mind the NaN before a mean is known."
        )
    if conflicts is not None and conflicts.shape != (len(norms), len(norms)):
        raise ValueError(
            f"{name_of(rule)} must give conflicts of shape {(len(norms), len(norms))}. Got {tuple(conflicts.shape)}. "
            "Return the coefficients alone, or with who is damped for whose sake."
        )
    return coefficients.to(norms, copy=True), conflicts  # a rule may go on writing to its answer


def name_of(rule: Rule) -> str:
    """What a rule is called in messages and checkpoints."""
    name: str = getattr(rule, "__qualname__", type(rule).__qualname__)
    return f"`{name}`"
