"""Time, memory and operators of the penalty.

Every call is timed in turn with its rivals, so that a ratio compares neighbours in time; the tables have the median of
the ratios of all rounds and their quartiles.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks._timing import Call, interleaved, peak_memory, quartiles, ratios
from benchmarks.overhead.fsdp2 import measure_fsdp2
from benchmarks.overhead.rivals import (
    MAX_NORM,
    Branches,
    Groups,
    NoStep,
    clipping,
    with_own_backward,
)
from benchmarks.overhead.small import measure_small
from gradbalance import Recorder, attach
from gradbalance.rules import Measured

CLIP = "clip_grad_norm_"
IN_PLACE = "negation in place"


class Busy:
    """Scales every group but the last, by factors near 1 so that the same gradients can be scaled a thousand times."""

    needs_coherence = False

    def __call__(self, measured: Measured) -> np.ndarray:
        coefficients = np.full(len(measured.names), 0.999)
        coefficients[-1] = 1.0
        return coefficients


MODES: dict[str, dict[str, Any]] = {
    "update": {"rule": Busy()},
    "gradient": {"rule": Busy(), "apply_to": "gradient"},
    "update + max_norm": {"rule": Busy(), "max_norm": MAX_NORM},
    "gradient + max_norm": {"rule": Busy(), "apply_to": "gradient", "max_norm": MAX_NORM},
    "update, defaults": {},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-5, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-5, foreach=True),
    "AdamW default": partial(torch.optim.AdamW, lr=1e-5),
    "SGD": partial(torch.optim.SGD, lr=1e-5),
}


def with_gradients(n_groups: int, n_tensors: int, numel: int, device: str) -> Groups:
    """Parameters with random gradients."""
    groups: Groups = {f"group{m}": [] for m in range(n_groups)}
    for i in range(n_tensors):
        p = nn.Parameter(torch.zeros(numel, device=device))
        p.grad = torch.randn_like(p)
        groups[f"group{i * n_groups // n_tensors}"].append(p)
    return groups


def penalty(groups: Groups, options: dict[str, Any]) -> Call:
    """One step of the penalty on an optimizer that does nothing else."""
    optimizer = NoStep([p for group in groups.values() for p in group])
    balance(optimizer, groups, options)

    def step() -> None:
        optimizer.step()

    return step


def balance(optimizer: torch.optim.Optimizer, groups: Groups, options: dict[str, Any]) -> None:
    """Attach a penalty; that AdamW would cancel the factors of the gradient is no matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(optimizer, groups, **options)


def renewal(groups: Groups) -> Call:
    """What makes gradients that were clipped already count as new ones that have to be clipped."""
    first = next(iter(groups.values()))[0]

    def renew() -> None:
        # A little above the limit: clipping it away hundreds of times must not make the others denormal.
        first.grad = first.grad.detach()
        first.grad.flatten()[:1].fill_(1.01 * MAX_NORM)

    return renew


def measure_operations(
    n_groups: int, n_tensors: int, numel: int, device: str, rounds: int, rivals: bool
) -> dict:
    """The penalty alone beside clipping, and beside the time in which the same bytes can be read and written."""
    groups = with_gradients(n_groups, n_tensors, numel, device)
    others = clipping(groups)
    calls = {
        CLIP: others[CLIP],
        **{name: penalty(groups, options) for name, options in MODES.items()},
    }
    calls |= others if rivals else {}
    source = torch.randn(n_tensors * numel, device=device) if rivals else torch.empty(0)
    calls |= (
        {"copy": partial(torch.empty_like(source).copy_, source), IN_PLACE: source.neg_}
        if rivals
        else {}
    )
    renew = renewal(groups)
    times = interleaved(calls, rounds, device, prepare=renew)
    found: dict = {
        "parameters": n_tensors * numel,
        "tensors": n_tensors,
        "groups": n_groups,
        "clip_ms": [1e3 * t for t in quartiles(times[CLIP])],
        "ratios": ratios(times, CLIP),
    }
    if rivals:
        # In place every byte is read and written once: so it is in scaling, and norms only read it.
        scaled = (n_groups - 1) / n_groups if device == "cpu" else 1.0
        floors = {CLIP: 1.5, "update": 0.5, "gradient": 0.5 + scaled}
        floors |= {"update + max_norm": 1.5, "gradient + max_norm": 1.5}
        found["gb_per_s"] = {
            name: 8e-9 * len(source) / float(times[name].median()) for name in ("copy", IN_PLACE)
        }
        found["over_floor"] = {
            name: quartiles(times[name] / times[IN_PLACE] / f) for name, f in floors.items()
        }
        found["peak_bytes"] = {}
        for name in (CLIP, *MODES):
            renew()
            found["peak_bytes"][name] = peak_memory(calls[name], device)
    return found


def measure_step(
    kind: str, size: int, optimizer: str, device: str, rounds: int, rivals: bool
) -> dict:
    """A whole training step: forward, backward, balance, update. All share the model and the optimizer's state."""
    torch.manual_seed(0)
    model = Branches(kind, size).move(device)
    plain = OPTIMIZERS[optimizer](model.parameters())

    def twin() -> torch.optim.Optimizer:
        other = OPTIMIZERS[optimizer](model.parameters())
        other.state = plain.state
        return other

    def whole(
        optimizer: torch.optim.Optimizer, act: Call | None = None, backward: Call | None = None
    ) -> None:
        optimizer.zero_grad()
        if backward is None:
            model().backward()
        else:
            backward()
        if act is not None:
            act()
        optimizer.step()

    calls: dict[str, Call] = {"plain": partial(whole, plain)}
    for name in MODES if rivals else ("update", "gradient", "update, defaults"):
        balanced = twin()
        balance(balanced, model.groups(), MODES[name])
        calls[name] = partial(whole, balanced)
    recorded = twin()
    balance(recorded, model.groups(), MODES["update, defaults"])
    Recorder(recorded)  # which the penalty keeps
    calls["update, defaults, recorded"] = partial(whole, recorded)
    others = clipping({**model.groups(), "head": list(model.head.parameters())})
    if rivals:
        calls |= {name: partial(whole, plain, other) for name, other in others.items()}
    if rivals and size < 60:  # PCGrad alone takes 20 times as long as all others
        own = with_own_backward(model.losses, model.head.weight, twin())
        calls |= {name: partial(whole, plain, None, backward) for name, backward in own.items()}
    else:
        calls[CLIP] = partial(whole, plain, others[CLIP])
    times = interleaved(calls, rounds, device, warm_up=1)
    return {
        "model": kind,
        "optimizer": optimizer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plain_ms": [1e3 * t for t in quartiles(times["plain"])],
        "ratios": ratios(times, "plain"),
    }


def steps(device: str, quick: bool = False) -> list[Call]:
    """`measure_step` of every model and optimizer."""
    return [
        partial(measure_step, kind, million, name, device, 3 if quick else 7, name == "AdamW fused")
        for million in ((10,) if quick else (10, 60))
        for kind in ("MLP", "transformer")
        for name in OPTIMIZERS
    ]


def measure_profile(device: str, steps: int = 100) -> list[dict]:
    """The operators of one step of the penalty in gradient mode on 300 small tensors, by the host time they take."""
    groups = with_gradients(3, 300, 1000, device)
    step, renew = penalty(groups, MODES["gradient"]), renewal(groups)
    whole = interleaved({"step": step}, steps, "cpu", prepare=renew)["step"].median()
    durations: dict[str, list[float]] = {}
    for _ in range(steps):
        renew()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step()
        for event in trace.events():
            durations.setdefault(event.name.removeprefix("aten::"), []).append(
                event.self_cpu_time_total
            )
    rows = [
        # The median, since what else runs on the machine interrupts a few.
        {
            "operator": name,
            "calls": len(us) / steps,
            "us": float(torch.tensor(us).median()) * len(us) / steps,
        }
        for name, us in durations.items()
    ]
    return [
        {"operator": "whole", "calls": 1, "us": 1e6 * float(whole)},
        *sorted(rows, key=lambda r: -r["us"]),
    ]


def curves(largest: int) -> dict[str, list[tuple[int, int, int]]]:
    """Groups, tensors, and elements of a tensor along each curve."""
    parameters = (10**6, 10**7, 10**8, 5 * 10**8)
    return {
        "parameters": [(3, 300, n // 300) for n in parameters if n <= largest],
        "tensors": [(2, n, 64) for n in (10, 100, 1000, 10_000)],
        "groups": [(n, 512, 64) for n in (2, 16, 64, 256)],
        "groups, 10,000 tensors": [(n, 10_000, 64) for n in (2, 256)],
    }


def rounds_at(size: tuple[int, int, int]) -> int:
    """As many as take about a second."""
    _, tensors, numel = size
    return max(5, min(60, 10**8 // (tensors * (numel + 10**4))))


def measurements(device: str = "cpu", quick: bool = False) -> dict[str, Call]:
    """What measures each part, ready for JSON; ``quick`` for the smallest sizes alone, to see that it runs."""
    numel, largest, rounds = (3000, 10**6, 9) if quick else (220_000, 5 * 10**8, 25)
    return {
        "small": lambda: measure_small(5 if quick else 60),
        "operations": lambda: measure_operations(3, 300, numel, device, rounds, True),
        "curves": lambda: {
            name: [measure_operations(*at, device, rounds_at(at), False) for at in points]
            for name, points in curves(largest).items()
        },
        "steps": lambda: [call() for call in steps(device, quick)],
        "profile": lambda: measure_profile(device, 5 if quick else 100),
        "fsdp2": measure_fsdp2,
    }
