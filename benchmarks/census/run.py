"""One optimizer with and without the penalty, on the same fixed gradients: how far each parameter moves."""

import contextlib
import random
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.census.optimizers import Make
from gradbalance import attach, rules

Feed = Callable[[nn.Module, Any, dict[str, Tensor]], None]

STEPS, FACTOR, TOLERANCE = 40, 0.5, 0.02
RESOLVED = 1e-6  # what float32 can tell of parameters of a size like 1


class Verdict(NamedTuple):
    """What became of an optimizer.

    Attributes:
        outcome: One of OUTCOMES.
        worst: Of the parameters with a factor and of the others: the displacement over the plain run's that is
            farthest from what it should be, or None where nothing was measured.
        note: A message.
    """

    outcome: str
    worst: tuple[float, float] | None = None
    note: str = ""


class _RefusedError(Exception):
    """At construction."""


OUTCOMES = (
    "by learning rate",
    "by displacement",
    "on request",  # refused, but right with `apply_to="learning_rate"` or `"displacement"`
    "refused",
    "fails in the step",
    "SILENT",
    "plain run fails",
)


def model(bias: bool) -> nn.ModuleDict:
    """Two branches and a head, of matrices, and vectors if asked to."""
    torch.manual_seed(0)
    branches = {
        name: nn.Sequential(nn.Linear(12, 16, bias), nn.Linear(16, 10, bias)) for name in ("a", "b")
    }
    net = nn.ModuleDict({**branches, "head": nn.Linear(10, 4, bias)})
    for p in net.parameters():
        nn.init.normal_(
            p
        )  # large beside the steps, as some of these go by the size of the parameters
    return net


def verdict(make: Make) -> Verdict:
    """Build the optimizer twice and compare how far the parameters move."""
    errors = []
    for bias, feed in product((True, False), (_gradients, _closure, _graph, _fused, _sparse)):
        try:
            plain, _ = _displacements(make, bias, feed)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        largest = max(d.abs().max() for d in plain.values())
        if largest < RESOLVED:
            errors.append(
                "nothing moves" if largest == 0 else f"nothing moves by more than {largest:.0e}"
            )
            continue
        if not all(d.isfinite().all() for d in plain.values()):
            errors.append("moves to NaN")
            continue
        return _compared(plain, make, bias, feed)
    return Verdict(
        "plain run fails", note=next((e for e in errors if "losure" not in e), errors[0])
    )


def _compared(plain: dict[str, Tensor], make: Make, bias: bool, feed: Feed) -> Verdict:
    found = _with_penalty(plain, make, bias, feed, "update")
    if found.outcome != "refused":
        return found
    for apply_to in ("learning_rate", "displacement"):
        asked = _with_penalty(plain, make, bias, feed, apply_to)
        if asked.outcome.startswith("by "):
            note = f'apply_to="{apply_to}", as {found.note}'
            return Verdict("on request", asked.worst, note)
    return found


def _with_penalty(
    plain: dict[str, Tensor], make: Make, bias: bool, feed: Feed, apply_to: str
) -> Verdict:
    try:
        scaled, scaling = _displacements(make, bias, feed, apply_to)
    except _RefusedError as error:
        return Verdict("refused", note=str(error))
    except Exception as error:
        return Verdict("fails in the step", note=f"{type(error).__name__}: {error}")
    ratios: dict[bool, list[float]] = {True: [], False: []}
    off = []
    for name, before in plain.items():
        is_scaled = name.startswith("a.")
        expected = before * (FACTOR if is_scaled else 1.0)
        after = scaled[name]
        if not (after - expected).norm() <= TOLERANCE * before.norm():
            off.append(name)
        if before.norm() > 0:
            ratios[is_scaled].append((after.norm() / before.norm()).item())
    worst = (
        max(ratios[True], key=lambda r: abs(r - FACTOR), default=1.0),
        max(ratios[False], key=lambda r: abs(r - 1), default=1.0),
    )
    return Verdict("SILENT" if off else f"by {scaling}", worst, ", ".join(off))


def _displacements(
    make: Make, bias: bool, feed: Feed, apply_to: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """How far each parameter moves; how it was scaled, where a penalty is asked for."""
    net = model(bias)
    _seed(-1)
    optimizer: Any = make(net)
    if hasattr(optimizer, "train") and callable(optimizer.train):
        optimizer.train()
    scaling = ""
    if apply_to is not None:
        groups = {"a": net["a"], "b": net["b"]}
        rule = rules.ByHand(a=FACTOR)
        try:
            penalty = attach(optimizer, groups, rule=rule, apply_to=apply_to)
        except (ValueError, TypeError, RuntimeError) as error:
            raise _RefusedError(str(error)) from error
        scaling = "displacement" if "by displacement" in repr(penalty) else "learning rate"
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(STEPS):
        _seed(step)
        targets = {
            name: torch.randn(p.shape) * (0.1 + step % 3) + 0.5
            for name, p in net.named_parameters()
        }
        feed(net, optimizer, targets)
    return {name: p.detach() - start[name] for name, p in net.named_parameters()}, scaling


def _seed(seed: int) -> None:
    torch.manual_seed(seed + 1)
    random.seed(seed + 1)
    np.random.seed(seed + 1)  # what optimizers draw from


def _loss(net: nn.Module, targets: dict[str, Tensor]) -> Tensor:
    """Wherever the parameters are, a loss of 1, the gradients given, and as Hessian the identity over ten."""
    moves = [(p - p.detach(), targets[name]) for name, p in net.named_parameters()]
    return sum(((m * g).sum() + 0.05 * m.square().sum() for m, g in moves), torch.ones(()))


def _gradients(net: nn.Module, optimizer: Any, targets: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    _loss(net, targets).backward()
    optimizer.step()


def _closure(net: nn.Module, optimizer: Any, targets: dict[str, Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad(), contextlib.suppress(RuntimeError):
            loss = _loss(net, targets)
            loss.backward(retain_graph=True)  # some do so again
        return loss

    closure()
    optimizer.step(closure)


def _graph(net: nn.Module, optimizer: Any, targets: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    _loss(net, targets).backward(create_graph=True)
    optimizer.step()


def _fused(net: nn.Module, optimizer: Any, targets: dict[str, Tensor]) -> None:
    if hasattr(optimizer, "fused_backward"):
        optimizer.fused_backward(_loss(net, targets), lr=1e-3)
    else:
        optimizer.zero_grad()
        optimizer.backward(_loss(net, targets))
        optimizer.step()


def _sparse(net: nn.Module, optimizer: Any, targets: dict[str, Tensor]) -> None:
    for name, p in net.named_parameters():
        p.grad = targets[name].to_sparse(1)
    optimizer.step()
