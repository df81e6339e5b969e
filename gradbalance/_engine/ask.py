"""Asking the rule: what was read becomes running means, these a decision, if the step counts."""

from typing import Any

import torch
from torch import Tensor

from gradbalance._engine.state import State
from gradbalance._gradients.layout import on_host
from gradbalance._gradients.meter import Reading
from gradbalance.rules import Measured, Rule

Window = tuple[int, int | None]


def ask_rule(
    rule: Rule, state: State, reading: Reading, *, smoothing: float, window: Window | None, scale_free: bool, fresh: Any
) -> tuple[Tensor, Tensor]:
    """One decision, written into the state.

    A step with a non-finite norm or error, or with fewer than two active groups, does not count: every coefficient is
    1 and nothing is remembered. So does one whose coefficients are not finite and >= 0, where to look at them would be
    a host read; elsewhere these are an error.

    Args:
        rule: Is given what was measured.
        state: Is changed in place.
        reading: Of this step.
        smoothing: Weight of the past in the running means.
        window: Counted steps between which the coefficients are applied.
        scale_free: See :class:`Measured`.
        fresh: Whether the gradients are new, bool, shape ``[]``, or True.

    Returns:
        Whether the step counts, and whether it also lies inside the window, bool, shape ``[]``.

    Raises:
        ValueError: If the rule gives coefficients that are not finite, negative or of another shape than ``[N]``.
        TypeError: If it gives no tensor.
    """
    norms, errors = reading.norms[: len(state.names)], reading.errors
    active, total = (norms > 0) & (norms < torch.inf), norms.sum()
    counts = (total < torch.inf) & (active.sum() >= 2) & fresh  # one NaN or inf shows in the sum
    nothing = torch.full_like(norms, torch.nan)
    now = [torch.where(active, norms / total, torch.nan), nothing, nothing]
    if reading.cosines is not None:
        now[1] = reading.cosines
    before = state.means
    if errors is not None:
        state.has_errors = True
        counts = counts & (errors.sum().abs() < torch.inf)
        now[2] = torch.where(errors < 0, torch.nan, errors)
        # Who was left out of the last call is not observed any more.
        before = torch.cat((before[:2], torch.where(errors < 0, torch.nan, before[2])[None]))
    means = running_means(before, torch.stack(now), smoothing)

    host = on_host(norms.device)
    state.norms, state.conflicts = norms, torch.zeros_like(state.conflicts)
    state.coefficients = torch.ones_like(norms)
    if (host or hasattr(rule, "state_dict")) and not counts:
        return counts, counts
    shares, coherences, seen = means
    measured = Measured(
        state.names,
        norms,
        shares,
        None if reading.cosines is None else coherences,
        seen if state.has_errors else None,
        active,
        scale_free,
        state.decided,
        state.step,
    )
    coefficients, conflicts = _checked(rule, rule(measured), norms)
    if not host:
        counts = counts & ((coefficients >= 0) & (coefficients < torch.inf)).all()
    due = counts & state.inside(window)
    state.coefficients = torch.where(active & due, coefficients, 1.0)
    state.conflicts = conflicts & due
    state.remember(counts, means, coefficients)
    return counts, due


def running_means(means: Tensor, values: Tensor, smoothing: float) -> Tensor:
    """The exponential running means after one more value of each, starting at the first; a NaN leaves its mean."""
    new = torch.where(means.isnan(), values, torch.lerp(values, means, smoothing))
    return torch.where(values.isnan(), means, new)


def _checked(rule: Rule, answer: Any, norms: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients, and the conflicts or what the coefficients show of them."""
    coefficients, conflicts = answer if isinstance(answer, tuple) else (answer, None)
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"{name_of(rule)} must give a tensor. Got {type(coefficients).__name__}. Return shape [N].")
    shown = coefficients.tolist() if on_host(norms.device) and coefficients.dim() == 1 else []
    if coefficients.shape != norms.shape or not all(0 <= c < float("inf") for c in shown):
        raise ValueError(
            f"{name_of(rule)} must give finite coefficients >= 0 of shape {tuple(norms.shape)}. "
            f"Got {shown or tuple(coefficients.shape)}. Mind the NaN before a mean is known."
        )
    coefficients = coefficients.to(norms)
    return coefficients, coefficients[:, None] < coefficients if conflicts is None else conflicts


def name_of(rule: Rule) -> str:
    """What a rule is called in messages and checkpoints."""
    name: str = getattr(rule, "__qualname__", type(rule).__qualname__)
    return f"`{name}`"
