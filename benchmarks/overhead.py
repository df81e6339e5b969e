"""What does the penalty cost? ``python -m benchmarks.overhead`` writes ``results/overhead.*``.

Every call is timed in turn with its rivals, so that a ratio compares neighbours in time; the tables have the median of
the ratios of all rounds and their quartiles.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks._overhead_fsdp2 import measure_fsdp2
from benchmarks._overhead_report import plot, report
from benchmarks._overhead_rivals import MAX_NORM, Branches, Groups, NoStep, clipping, with_own_backward
from benchmarks._timing import Call, environment, interleaved, peak_memory, quartiles, ratios, seconds
from gradbalance import attach

RESULTS = Path(__file__).parent / "results"
CLIP = "clip_grad_norm_"
# The rule at its busiest: every group but the smallest is scaled, by factors near 1 so that the same gradients can be
# scaled a thousand times.
BUSY: dict[str, Any] = {"threshold": 1.0, "eta": 0.999, "smoothing": 0.0, "agreement": None}
MODES: dict[str, dict[str, Any]] = {
    "update": {**BUSY, "apply_to": "update"},
    "gradient": {**BUSY, "apply_to": "gradient"},
    "update + max_norm": {**BUSY, "apply_to": "update", "max_norm": MAX_NORM},
    "gradient + max_norm": {**BUSY, "apply_to": "gradient", "max_norm": MAX_NORM},
    "update, defaults": {},
    "gradient, nothing to scale": {**BUSY, "apply_to": "gradient", "threshold": 1e6},
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
    attach(optimizer, groups, **options)
    first = optimizer.param_groups[0]["params"][0]

    def step() -> None:
        first.grad = first.grad.detach()  # else a second step with the same gradients would do nothing
        optimizer.step()

    return step


def measure_operations(n_groups: int, n_tensors: int, numel: int, device: str, rounds: int, rivals: bool) -> dict:
    """The penalty alone beside clipping, and beside what the bytes take at the speed of a copy in the same rounds."""
    groups = with_gradients(n_groups, n_tensors, numel, device)
    others = clipping(groups)
    calls = {CLIP: others[CLIP], **{name: penalty(groups, options) for name, options in MODES.items()}}
    calls |= others if rivals else {}
    source = torch.randn(n_tensors * numel, device=device) if rivals else torch.empty(0)
    target = torch.empty_like(source)
    calls |= {"copy": lambda: target.copy_(source)} if rivals else {}
    times = interleaved(calls, rounds, device)
    found: dict = {
        "parameters": n_tensors * numel,
        "tensors": n_tensors,
        "groups": n_groups,
        "clip_ms": [1e3 * t for t in quartiles(times[CLIP])],
        "ratios": ratios(times, CLIP),
    }
    if rivals:
        # A copy reads and writes every byte once: so does scaling, and norms read it.
        scaled = (n_groups - 1) / n_groups if device == "cpu" else 1.0
        floors = {"update": 0.5, "gradient": 0.5 + scaled, "update + max_norm": 1.5, "gradient + max_norm": 1.5}
        found["copy_gb_per_s"] = float(2 * 4 * n_tensors * numel / times["copy"].median() / 1e9)
        found["over_floor"] = {name: quartiles(times[name] / times["copy"] / f) for name, f in floors.items()}
        found["peak_bytes"] = {name: peak_memory(calls[name], device) for name in (CLIP, *MODES)}
    return found


def measure_step(kind: str, size: int, optimizer: str, device: str, rounds: int, rivals: bool) -> dict:
    """A whole training step: forward, backward, balance, update. All share the model and the optimizer's state."""
    torch.manual_seed(0)
    model = Branches(kind, size).move(device)
    plain = OPTIMIZERS[optimizer](model.parameters())

    def twin() -> torch.optim.Optimizer:
        other = OPTIMIZERS[optimizer](model.parameters())
        other.state = plain.state
        return other

    def whole(optimizer: torch.optim.Optimizer, balance: Call | None = None, backward: Call | None = None) -> None:
        optimizer.zero_grad()
        if backward is None:
            model().backward()
        else:
            backward()
        if balance is not None:
            balance()
        optimizer.step()

    calls: dict[str, Call] = {"plain": partial(whole, plain)}
    for name in MODES if rivals else ("update", "gradient", "update, defaults"):
        balanced = twin()
        attach(balanced, model.groups(), **MODES[name])
        calls[name] = partial(whole, balanced)
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


def measure_profile(device: str) -> list[dict]:
    """The operators of one step of the penalty in gradient mode on 300 small tensors, by the host time they take."""
    step = penalty(with_gradients(3, 300, 1000, device), MODES["gradient"])
    for _ in range(5):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(20):
            step()
    rows = [
        {"operator": e.key.removeprefix("aten::"), "calls": e.count / 20, "us": e.self_cpu_time_total / 20}
        for e in trace.key_averages()
    ]
    host = sum(seconds(step, "cpu") for _ in range(100)) / 100 * 1e6
    return [{"operator": "whole step, not profiled", "calls": 1, "us": host}, *sorted(rows, key=lambda r: -r["us"])]


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


def measure(device: str = "cpu", quick: bool = False) -> dict:
    """Everything, ready for JSON; ``quick`` for the smallest sizes alone, to see that it runs."""
    size, numel, largest, rounds = (10, 3000, 10**6, 9) if quick else (60, 220_000, 5 * 10**8, 25)
    found: dict = {"environment": environment(device)}
    found["operations"] = measure_operations(3, 300, numel, device, rounds, True)
    found["curves"] = {
        name: [measure_operations(*at, device, rounds_at(at), False) for at in points]
        for name, points in curves(largest).items()
    }
    found["steps"] = [
        measure_step(kind, million, name, device, 3 if quick else 9, name == "AdamW fused")
        for million in sorted({10, size})
        for kind in ("MLP", "transformer")
        for name in OPTIMIZERS
    ]
    found["profile"] = measure_profile(device)
    found["fsdp2"] = measure_fsdp2() if device == "cpu" else None
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    measured = measure("cpu", quick)
    if not quick:
        (RESULTS / "overhead.json").write_text(json.dumps(measured, indent=1) + "\n")
        (RESULTS / "overhead.md").write_text(report(measured))
        plot(measured, RESULTS / "overhead.png")
    print(report(measured))
