"""Asking the rule on an accelerator: the same as :func:`ask_on_host` in tensors that nobody looks at."""

from typing import cast

import torch
from torch import Tensor

from gradbalance._engine.ask import checked
from gradbalance._engine.state import Flag, State, Window
from gradbalance._gradients.meter import Reading
from gradbalance.rules import Measured, Rule


def ask_on_device(
    rule: Rule, state: State, reading: Reading, *, smoothing: float, window: Window, scale_free: bool, fresh: Flag
) -> tuple[Flag, Flag]:
    """One decision, written into the state; see :func:`ask_on_host`.

    Coefficients that are not finite and >= 0 are no error here, as to look at them would be a host read: the step does
    not count.
    """
    norms, cosines, observed = cast(tuple[Tensor, Tensor | None, Tensor | None], reading)
    norms = norms[: len(state.names)]
    total, active = norms.sum(), norms > 0
    counts: Flag = (total < torch.inf) & (active.sum() >= 2) & fresh
    errors = state.errors
    if observed is not None:
        state.has_errors = True
        counts = counts & (observed.sum().abs() < torch.inf)
        errors = torch.where(observed < 0, torch.nan, _means(errors, observed, smoothing))
    shares = _means(state.shares, torch.where(active, norms / total, torch.nan), smoothing)
    coherences = None if cosines is None else _means(state.coherences, cosines, smoothing)
    shown = None if coherences is None else torch.where(active, coherences, torch.nan)

    state.norms, state.conflicts, state.coefficients = norms, None, state.ones
    if hasattr(rule, "state_dict"):
        counts = bool(counts)  # what the rule itself keeps must not change either
        if not counts:
            return False, False
    seen_errors = errors if state.has_errors else None
    measured = Measured(state.names, norms, shares, shown, seen_errors, active, scale_free, state.decided, state.step)
    coefficients, conflicts = checked(rule, rule(measured), len(norms))
    coefficients = coefficients.to(norms, copy=True)  # a rule may go on writing to its answer
    counts = counts & ((coefficients >= 0) & (coefficients < torch.inf)).all()
    due = counts & state.inside(window)
    state.coefficients = torch.where(active & due, coefficients, 1.0)
    state.conflicts = None if conflicts is None else conflicts & due
    new = {"shares": shares, "coherences": coherences, "errors": seen_errors, "decided": coefficients}
    state.remember_if(counts, **new)
    return counts, due


def _means(means: Tensor, values: Tensor, smoothing: float) -> Tensor:
    """The running means after one more value of each, starting at the first; a NaN leaves its mean."""
    later = torch.lerp(values, means, smoothing)
    return torch.where(values.isnan(), means, torch.where(means.isnan(), values, later))
